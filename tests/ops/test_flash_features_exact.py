"""Features of single scores where something must hold exactly: choices, masks, poison, order."""

from __future__ import annotations

import itertools
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import attnforge
from attnforge import _native
from attnforge.reference.scores import dropout_keep
from attnforge.testing.cases import FlashCase, Target
from attnforge.testing.compare import assert_same, compare
from attnforge.testing.oracle_mods import philox_words
from attnforge.testing.poison import guarded

pytestmark = pytest.mark.thinned(3)

# Every form of every feature.
EVERY = (
    *("windows", "prefix", "segments", "mask", "mask:bh", "mask:tree", "key_bias", "key_bias:bh"),
    *("bias", "bias:bh", "rel_bias", "rel_bias:100", "log_forget", "log_forget:h", "row_scale"),
    *("dropout", "rope:part", "rope:interleaved", "rope:heads-at", "score_fn:softplus"),
)
INF, NAN = math.inf, math.nan
LOW = 0xFFFFFFFF


def seen_by(target: Target, heads: int, sq: int, sk: int, **options: Any) -> torch.Tensor:
    """[heads, sq, sk] weights of equal logits: V is one-hot over the keys."""
    width = -(-sk // 8) * 8
    q, k = torch.zeros(1, sq, heads, 8), torch.zeros(1, sk, 1, 8)
    v = torch.eye(sk, width).view(1, sk, 1, width)
    out = attnforge.flash_attention(q, k, v, backend=target.backend, **options)
    return out[0, :, :, :sk].transpose(0, 1)


# ---- dropout ----


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((LOW,) * 4, (LOW, LOW), (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        ((0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), (0xA4093822, 0x299F31D0),
         (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1)),
    ],
)  # fmt: skip
def test_philox_known_answers(
    counter: tuple[int, ...], key: tuple[int, int], words: tuple[int, ...]
) -> None:
    """The vectors published with Random123."""
    got = philox_words([torch.tensor(c) for c in counter], key)
    assert tuple(int(x) for x in got) == words


@pytest.mark.parametrize("sq", [1, 3, 50])
@pytest.mark.parametrize("p", [0.1, 0.5, 0.999, 1e-12, 1 - 1e-12])
def test_dropout_drops_what_the_reference_drops(level: Target, sq: int, p: float) -> None:
    seed, offset, sk, heads = (1 << 61) + 12345, (1 << 40) + 77, 333, 3
    got = seen_by(level, heads, sq, sk, dropout_p=p, dropout_seed=seed, dropout_offset=offset)
    head, row, key = (
        torch.arange(heads).view(-1, 1, 1),
        torch.arange(sq).view(-1, 1),
        torch.arange(sk),
    )
    want = dropout_keep(p, torch.tensor([seed, offset]), head, row, key)
    assert torch.equal(got != 0, want)


@pytest.mark.parametrize("sq", [2, 40])
def test_dropout_counts_batches_and_places_in_a_sequence(level: Target, sq: int) -> None:
    case = FlashCase(batch=3, seqlen_q=sq, seqlen_k=70, heads_q=2, mods=("dropout",))
    dense = case.make()
    flat = {n: getattr(dense, n).flatten(0, 1) for n in ("q", "k", "v")}
    ends = {f"cu_seqlens_{s}": torch.arange(4, dtype=torch.int32) * n
            for s, n in (("q", sq), ("k", 70))}  # fmt: skip
    packed = attnforge.flash_attention_varlen(*flat.values(), **ends, **{
        n: x for n, x in dense.options.items() if n.startswith("dropout")})  # fmt: skip
    assert torch.equal(packed.view_as(dense.q), dense.forward("cpu")["out"])


def test_dropout_keeps_the_mean(level: Target) -> None:
    q, k, v = torch.zeros(1, 64, 2, 8), torch.zeros(1, 200, 2, 8), torch.ones(1, 200, 2, 8)
    out = attnforge.flash_attention(q, k, v, dropout_p=0.25, dropout_seed=5, backend="cpu")
    spread = math.sqrt(0.25 / 0.75 / 200)  # of one row's mean weight
    assert abs(float(out[..., 0].mean()) - 1) < 5 * spread / math.sqrt(128)
    assert 0.7 * spread < float(out[..., 0].std()) < 1.3 * spread
    again = attnforge.flash_attention(q, k, v, dropout_p=0.25, dropout_seed=5, backend="cpu")
    other = attnforge.flash_attention(q, k, v, dropout_p=0.25, dropout_seed=6, backend="cpu")
    later = attnforge.flash_attention(
        q, k, v, dropout_p=0.25, dropout_seed=5, dropout_offset=1, backend="cpu"
    )
    assert torch.equal(out, again)
    assert not torch.equal(out, other)
    assert not torch.equal(out, later)


# ---- masks ----


@pytest.mark.parametrize("sq", [1, 5, 60])
def test_masks_hide_exactly(target: Target, sq: int) -> None:
    sk = 77
    mask = torch.rand(1, 2, sq, sk, generator=torch.Generator().manual_seed(0)) > 0.5
    assert torch.equal(seen_by(target, 2, sq, sk, mask=mask) != 0, mask[0])
    tree = mask[..., :sq] if sq < sk else mask
    got = seen_by(target, 2, sq, sk, mask=tree) != 0
    assert got[..., : sk - sq].all()
    assert torch.equal(got[..., sk - sq :], tree[0])
    ids_q, ids_k = torch.arange(sq, dtype=torch.int32) % 3, torch.arange(sk, dtype=torch.int32) % 4
    got = seen_by(target, 1, sq, sk, segment_ids_q=ids_q[None], segment_ids_k=ids_k[None]) != 0
    assert torch.equal(got[0], ids_q[:, None] == ids_k)


@pytest.mark.parametrize("rows", [1, 6, 100])
@pytest.mark.parametrize("mod", ["mask", "segments", "bias"])
def test_rows_that_see_nothing(target: Target, mod: str, rows: int) -> None:
    """By a mask, by ids, by a bias of -inf: O 0, LSE -inf, gradients 0."""
    inputs = FlashCase(seqlen_q=rows, seqlen_k=90, heads_q=4, heads_k=2).make()
    options: dict[str, Any] = {}
    dead = torch.arange(rows) % 3 == 0
    if mod == "mask":
        options["mask"] = ~dead.view(1, 1, -1, 1).expand(1, 1, rows, 90)
    elif mod == "segments":
        options = {"segment_ids_q": torch.where(dead, -5, 0).int().expand(2, -1),
                   "segment_ids_k": torch.arange(90).remainder(2).int().expand(2, -1)}  # fmt: skip
    else:
        bias = torch.zeros(1, 1, rows, 90)
        bias[:, :, dead] = -INF
        options["bias"] = bias
    inputs = inputs.with_(**options)
    got = inputs.run(target.backend)
    assert (got["lse"][..., dead] == -INF).all()
    assert got["lse"][..., ~dead].isfinite().all()
    assert not got["out"][:, dead].any()
    assert not got["dq"][:, dead].any()
    assert all(x.isfinite().all() for n, x in got.items() if n != "lse")
    if mod != "bias":  # whose dS the truth calls NaN
        compare(got, inputs.truth(), mod).check()


@pytest.mark.parametrize("rows", [2, 8, 150])
def test_empty_bounds(target: Target, rows: int) -> None:
    """Bounds of rows that stand before the first key, in whole tiles and beside others."""
    inputs = FlashCase(seqlen_q=rows, seqlen_k=rows // 2, heads_q=4, heads_k=2, causal=True).make()
    inputs = inputs.with_(window_size=torch.tensor([[2, 0], [-1, 0]] * 2, dtype=torch.int32))
    got = inputs.run(target.backend)
    compare(got, inputs.truth(), inputs.context).check()
    assert (got["lse"][..., : rows // 2] == -INF).all()
    assert not got["dq"][:, : rows // 2].any()


@pytest.mark.parametrize("poison", [NAN, INF])
@pytest.mark.parametrize("sq", [1, 3, 70])
@pytest.mark.parametrize("mod", ["mask", "mask:bh", "mask:tree", "segments", "windows"])
def test_hidden_keys_may_hold_anything(target: Target, mod: str, sq: int, poison: float) -> None:
    """NaN or infinity in a key reaches exactly the rows that see it."""
    inputs = FlashCase(batch=1, seqlen_q=sq, seqlen_k=140, heads_q=2, mods=(mod,)).make()
    weights = inputs.truth(grad=False)
    place = 135
    hit = _rows_that_see(inputs, place)
    assert mod != "mask" or sq == 1 or (hit.any() and not hit.all())
    k, v = inputs.k.clone(), inputs.v.clone()
    for changed in ({"v": v}, {"k": k, "v": v}):
        for x in changed.values():
            x[:, place] = poison
        clean, got = inputs.run(target.backend), inputs.with_(**changed).run(target.backend)
        for name in ("out", "dq"):
            a, b = (x[name][0].transpose(0, 1)[~hit] for x in (clean, got))
            torch.testing.assert_close(b, a, rtol=2e-5, atol=2e-6)
        assert got["out"][0].transpose(0, 1)[hit].isfinite().logical_not().any(-1).all()
        others = [j for j in range(140) if j != place]
        if not hit.any():
            for name in ("dk", "dv"):
                torch.testing.assert_close(got[name][:, others], clean[name][:, others],
                                           rtol=2e-5, atol=2e-6)  # fmt: skip
                assert not got[name][:, place].any()
    assert weights.values["out"].isfinite().all()


def _rows_that_see(inputs: Any, key: int) -> torch.Tensor:
    """[H, Sq] bool."""
    zero, one = torch.zeros_like(inputs.v), torch.zeros_like(inputs.v)
    one[:, key] = 1
    probe = inputs.with_(q=torch.zeros_like(inputs.q), v=one)
    seen = probe.truth(grad=False).values["out"] - inputs.with_(v=zero).truth(False).values["out"]
    return seen[0, :, :, 0].transpose(0, 1) != 0


# ---- numbers ----


@pytest.mark.parametrize("sq", [1, 2000])
def test_strong_gates_forget_without_losing_near_keys(level: Target, sq: int) -> None:
    """Cumulative gates reach -2000, where fp32 knows 1e-4: differences must not go through it."""
    g = torch.Generator().manual_seed(0)
    sk = 2000
    q, k, v = (torch.randn(1, n, 1, 16, generator=g) for n in (sq, sk, sk))
    gates = -2 * torch.rand(1, sk, 1, generator=g)
    out, lse = attnforge.flash_attention(
        q, k, v, causal=True, log_forget=gates, return_lse=True, backend="cpu"
    )
    c = gates[0, :, 0].double().cumsum(0)
    s = q[0, :, 0].double() @ k[0, :, 0].double().T / 4 + (c[sk - sq :, None] - c)
    s = s.masked_fill(torch.arange(sk) > torch.arange(sk - sq, sk)[:, None], -INF)
    torch.testing.assert_close(lse[0, 0].double(), s.logsumexp(-1), rtol=0, atol=3e-6)
    want = torch.softmax(s, -1) @ v[0, :, 0].double()
    torch.testing.assert_close(out[0, :, 0].double(), want, rtol=0, atol=5e-6)


@pytest.mark.parametrize("fn", ["sigmoid", "relu", "softplus", "signed_softmax"])
@pytest.mark.parametrize("sq", [2, 40])
def test_saturated_score_functions(target: Target, fn: str, sq: int) -> None:
    for spread in (30.0, 1000.0):
        inputs = FlashCase(seqlen_q=sq, seqlen_k=70, spread=spread, mods=(f"score_fn:{fn}",)).make()
        got = inputs.run(target.backend)
        assert all(x.isfinite().all() for x in got.values())
        compare(got, inputs.truth(), inputs.context).check()


def test_softplus_of_one_key(level: Target) -> None:
    """LSE = log softplus(s), from the tail where softplus is e^s to where it is s."""
    s = torch.cat([torch.linspace(-80, 80, 4001), torch.linspace(-2, 2, 4001)])
    q = torch.zeros(1, s.numel(), 1, 8)
    q[0, :, 0, 0] = s
    k = torch.zeros(1, 1, 1, 8)
    k[..., 0] = 1
    _, lse = attnforge.flash_attention(
        q, k, k, softmax_scale=1.0, score_fn="softplus", return_lse=True, backend="cpu"
    )
    wide = s.double()
    want = torch.nn.functional.softplus(wide, threshold=1e9).log()
    error = (lse[0, 0].double() - want).abs() / (1 + wide.abs() + want.abs())
    assert float(error.max()) < 4 * 2.0**-23


@pytest.mark.parametrize("dv", [264, 512, 1024])
@pytest.mark.parametrize("sq", [2, 33])
def test_wide_values(level: Target, dv: int, sq: int) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        inputs = FlashCase(batch=1, seqlen_q=sq, seqlen_k=70, heads_q=2, heads_k=1, head_dim=64,
                           v_head_dim=dv, dtype=dtype, causal=True).make()  # fmt: skip
        compare(inputs.run("cpu"), inputs.truth(), inputs.context).check()


@pytest.mark.parametrize("mods", [
    ("bias:bh", "rel_bias:h", "key_bias", "dropout"),
    ("bias:b", "log_forget", "row_scale", "rope:heads-at"),
    ("bias:h", "mask", "score_fn:softplus"),
])  # fmt: skip
@pytest.mark.parametrize("rows", [2, 150])
def test_threads_do_not_matter(level: Target, mods: tuple[str, ...], rows: int) -> None:
    case = FlashCase(batch=3, seqlen_q=rows, seqlen_k=200, heads_q=4, heads_k=2, mods=mods)
    results = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        results.append(case.make().run("cpu"))
    assert_same(results[0], results[1])


def test_bias_gradients_add_up_over_what_is_broadcast(level: Target) -> None:
    whole = FlashCase(batch=2, seqlen_q=40, seqlen_k=50, heads_q=4, heads_k=2).make()
    for b, h in itertools.product((1, 2), (1, 4)):
        bias = torch.randn(b, h, 40, 50)
        one = whole.with_(bias=bias).run("cpu")["dbias"]
        full = whole.with_(bias=bias.expand(2, 4, 40, 50).contiguous()).run("cpu")["dbias"]
        torch.testing.assert_close(one, full.sum_to_size(one.shape), rtol=1e-5, atol=1e-6)


def test_nothing_asked_is_nothing_changed(level: Target) -> None:
    """Neutral features give the same bits as none."""
    inputs = FlashCase(seqlen_q=60, seqlen_k=90, heads_q=4, heads_k=2).make()
    want = inputs.run("cpu")
    for options in ({"row_scale": torch.ones(1, 1, 60)}, {"key_bias": torch.zeros(1, 1, 90)},
                    {"rel_bias": torch.zeros(1, 3)}, {"bias": torch.zeros(1, 1, 60, 90)},
                    {"dropout_p": 1e-12, "dropout_seed": 1},
                    {"window_size": torch.full((4, 2), -1, dtype=torch.int32)}):  # fmt: skip
        got = inputs.with_(**options).run("cpu")
        assert_same({n: got[n] for n in want}, want, str(options.keys()))


# ---- memory: what the native operator refuses, what it reads ----

_ORDER = ("row_bounds", "mask", "segments_q", "segments_k", "key_bias", "bias", "rel_bias", "decay",
          "row_scale", "rope_cos", "rope_sin", "positions_q", "positions_k", "rng", "qk_descale",
          "v_descale")  # fmt: skip


@pytest.mark.parametrize(
    ("name", "tensor"),
    [
        ("row_bounds", torch.zeros(2, 2, 8, 2, dtype=torch.int32)),
        ("mask", torch.ones(2, 2, 9, 13, dtype=torch.bool)),
        ("mask", torch.ones(2, 2, 9, 12)),
        ("segments_q", torch.zeros(2, 9, dtype=torch.int32)),
        ("key_bias", torch.zeros(2, 2, 11)),
        ("key_bias", torch.zeros(2, 2, 12).double()),
        ("bias", torch.zeros(2, 2, 9, 11)),
        ("bias", torch.zeros(2, 2, 9, 12).half()),
        ("rel_bias", torch.zeros(2, 4)),
        ("decay", torch.zeros(2, 3, 12).double()),
        ("row_scale", torch.zeros(2, 2, 12)),
        ("rope_cos", torch.zeros(1, 4, 4)),
        ("rng", torch.zeros(3, dtype=torch.int64)),
        ("v_descale", torch.ones(2, 1)),
    ],
)
def test_native_operator_checks_shapes(cpu: str, name: str, tensor: torch.Tensor) -> None:
    q, k = torch.zeros(2, 9, 2, 8), torch.zeros(2, 12, 2, 8)
    mods: list[torch.Tensor | None] = [None] * len(_ORDER)
    mods[_ORDER.index(name)] = tensor
    with pytest.raises(RuntimeError, match="attnforge_native: "):
        torch.ops.attnforge_native.flash_decode(
            q, k, k, None, None, None, torch.empty_like(q), torch.empty(2, 2, 9), 1.0, -1, -1, 0.0,
            mods, "softmax", 0.1, False, 0, [],
        )  # fmt: skip


def guard_everything(isa: str) -> None:
    """Body of the subprocesses of ``test_mods_beside_unmapped_pages``."""
    _native.isa(isa)
    for mod in EVERY:
        for rows, keys in ((1, 37), (37, 61), (70, 131)):
            case = FlashCase(seqlen_q=rows, seqlen_k=keys, heads_q=4, heads_k=2, mods=(mod,))
            inputs = case.make()
            for side in ("end", "start"):
                print(isa, mod, rows, side, flush=True)
                changed: dict[str, Any] = {
                    n: guarded(x, side)
                    for n, x in inputs.options.items()
                    if isinstance(x, torch.Tensor)
                }
                if "rope" in inputs.options:
                    changed["rope"] = tuple(guarded(x, side) for x in inputs.options["rope"])
                assert_same(inputs.with_(**changed).run("cpu"), inputs.run("cpu"))
    print("all inside", flush=True)


def test_mods_beside_unmapped_pages(level: Target) -> None:
    """Every tensor of every feature ends, and starts, at a guard page: else SIGSEGV."""
    code = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "from test_flash_features_exact import guard_everything; guard_everything(sys.argv[2])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(Path(__file__).parent), level.isa],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.stdout.endswith("all inside\n"), (done.returncode, done.stdout[-99:], done.stderr)


def test_positions_and_bounds_are_clamped(level: Target) -> None:
    far = torch.tensor([-(2**31), 2**31 - 1, -1, 5], dtype=torch.int32)
    inputs = FlashCase(seqlen_q=40, seqlen_k=40, mods=("rope:at",)).make()
    for n in ("positions_q", "positions_k"):
        inputs = inputs.with_(**{n: far.repeat(2, 10)})
    compare(inputs.run("cpu"), inputs.truth(), inputs.context).check()
    wide = inputs.with_(prefix_lens=torch.tensor([2**31 - 1, -(2**31)], dtype=torch.int32))
    out = wide.with_(causal=True).forward("cpu")["out"]
    assert out.isfinite().all()
