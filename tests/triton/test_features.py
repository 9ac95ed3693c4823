"""Features of single scores in the Triton kernels, within the bounds of the float64 truth."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import triton
import triton.language as tl

import attnforge
from attnforge._params import KV_CODES, FlashMods, FlashParams
from attnforge.backends.triton import _flash_grads, _flash_mods, flash
from attnforge.reference.scores import dropout_keep, rotate
from attnforge.registry import list_kernels
from attnforge.testing.cases import FlashCase
from attnforge.testing.compare import compare
from attnforge.triton_kernels.mods import narrow_keys, narrow_rows

pytestmark = pytest.mark.thinned(3)

MASKS = ("windows", "prefix", "segments", "mask:b", "mask:treeh")
BIASES = ("key_bias", "key_bias:bh", "bias", "bias:bhw", "rel_bias:h", "rel_bias:0",
          "rel_bias:100", "log_forget")  # fmt: skip
OTHERS = ("row_scale:b", "dropout", "rope", "rope:part-interleaved", "rope:heads-at")
SCORE_FNS = tuple(f"score_fn:{f}" for f in ("sigmoid", "relu", "softplus", "signed_softmax"))
EVERY = (*MASKS, *BIASES, *OTHERS, *SCORE_FNS)
# Packed calls take all but mask and bias.
PACKED = tuple(x for x in EVERY if not x.startswith(("mask", "bias")))


@pytest.mark.parametrize("mod", EVERY)
def test_alone(check: Any, mod: str) -> None:
    check(FlashCase(seqlen_q=20, seqlen_k=37, heads_q=2, heads_k=1, head_dim=8, mods=(mod,)))


@pytest.mark.parametrize("mod", ["windows", "mask:treeh", "key_bias", "bias", "rel_bias:h",
                                 "log_forget", "row_scale:b", "dropout", *SCORE_FNS])  # fmt: skip
def test_in_16_bits(check: Any, mod: str) -> None:
    check(FlashCase(batch=1, seqlen_q=17, seqlen_k=36, heads_q=2, heads_k=1, head_dim=8,
                    dtype=torch.bfloat16, mods=(mod,)))  # fmt: skip


@pytest.mark.parametrize("mod", PACKED)
def test_packed(check: Any, mod: str) -> None:
    lengths = ((9, 20), (0, 5), (17, 12))
    used = (17, 0, 12) if len(mod) % 2 else None
    check(FlashCase(lengths=lengths, heads_q=2, heads_k=1, head_dim=8, used=used, mods=(mod,)))


@pytest.mark.parametrize("mod", EVERY)
def test_decode(check: Any, mod: str) -> None:
    case = FlashCase(seqlen_q=3, seqlen_k=70, heads_q=6, heads_k=2, used=(70, 37), decode=True,
                     mods=(mod,))  # fmt: skip
    check(case, grad=False, num_splits=2)


@pytest.mark.parametrize("mods", [
    ("mask", "segments", "windows"),
    ("key_bias:b", "bias:h", "rel_bias", "log_forget:h", "row_scale"),
    ("rope:heads-at", "row_scale", "dropout", "mask:b", "bias"),
    ("score_fn:signed_softmax", "dropout", "rel_bias", "rope"),
    ("score_fn:softplus", "mask:tree", "key_bias", "row_scale:b"),
], ids=lambda m: "+".join(m))  # fmt: skip
def test_together(check: Any, mods: tuple[str, ...]) -> None:
    check(FlashCase(seqlen_q=20, seqlen_k=50, heads_q=2, heads_k=1, alibi="head", mods=mods,
                    softcap=4.0, used=(50, 13)))  # fmt: skip


def test_rope_in_16_bits_rounds_turned_rows_once() -> None:
    """The forward of turned and rounded q and k, bit for bit."""
    inputs = FlashCase(batch=1, seqlen_q=17, seqlen_k=40, heads_k=2, dtype=torch.bfloat16,
                       mods=("rope:at",)).make()  # fmt: skip
    got = inputs.forward("triton")
    cos, sin = inputs.options["rope"]

    def turned(x: torch.Tensor, positions: str) -> torch.Tensor:
        wide, at = x.float().transpose(1, 2), inputs.options[positions]
        return rotate(wide, cos, sin, at, False).transpose(1, 2).bfloat16()

    q, k = turned(inputs.q, "positions_q"), turned(inputs.k, "positions_k")
    plain = FlashCase(batch=1, seqlen_q=17, seqlen_k=40, heads_k=2, dtype=torch.bfloat16).make()
    assert torch.equal(plain.v, inputs.v)
    assert torch.equal(plain.with_(q=q, k=k).forward("triton")["out"], got["out"])


def test_rope_turns_gradients_back_in_16_bits() -> None:
    """Within the rounding of turned rows of the reference, which does not round them."""
    inputs = FlashCase(batch=1, seqlen_q=17, seqlen_k=40, dtype=torch.float16,
                       mods=("rope:part",)).make()  # fmt: skip
    got, want = inputs.run("triton"), inputs.run("reference")
    for name in ("dq", "dk", "dv"):
        size = want[name].float().abs().max()
        assert (got[name].float() - want[name].float()).abs().max() < 4e-3 * size, name


@pytest.mark.parametrize("p", [0.3, 1 - 1e-12])
def test_dropout_drops_what_the_reference_drops(device: str, p: float) -> None:
    seed, offset, heads, sq, sk = (1 << 61) + 12345, (1 << 40) + 77, 2, 5, 200
    q, k = (torch.zeros(1, n, h, 8, device=device) for n, h in ((sq, heads), (sk, 1)))
    v = torch.eye(sk, device=device).view(1, sk, 1, sk)
    out = attnforge.flash_attention(
        q, k, v, dropout_p=p, dropout_seed=seed, dropout_offset=offset, backend="triton"
    )
    head, row = torch.arange(heads).view(-1, 1, 1), torch.arange(sq).view(-1, 1)
    want = dropout_keep(p, torch.tensor([seed, offset]), head, row, torch.arange(sk))
    assert torch.equal(out[0].transpose(0, 1).cpu() != 0, want)


@pytest.mark.parametrize("mod", ["mask", "segments", "bias"])
def test_rows_that_see_nothing(mod: str) -> None:
    """By a mask, by ids, by a bias of -inf: O 0, LSE -inf, gradients 0."""
    rows, keys = 20, 37
    inputs = FlashCase(seqlen_q=rows, seqlen_k=keys, heads_k=1, head_dim=8).make()
    dead = torch.arange(rows) % 3 == 0
    bias = torch.zeros(1, 1, rows, keys)
    bias[:, :, dead] = -math.inf
    options: dict[str, Any] = {
        "mask": {"mask": bias == 0},
        "segments": {"segment_ids_q": torch.where(dead, -5, 0).int().expand(2, -1),
                     "segment_ids_k": torch.zeros(2, keys, dtype=torch.int32)},
        "bias": {"bias": bias},
    }[mod]  # fmt: skip
    got = inputs.with_(**options).run("triton")
    assert (got["lse"][..., dead] == -math.inf).all()
    assert got["lse"][..., ~dead].isfinite().all()
    assert not got["out"][:, dead].any()
    assert not got["dq"][:, dead].any()
    assert all(x.isfinite().all() for name, x in got.items() if name != "lse")


@pytest.mark.parametrize("mod", ["mask", "segments", "windows", "rope"])
def test_hidden_nan_stays_hidden(check: Any, mod: str) -> None:
    """Keys that no row sees hold NaN, and rows see others of the same tile."""
    mods = ("rope",) if mod == "rope" else ()
    inputs = FlashCase(seqlen_q=20, seqlen_k=37, heads_k=1, head_dim=8, mods=mods).make()
    seen = torch.arange(37) % 2 == 0
    options: dict[str, Any] = {"mask": seen.expand(1, 1, 20, 37)}
    if mod == "segments":
        options = {"segment_ids_q": torch.zeros(2, 20, dtype=torch.int32),
                   "segment_ids_k": (~seen).int().expand(2, -1)}  # fmt: skip
    if mod == "windows":
        seen = torch.arange(37) >= 20
        options = {"window_size": torch.tensor([[-1, -1], [16, -1]], dtype=torch.int32),
                   "mask": seen.expand(1, 1, 20, 37)}  # fmt: skip
    clean = inputs.with_(**options)
    poison = torch.where(seen, 0.0, math.nan).view(1, -1, 1, 1)
    got = clean.with_(k=clean.k + poison, v=clean.v + poison).run("triton")
    truth = clean.truth(rounded=True)
    assert not got["dk"][:, ~seen].nan_to_num(0.0).any()
    compare({n: got[n] for n in ("out", "lse", "dq")}, truth, mod).check()


def test_visible_infinities_of_turned_keys_arrive() -> None:
    """The rows of a masked tile that see an infinite key get NaN as from the reference."""
    inputs = FlashCase(batch=1, seqlen_q=6, seqlen_k=12, heads_k=1, heads_q=1, causal=True,
                       mods=("rope",)).make()  # fmt: skip
    k = inputs.k.clone()
    k[:, 8, :, 3] = math.inf
    got, want = (inputs.with_(k=k).run(backend) for backend in ("triton", "reference"))
    for name in ("out", "dq"):
        assert torch.equal(got[name].isnan(), want[name].isnan()), name
    assert want["dq"].isnan().any()
    assert not want["dq"].isnan().all()


@triton.jit
def narrowed(mods, result, rows, keys, BLOCK: tl.constexpr):
    """result [2, tiles, 2]: the keys that a tile of rows walks, the rows that one of keys walks."""
    first = tl.program_id(0) * BLOCK
    place = (0, 0, 0, 0, rows, keys, 0)
    at = (first + tl.arange(0, BLOCK))[:, None]
    lo, _, _, hi = narrow_keys((0, 0, keys, keys), at, mods, place, BLOCK)
    spot = result + tl.program_id(0) * 2
    tl.store(spot, lo)
    tl.store(spot + 1, hi)
    lo, _, _, hi = narrow_rows((0, 0, rows, rows), first, first + BLOCK - 1, mods, place, BLOCK)
    spot += tl.num_programs(0) * 2
    tl.store(spot, lo)
    tl.store(spot + 1, hi)


def test_row_bounds_narrow_what_is_walked(device: str) -> None:
    """Documents of 64 and 40 in tiles of 16: each tile of either side walks its own document."""
    ends = torch.tensor([0, 64, 104])
    document = torch.searchsorted(ends, torch.arange(104), right=True)
    bounds = torch.stack((ends[document - 1], ends[document]), -1).int().view(1, 1, 104, 2)
    p = FlashParams(*[None] * 5, 104, 104, 1.0, -1, -1, 0.0)
    got = torch.zeros(2, 7, 2, dtype=torch.int32, device=device)
    p = p._replace(mods=FlashMods(bounds.to(device)))
    narrowed[(7,)](_flash_mods.mods(p, 1), got, 104, 104, BLOCK=16)
    assert got[0].tolist() == [[0, 64]] * 4 + [[64, 104]] * 3
    assert torch.equal(got[1], got[0])


def test_gates_behind_a_shut_one_keep_their_digits() -> None:
    """Sums of gates are larger than what is left of them by a factor of 10^4."""
    inputs = FlashCase(batch=1, seqlen_q=20, seqlen_k=37, heads_k=1, head_dim=8,
                       mods=("log_forget",)).make()  # fmt: skip
    gates = inputs.options["log_forget"].clone()
    gates[:, 20] = -1e4
    inputs = inputs.with_(log_forget=gates)
    compare(inputs.run("triton"), inputs.truth(rounded=True), inputs.context).check()


@pytest.mark.parametrize("packed", [False, True])
def test_gates_of_rows_before_all_keys(packed: bool) -> None:
    """A prefix shows them keys; their own gate is that of the first key, as in the reference."""
    shape: dict[str, Any] = {"batch": 2, "seqlen_q": 9, "seqlen_k": 6}
    if packed:
        shape = {"lengths": ((9, 6), (4, 5), (3, 0), (8, 3))}
    inputs = FlashCase(heads_q=2, heads_k=1, head_dim=8, mods=("log_forget", "prefix"),
                       **shape).make()  # fmt: skip
    got, want = (inputs.run(backend)["dlog_forget"] for backend in ("triton", "reference"))
    assert torch.allclose(got, want, atol=1e-5)


def test_large_relative_bias_goes_head_by_head(check: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flash, "_SKEWED", 1)
    check(FlashCase(batch=1, seqlen_q=20, seqlen_k=30, heads_q=2, head_dim=8, mods=("rel_bias",)))


@pytest.mark.parametrize("radius", [0, 1, 3, 40])
def test_sums_by_distance(radius: int) -> None:
    rows, keys = 5, 7
    each = torch.arange(rows + keys).double().view(1, -1)
    got = _flash_grads.by_distance(each, keys, radius)
    want = torch.zeros_like(got)
    for column in range(rows + keys):
        distance = column + 1 - keys
        want[0, min(max(distance, -radius), radius) + radius] += column
    assert torch.equal(got, want)


@pytest.mark.parametrize("fields", [
    {"mods": ("descale",), "causal": True},
    {"mods": ("descale:kvb", "out:float16"), "q_dtype": torch.float32},
    {"mods": ("descale:kv", "bias:w"), "q_dtype": torch.float16},
    {"mods": ("descale",), "lengths": ((9, 20), (0, 5), (17, 12))},
    {"mods": ("descale:one", "key_bias"), "decode": True, "seqlen_q": 3, "used": (37, 20)},
    {"mods": ("descale:kv",), "decode": True, "seqlen_q": 1, "q_dtype": torch.bfloat16},
], ids=lambda fields: "-".join(fields["mods"]))  # fmt: skip
def test_fp8(check: Any, fields: dict[str, Any]) -> None:
    shape = {"seqlen_q": 20, "seqlen_k": 37, "heads_q": 4, "heads_k": 2, "head_dim": 8}
    case = FlashCase(**{**shape, "dtype": torch.float8_e4m3fn, **fields})
    check(case, grad=False, **({"num_splits": 2} if case.decode else {}))


def test_every_code_of_fp8(device: str) -> None:
    v = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).view(1, 1, 1, 256).to(device)
    q = k = torch.zeros(1, 1, 1, 8, device=device).to(v.dtype)
    out = attnforge.flash_attention(q, k, v, out_dtype=torch.float32, backend="triton")
    assert torch.equal(out.nan_to_num(-1.0), v.float().nan_to_num(-1.0))


@pytest.mark.parametrize("score_fn", ["sigmoid", "relu", "softplus", "signed_softmax"])
@pytest.mark.parametrize("num_splits", [1, 3])
def test_decode_of_score_functions(check: Any, score_fn: str, num_splits: int) -> None:
    """Splits and rows that see nothing, beside others that do; 16-bit values."""
    check(FlashCase(seqlen_q=4, seqlen_k=100, heads_q=4, heads_k=2, used=(100, 2), causal=True,
                    decode=True, dtype=torch.bfloat16, mods=(f"score_fn:{score_fn}",)),
          grad=False, num_splits=num_splits)  # fmt: skip


@pytest.mark.parametrize("op", ["flash_fwd", "flash_bwd", "flash_decode"])
def test_what_serves_which_feature(op: str) -> None:
    spec = next(s for s in list_kernels(op) if s.backend == "triton")
    text = " ".join(map(str, spec.requires))
    of_pages = {f"kv_{code}" for code in KV_CODES.values()}
    for feature in (
        *(_flash_mods.HEAVY - of_pages),
        "row_bounds",
        "segments",
        "key_bias",
        "row_scale",
    ):
        assert feature in text
