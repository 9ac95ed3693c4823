"""Block-sparse methods in transformers: what they choose, what attention over it gives, masks.

Models are tiny and random; attention is compared with its definition in float64 on the lists that
the method made, inside fp32's own rounding.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

os.environ.setdefault("HF_HUB_OFFLINE", "1")
pytest.importorskip("transformers", reason="transformers is not installed (extra: transformers)")

import transformers

import attnforge
import attnforge.integrations.block_sparse as sparse
import attnforge.nn as anf
from attnforge.integrations import seer
from attnforge.integrations import transformers as hf
from attnforge.integrations._mask_plan import Band, MaskSpec
from attnforge.nn._rope import rotated

pytestmark = [pytest.mark.integration, pytest.mark.filterwarnings("ignore::DeprecationWarning")]

SMALL: dict[str, Any] = {"block_size": 4, "top_k": 2, "q_block": 4}
EVERY = sparse.Recent(block_size=4, top_k=100, q_block=4)


@pytest.fixture(scope="module")
def model() -> Iterator[Any]:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128, pad_token_id=0,
    )  # fmt: skip
    with hf.enable():
        yield transformers.LlamaForCausalLM(config).eval()


def heads(batch: int = 1, rows: int = 22, keys: int = 22) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v as a model gives them, [B, heads, S, D]."""
    q = torch.randn(batch, 4, rows, 8)
    return q, torch.randn(batch, 2, keys, 8), torch.randn(batch, 2, keys, 8)


class Layer(torch.nn.Module):
    layer_idx, is_causal = 0, True


def defined(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """Attention in float64 of heads [B, H, S, D] where mask [B, H, Sq, Sk] is true."""
    k, v = (x.double().repeat_interleave(2, 1) for x in (k, v))
    s = (q.double() @ k.mT * 0.3).masked_fill(~mask, -torch.inf)
    return (s.softmax(-1).nan_to_num() @ v).transpose(1, 2)


def token_mask(lists: attnforge.BlockSelection, rows: int, keys: int) -> Tensor:
    """bool [B, 4, rows, keys] of a causal call."""
    mask = lists.to_mask(-(-keys // lists.kv_block)).repeat_interleave(4 // lists.heads, 1)
    mask = mask.repeat_interleave(lists.q_block, 2).repeat_interleave(lists.kv_block, 3)
    return mask[:, :, :rows, :keys].tril(keys - rows)


METHODS = {
    "moba": sparse.MoBA(block_size=4, top_k=2),
    "oracle": sparse.Oracle(**SMALL),
    "oracle, per token": sparse.Oracle(block_size=4, top_k=2, q_block=1),
    "mean": sparse.MeanPooled(**SMALL),
    "recent": sparse.Recent(**SMALL),
    "seer": sparse.Seer(
        **SMALL, gates=[anf.SeerAttentionGate(8, 4, 2, block_size=4)], rope_base=100.0
    ),
    "seer, decode form": sparse.Seer(
        block_size=4, top_k=2, q_block=1, gates={0: anf.SeerAttentionGate(
            8, 4, 2, block_size=4, form="decode")}),
}  # fmt: skip


@pytest.mark.parametrize("rows", [22, 5, 1], ids=["prompt", "chunk", "token"])
@pytest.mark.parametrize("name", METHODS)
def test_attention_over_what_a_method_chooses(name: str, rows: int) -> None:
    q, k, v = heads(2, rows)
    seen: list[Any] = []
    function = sparse.SparseAttention(METHODS[name], lambda *args: seen.append(args))
    out, _ = function(Layer(), q, k, v, None, scaling=0.3)
    (_, _, _, lists, lse), = seen  # fmt: skip
    mask = token_mask(lists, rows, 22)
    torch.testing.assert_close(out.double(), defined(q, k, v, mask), rtol=1e-5, atol=1e-6)
    assert lse.shape == (2, 4, rows)
    # Every query sees itself, and no row of lists has more blocks than its own and top_k.
    assert mask.diagonal(22 - rows, 2, 3).all()
    assert int(lists.to_mask(6).sum(-1).max()) <= 2 + (rows % 4 > 0)


def test_methods_with_equal_settings_have_equal_density() -> None:
    q, k = torch.randn(1, 64, 4, 8), torch.randn(1, 64, 2, 8)
    found = {
        kind(block_size=4, top_k=5, **more)(Layer(), q, k, 0.3).density(64, 64)
        for kind, more in (
            (sparse.MoBA, {}),
            *((sparse.Oracle, {"q_block": n}) for n in (1, 4)),
            (sparse.MeanPooled, {"q_block": 4}),
            (sparse.Recent, {"q_block": 4}),
        )
    }
    assert len(found) == 1


def test_oracle_takes_the_blocks_of_the_largest_probabilities() -> None:
    q, k = torch.randn(1, 24, 4, 8), torch.randn(1, 24, 2, 8)
    lists = sparse.Oracle(block_size=4, top_k=3, q_block=4, init_blocks=0)(Layer(), q, k, 0.3)
    s = torch.einsum("bihd,bjhd->bhij", q, k.repeat_interleave(2, 2)).double() * 0.3
    s = s.masked_fill(~torch.ones(24, 24, dtype=torch.bool).tril(), -torch.inf)
    top = s.softmax(-1).unflatten(2, (6, 4)).unflatten(4, (6, 4)).amax((3, 5))
    top.diagonal(0, 2, 3).fill_(2.0)  # the own block comes first
    want = torch.zeros_like(top, dtype=torch.bool).scatter_(-1, top.topk(3).indices, True)
    assert torch.equal(lists.to_mask(6), want & (top > 0))


def test_gates_see_what_was_before_rotation() -> None:
    raw_q, raw_k = torch.randn(1, 5, 4, 8), torch.randn(1, 22, 2, 8)
    at = torch.arange(22)
    q, k = rotated(raw_q, at[17:], 50.0), rotated(raw_k, at, 50.0)
    for got, want in zip(sparse.unrotated(q, k, 50.0), (raw_q, raw_k), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_and_packing_are_pieces(side: str) -> None:
    """Each sequence of a batch as if it were alone; padding queries give 0."""
    q, k, v = heads(2)
    pad = torch.ones(2, 22, dtype=torch.bool)
    real = slice(7, 22) if side == "left" else slice(0, 15)
    pad[1] = False
    pad[1, real] = True
    spec = MaskSpec(2, 22, 22, Band(causal=True), padding=pad)
    function = sparse.SparseAttention(METHODS["moba"])
    out, _ = function(Layer(), q, k, v, spec, scaling=0.3)
    alone = [(0, slice(0, 22)), (1, real)]
    for b, rows in alone:
        x = (y[b : b + 1, :, rows] for y in (q, k, v))
        want, _ = function(Layer(), *x, None, scaling=0.3)
        assert torch.equal(out[b : b + 1, rows], want)
    assert not out[1][~pad[1]].any()
    positions = torch.cat([torch.arange(9), torch.arange(13)])[None]
    packed = MaskSpec(1, 22, 22, Band(causal=True))
    out, _ = function(
        Layer(), q[:1], k[:1], v[:1], packed, scaling=0.3, position_ids=positions
    )  # fmt: skip
    for rows in (slice(0, 9), slice(9, 22)):
        x = (y[:1, :, rows] for y in (q, k, v))
        assert torch.equal(out[:, rows], function(Layer(), *x, None, scaling=0.3)[0])


def test_model_with_everything_selected_is_dense(model: Any) -> None:
    ids = torch.randint(1, 50, (2, 30))
    model.set_attn_implementation("attnforge")
    with torch.no_grad():
        want = model(ids).logits
        with sparse.enable(EVERY, name="attnforge:every"):
            model.set_attn_implementation("attnforge:every")
            got = model(ids).logits
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_decoding_is_the_last_row_of_a_prompt(model: Any) -> None:
    ids = torch.randint(1, 50, (1, 30))
    with sparse.enable("moba", block_size=4, top_k=2), torch.no_grad():
        model.set_attn_implementation("attnforge:moba")
        want, cache = model(ids).logits, transformers.DynamicCache()
        parts = [model(ids[:, a:b], past_key_values=cache).logits
                 for a, b in ((0, 21), (21, 22), (22, 23), (23, 30))]  # fmt: skip
    torch.testing.assert_close(torch.cat(parts, 1), want, rtol=1e-4, atol=1e-5)


def test_gradients_reach_the_model(model: Any) -> None:
    ids = torch.randint(1, 50, (1, 30))
    with sparse.enable("mean", **SMALL):
        model.set_attn_implementation("attnforge:mean")
        model(ids, labels=ids).loss.backward()
    weight = model.model.layers[0].self_attn.k_proj.weight
    assert weight.grad is not None
    assert bool(weight.grad.any())
    model.zero_grad()


def test_distilled_gates_find_more(model: Any) -> None:
    """A few steps: the loss falls, a seed says what is learned, the model stays as it is."""
    rows = torch.randint(1, 50, (2, 64))
    before = {name: p.clone() for name, p in model.named_parameters()}
    model.set_attn_implementation("attnforge")
    runs = []
    for _ in range(2):
        torch.manual_seed(1)
        gates = seer.make_gates(model, block_size=4)
        runs.append(seer.distil(model, gates, rows, steps=30, lr=3e-3, warmup=2))
    assert model.config._attn_implementation == "attnforge"
    assert runs[0] == runs[1]
    assert all(run[-1] < run[1] for run in runs[0])
    assert [len(run) for run in runs[0]] == [30, 30]
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())
    with sparse.enable("seer", **SMALL, gates=gates, rope_base=seer.rope_base(model)):
        model.set_attn_implementation("attnforge:seer")
        assert bool(model(rows).logits.isfinite().all())


def test_samples_are_the_layers_own(model: Any) -> None:
    """Keys before rotation are those of the projection, and the targets those of the definition."""
    row = torch.randint(1, 50, (24,))
    model.set_attn_implementation("attnforge")
    seen: list[Tensor] = []
    hook = model.model.layers[0].self_attn.k_proj.register_forward_hook(
        lambda _m, _i, out: seen.append(out)
    )
    gates = seer.make_gates(model, block_size=4)
    sample = seer.samples(model, gates, [row])[0][0]
    hook.remove()
    torch.testing.assert_close(sample.k.flatten(2), seen[0], rtol=1e-5, atol=1e-5)
    assert sample.targets.shape == (1, 4, 6, 6)
    torch.testing.assert_close(sample.targets.sum(-1), torch.ones(1, 4, 6))


def test_handles() -> None:
    mapping = transformers.AttentionInterface._global_mapping
    first = sparse.enable("moba")
    assert first.active
    second = sparse.enable("moba", top_k=4)
    assert not first.active
    first.remove()  # the name is the second's by now
    assert second.active
    second.remove()
    assert not second.active
    assert "attnforge:moba" not in mapping


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"method": "nothing"}, "no method 'nothing'; there are"),
        ({"method": EVERY}, 'want one like "attnforge:mine"'),
        ({"method": "moba", "name": "sdpa"}, "name is 'sdpa'"),
    ],
)
def test_names_that_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sparse.enable(**arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dropout": 0.1}, "attention dropout 0.1"),
        ({"cu_seq_lens_q": torch.tensor([0, 22])}, "cu_seq_lens_q is not supported"),
        ({"sliding_window": 5}, "not plain causal"),
        ({"is_causal": False}, "not plain causal"),
    ],
)
def test_what_is_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sparse.SparseAttention(EVERY)(Layer(), *heads(), None, **arguments)


def test_rotations_that_are_refused(model: Any) -> None:
    config = transformers.LlamaConfig(rope_parameters={"rope_type": "linear", "factor": 2.0,
                                                       "rope_theta": 1e4})  # fmt: skip
    with pytest.raises(ValueError, match="want rope_type 'default'"):
        seer.rope_base(type("Model", (), {"config": config}))
    assert seer.rope_base(model) == 10000.0
