"""The operators as torch sees them: opcheck, fake tensors, schemas, export."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import attnforge
from attnforge._params import FlashMods
from attnforge.testing.cases import FlashCase, FlashInputs

OPS = torch.ops.attnforge
CASES = {
    "plain": FlashCase(seqlen_q=5, seqlen_k=9, heads_q=4, heads_k=2),
    "half": FlashCase(seqlen_q=5, seqlen_k=9, dtype=torch.bfloat16, v_head_dim=24, causal=True),
    "features": FlashCase(seqlen_q=5, seqlen_k=9, alibi="batch", sinks="normal", used=(3, 9),
                          softcap=4.0, window=(2, 1)),
    "varlen": FlashCase(lengths=((3, 4), (0, 2), (5, 5)), causal=True),
    "strided": FlashCase(seqlen_q=5, seqlen_k=9, layout="heads_first", grad_layout="sliced"),
}  # fmt: skip


def arguments(inputs: FlashInputs) -> tuple[list[Any], list[Any]]:
    """(q, k, v), and the fields of FlashParams after them, as the operators take it."""
    q, k, o = inputs.q, inputs.k, inputs.options
    dim = 0 if "cu_seqlens_q" in o else 1
    left, right = o["window_size"]
    names = ("cu_seqlens_q", "cu_seqlens_k", "seqused_k", "alibi_slopes", "sinks")
    tail = [*(o.get(n) for n in names), q.shape[dim], k.shape[dim], q.shape[-1] ** -0.5, left,
            0 if o["causal"] else right, o["softcap"], [], "softmax", 0.0, False, None]  # fmt: skip
    return [q, k, inputs.v], tail


def calls(name: str, backend: str) -> list[tuple[Any, tuple[Any, ...]]]:
    """Every operator of the family with arguments of one case."""
    inputs = CASES[name].make()
    head, tail = arguments(inputs)
    found: list[tuple[Any, tuple[Any, ...]]] = []
    for save in (False, True):
        found.append((OPS.flash_fwd.default, (*head, *tail, save, backend)))
    out, lse, low = OPS.flash_fwd(*head, *tail, True, backend)
    saved = (inputs.dout, inputs.dlse, *head, out, lse, low)
    found.append((OPS.flash_bwd.default, (*saved, *tail, 0, backend)))
    found.append((OPS.flash_bwd.default, (inputs.dout, None, *saved[2:], *tail, 0, backend)))
    if tail[0] is None:
        found.append((OPS.flash_decode.default, (*head, *tail[2:5], *tail[7:], 2, backend)))
    parts = ([out, out.clone()], [lse, lse.clone()], backend)
    found.append((OPS.merge_states.default, parts))
    return found


@pytest.mark.plain_memory
@pytest.mark.parametrize("name", CASES)
def test_opcheck(backend: str, name: str) -> None:
    # check 77
    for op, args in calls(name, backend):
        torch.library.opcheck(op, args)


def describe(x: Tensor) -> tuple[Any, ...]:
    return tuple(x.shape), x.stride(), x.dtype, x.storage_offset()


@pytest.mark.plain_memory
def test_opcheck_of_mods() -> None:
    # Features of single scores: a list of optional tensors, some of them with a gradient.
    inputs = CASES["plain"].make()
    head, tail = arguments(inputs)
    mods = [None] * len(FlashMods._fields)
    mods[FlashMods._fields.index("key_bias")] = torch.randn(1, 4, 9)
    mods[FlashMods._fields.index("mask")] = torch.rand(2, 1, 5, 9) > 0.3
    tail[11] = mods
    out, lse, low = OPS.flash_fwd(*head, *tail, True, "reference")
    torch.library.opcheck(OPS.flash_fwd.default, (*head, *tail, True, "reference"))
    saved = (inputs.dout, inputs.dlse, *head, out, lse, low)
    torch.library.opcheck(OPS.flash_bwd.default, (*saved, *tail, 1, "reference"))
    assert OPS.flash_bwd(*saved, *tail, 1, "reference")[4].shape == (1, 4, 9)


def check_fake(op: Any, args: tuple[Any, ...]) -> None:
    # check 80: shapes, strides and dtypes, by fake tensors and on the meta device
    real = [describe(x) for x in op(*args)]
    with FakeTensorMode(allow_non_fake_inputs=False) as mode:
        fake_args = torch.utils._pytree.tree_map_only(Tensor, mode.from_tensor, args)
        assert [describe(x) for x in op(*fake_args)] == real
    meta_args = torch.utils._pytree.tree_map_only(Tensor, lambda x: x.to("meta"), args)
    assert [describe(x) for x in op(*meta_args)] == real


@pytest.mark.parametrize("name", CASES)
def test_fake_outputs_look_like_real_ones(backend: str, name: str) -> None:
    for op, args in calls(name, backend):
        check_fake(op, args)


@pytest.mark.parametrize("out_dtype", [None, torch.float32])
def test_fake_outputs_of_fp8(backend: str, out_dtype: torch.dtype | None) -> None:
    head, tail = arguments(CASES["plain"].make())
    tail[-1] = out_dtype
    for wider in (torch.float8_e4m3fn, torch.bfloat16):
        q, k, v = (x.to(torch.float8_e4m3fn) for x in head)
        q = q.to(wider)
        check_fake(OPS.flash_fwd.default, (q, k, v, *tail, False, backend))
        check_fake(OPS.flash_decode.default, (q, k, v, *tail[2:5], *tail[7:], 2, backend))


def test_public_functions_on_meta() -> None:
    # check 80
    q = torch.empty(2, 5, 4, 16, device="meta", requires_grad=True)
    k, v = (torch.empty(2, 7, 2, d, device="meta") for d in (16, 24))
    out, lse = attnforge.flash_attention(q, k, v, return_lse=True)
    assert out.shape == (2, 5, 4, 24)
    assert lse.shape == (2, 4, 5)
    assert out.device.type == "meta"
    (grad,) = torch.autograd.grad(out, q, torch.empty_like(out))
    assert grad.shape == q.shape


def test_unbacked_sizes() -> None:
    # check 80: sizes that are known at run time alone
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    env = ShapeEnv()
    with FakeTensorMode(shape_env=env):
        batch, rows = env.create_unbacked_symint(), env.create_unbacked_symint()
        torch._check(batch >= 1)
        torch._check(rows >= 1)
        q = torch.empty(batch, rows, 4, 16)
        kv = torch.empty(batch, rows, 2, 16)
        out, lse, low = OPS.flash_fwd(
            q, kv, kv, None, None, None, None, None, rows, rows, 0.25, -1, 0, 0.0, [], "softmax",
            0.0, False, None, False, None,
        )  # fmt: skip
        assert tuple(out.shape[2:]) == (4, 16)
        assert lse.shape[1] == 4
        assert tuple(low.shape) == (0,)


def test_schemas_are_stable() -> None:
    # dense_paged 5.1: signatures are an interface; change this test with the changelog
    shared = (
        "Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, Tensor? seqused_k, Tensor? alibi_slopes, "
        "Tensor? sinks, SymInt max_seqlen_q, SymInt max_seqlen_k, float softmax_scale, "
        "SymInt window_left, SymInt window_right, float softcap, "
    )
    mods = (
        "Tensor?[] mods, str score_fn, float dropout_p, bool rope_interleaved, "
        "ScalarType? out_dtype"
    )
    assert str(OPS.flash_fwd.default._schema) == (
        f"attnforge::flash_fwd(Tensor q, Tensor k, Tensor v, {shared}{mods}, bool save_out_lo, "
        "str? backend) -> (Tensor out, Tensor lse, Tensor out_lo)"
    )
    assert str(OPS.flash_bwd.default._schema) == (
        "attnforge::flash_bwd(Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor out, "
        f"Tensor lse, Tensor out_lo, {shared}{mods}, int grad_mods, "
        "str? backend) -> (Tensor dq, Tensor dk, Tensor dv, Tensor dsinks, Tensor dkey_bias, "
        "Tensor dbias, Tensor drel_bias, Tensor ddecay, Tensor drow_scale)"
    )
    assert str(OPS.flash_decode.default._schema) == (
        "attnforge::flash_decode(Tensor q, Tensor k_cache, Tensor v_cache, Tensor? cache_seqlens, "
        "Tensor? alibi_slopes, Tensor? sinks, float softmax_scale, SymInt window_left, "
        f"SymInt window_right, float softcap, {mods}, SymInt num_splits, str? backend) "
        "-> (Tensor out, Tensor lse)"
    )
    assert str(OPS.merge_states.default._schema) == (
        "attnforge::merge_states(Tensor[] outs, Tensor[] lses, str? backend) "
        "-> (Tensor out, Tensor lse)"
    )


class Layer(torch.nn.Module):
    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        out, lse = attnforge.flash_attention(q, k, v, causal=True, return_lse=True)
        again = attnforge.flash_decode(q[:, -1:], k, v)
        return out + again, lse


@pytest.mark.plain_memory
def test_export(tmp_path: Any) -> None:
    # check 79: dynamic sizes, saved and loaded again
    q, k, v = (torch.randn(2, s, h, 16) for s, h in ((6, 4), (9, 2), (9, 2)))
    batch, rows, keys = (torch.export.Dim(n, min=2, max=64) for n in ("batch", "rows", "keys"))
    dynamic = ({0: batch, 1: rows}, {0: batch, 1: keys}, {0: batch, 1: keys})
    program = torch.export.export(Layer(), (q, k, v), dynamic_shapes=dynamic)
    torch.export.save(program, tmp_path / "layer.pt2")
    loaded = torch.export.load(tmp_path / "layer.pt2").module()
    for b, s, t in ((2, 6, 9), (3, 11, 20), (5, 33, 33)):
        args = (torch.randn(b, s, 4, 16), torch.randn(b, t, 2, 16), torch.randn(b, t, 2, 16))
        for got, want in zip(loaded(*args), Layer()(*args), strict=True):
            assert torch.equal(got, want)
