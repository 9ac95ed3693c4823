"""LSH: codes, tables, retrieval, probabilities against theory, estimators against their means."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import attnforge
from attnforge import LSHIndex
from attnforge.reference.lsh import inclusion
from attnforge.testing.cases import Target
from attnforge.testing.compare import same_bits

OPS = torch.ops.attnforge


def encode(x: Tensor, planes: Tensor, bits: int, tables: int, backend: str) -> Tensor:
    codes: Tensor = OPS.lsh_encode(x, None, planes, bits, tables, backend)
    return codes


def tables(n: int, size: int, bits: int, count: int, segments: int = 1) -> tuple[Tensor, Tensor]:
    shape = (1, 1, segments, count)
    starts = torch.zeros(*shape, (1 << bits) + 1, dtype=torch.int32)
    return starts, torch.zeros(*shape, size, dtype=torch.int16)


@pytest.mark.parametrize("bits", [1, 4, 10, 15])
@pytest.mark.parametrize("count", [1, 3, 150])
def test_codes_are_signs(target: Target, bits: int, count: int) -> None:
    x = torch.randint(-3, 4, (2, 61, 2, 24)).float()  # exact sums
    planes = torch.randint(-4, 5, (24, bits * count)).float()
    mean = torch.randint(-2, 3, (2, 2, 24)).float()
    got = OPS.lsh_encode(x, mean, planes, bits, count, target.backend)
    signs = ((x - mean.unsqueeze(1)).transpose(1, 2) @ planes > 0).unflatten(-1, (count, bits))
    want = (signs * 2 ** torch.arange(bits)).sum(-1)
    assert torch.equal(got.long(), want)


def test_codes_of_opposite_and_scaled_vectors(target: Target) -> None:
    x, planes = torch.randn(1, 40, 1, 32), torch.randn(32, 90)
    codes = encode(x, planes, 9, 10, target.backend)
    assert torch.equal(encode(-x, planes, 9, 10, target.backend), 511 - codes)
    assert torch.equal(encode(x * 2.0**-60, planes, 9, 10, target.backend), codes)
    assert not encode(0 * x, planes, 9, 10, target.backend).any()


@pytest.mark.parametrize("bits", [0, 1, 5, 15])
@pytest.mark.parametrize("n", [0, 1, 17, 300])
def test_tables_hold_every_key_once(target: Target, bits: int, n: int) -> None:
    codes = torch.randint(0, 1 << bits, (1, 1, n, 3), dtype=torch.int16)
    starts, ids = tables(n, 128, bits, 3, segments=3)
    first, count = torch.tensor([0]).int(), torch.tensor([n]).int()
    OPS.lsh_insert(starts, ids, bits, codes, first, count, target.backend)
    for s in range(3):
        span = codes[0, 0, s * 128 : (s + 1) * 128]
        for t in range(3):
            own, where = ids[0, 0, s, t].long() & 0xFFFF, starts[0, 0, s, t].long()
            assert int(where[-1]) == span.shape[0]
            assert torch.equal(own[: span.shape[0]], span[:, t].argsort(stable=True))
            sizes = torch.bincount(span[:, t].long(), minlength=1 << bits)
            assert torch.equal(where.diff(), sizes)


def test_growth_and_rollback(target: Target) -> None:
    codes = torch.randint(0, 32, (1, 1, 200, 4), dtype=torch.int16)
    whole, parts = tables(200, 256, 5, 4), tables(200, 256, 5, 4)

    def put(where: tuple[Tensor, Tensor], lo: int, hi: int) -> None:
        at = (torch.tensor([lo]).int(), torch.tensor([hi - lo]).int())
        OPS.lsh_insert(*where, 5, codes[:, :, lo:hi].contiguous(), *at, target.backend)

    put(whole, 0, 200)
    for lo, hi in ((0, 1), (1, 90), (90, 90), (90, 199), (199, 200)):
        put(parts, lo, hi)
    assert torch.equal(whole[0], parts[0])
    assert torch.equal(whole[1][..., :200], parts[1][..., :200])
    OPS.lsh_truncate(*parts, 5, torch.tensor([90]).int(), target.backend)
    fresh = tables(200, 256, 5, 4)
    put(fresh, 0, 90)
    assert torch.equal(fresh[0], parts[0])
    assert torch.equal(fresh[1][..., :90], parts[1][..., :90])


@pytest.mark.parametrize("bits", [0, 1, 6, 15])
def test_codes_out_of_range_count_by_their_low_bits(target: Target, bits: int) -> None:
    n, count = 200, 3
    wild = torch.randint(-(1 << 15), 1 << 15, (1, 1, n, count), dtype=torch.int16)
    wild[0, 0, :4, 0] = torch.tensor([-1, -(1 << 15), (1 << 15) - 1, (1 << bits) % (1 << 15)])
    tame = (wild.int() & ((1 << bits) - 1)).short()
    at = (torch.tensor([0]).int(), torch.tensor([n]).int())
    built = []
    for codes in (wild, tame):
        starts, ids = tables(n, 256, bits, count)
        OPS.lsh_insert(starts, ids, bits, codes, *at, target.backend)
        built.append((starts, ids))
    assert torch.equal(built[0][0], built[1][0])
    assert torch.equal(built[0][1], built[1][1])

    k, q = torch.randn(1, n, 1, 8), torch.randn(1, 1, 1, 8)
    norms = k.norm(dim=-1).transpose(1, 2).contiguous()
    for row in (0, 1, 2, 3, 77):
        found = [
            OPS.lsh_retrieve(*built[1], bits, codes[:, :, row].contiguous(), q, k, None, norms,
                             *at, 1, 0.0, target.backend)
            for codes in (wild, tame)
        ]  # fmt: skip
        used = int(found[1][1])
        assert used >= 1  # the key whose code this is
        for got, want in zip(found[0], found[1], strict=True):
            assert torch.equal(got.flatten()[:used], want.flatten()[:used])


@pytest.mark.parametrize("min_hits", [1, 2])
def test_retrieval_is_the_brute_force_mask(target: Target, min_hits: int) -> None:
    k, v = torch.randn(2, 700, 2, 16), torch.randn(2, 700, 2, 16)
    index = LSHIndex(k, v, num_bits=4, num_tables=9, sink=3, window=20, min_hits=min_hits,
                     lengths=torch.tensor([700, 411]).int(), backend=target.backend)  # fmt: skip
    q = torch.randn(2, 1, 6, 16)
    ids, lens, bias = index.retrieve(q)
    keys = index.encode(k, index.mean).long()
    queries = index.encode(q).long()
    for b, n in enumerate((700, 411)):
        for h in range(6):
            hits = (keys[b, h // 3] == queries[b, h, 0]).sum(-1)
            want = (hits >= min_hits).nonzero().flatten()
            want = want[(want >= 3) & (want < n - 20)]
            assert ids[b, h, : lens[b, h]].tolist() == want.tolist()
            centred = k[b, want, h // 3] - index.mean[b, h // 3]  # type: ignore[index]
            cosine = torch.cosine_similarity(centred.double(), q[b, 0, h].double(), -1)
            u = inclusion(cosine, 4, 9, min_hits)
            torch.testing.assert_close(bias[b, h, : lens[b, h]].double(), -u.log(), rtol=1e-3,
                                       atol=1e-4)  # fmt: skip


@pytest.mark.parametrize("preset", [(10, 150), (8, 75), (4, 16), (1, 2), (15, 300)])
def test_probabilities(preset: tuple[int, int]) -> None:
    """The stable formula against the binomial tail with 60 digits of exponent room."""
    bits, count = preset
    cosine = torch.linspace(-1, 1, 401, dtype=torch.float64)
    got = inclusion(cosine, bits, count)
    p = (1 - torch.acos(cosine) / math.pi).clamp(0, 1) ** bits
    want = torch.zeros_like(p)
    for j in range(2, count + 1):
        log_choose = math.lgamma(count + 1) - math.lgamma(j + 1) - math.lgamma(count - j + 1)
        term = log_choose + j * p.log() + (count - j) * torch.log1p(-p)
        want += torch.where(p < 1, term.exp(), float(j == count))
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-300)
    assert float(got[-1]) == 1.0
    assert bool((got.diff() >= -1e-12).all())


@pytest.mark.parametrize("cosine", [0.0, 0.3, 0.5, 0.8])
def test_collisions_follow_theory(cpu: str, cosine: float) -> None:
    """4000 draws of the tables through the real hash: the share of events against u, |z| < 4.5."""
    draws, bits, count, dim = 4000, 4, 16, 16
    x = torch.zeros(1, 2, 1, dim)
    x[0, :, 0, 0] = 1.0
    x[0, 1, 0, 0], x[0, 1, 0, 1] = cosine, math.sqrt(1 - cosine**2)
    planes = torch.randn(dim, draws * bits * count, generator=torch.Generator().manual_seed(1))
    codes = encode(x, planes, bits, draws * count, cpu)[0, 0]
    events = ((codes[0] == codes[1]).view(draws, count).sum(-1) >= 2).double()
    u = float(inclusion(torch.tensor(cosine), bits, count))
    z = (float(events.mean()) - u) / math.sqrt(u * (1 - u) / draws)
    assert abs(z) < 4.5


def _estimates() -> tuple[Tensor, Tensor, Tensor]:
    """[denominator, numerators] over 1000 seeds, weighted by 1 / u and not, and what is true."""
    g = torch.Generator().manual_seed(5)
    q, k = torch.randn(1, 1, 1, 16, generator=g), torch.randn(1, 256, 1, 16, generator=g)
    v = torch.randn(1, 256, 1, 16, generator=g)
    weight = (0.25 * k[0, :, 0] @ q[0, 0, 0]).exp().double()
    terms = torch.cat([weight.view(-1, 1), weight.unsqueeze(1) * v[0, :, 0]], 1)
    sums, plain = [], []
    for seed in range(1000):
        index = LSHIndex(k, v, num_bits=4, num_tables=16, sink=0, window=0, seed=seed,
                         center=False)  # fmt: skip
        ids, lens, bias = index.retrieve(q)
        n = int(lens[0, 0])
        own = terms[ids[0, 0, :n].long()]
        sums.append(bias[0, 0, :n].double().exp() @ own)
        plain.append(own.sum(0))
    return torch.stack(sums), torch.stack(plain), terms.sum(0)


@pytest.mark.plain_memory
def test_numerator_and_denominator_are_unbiased(cpu: str) -> None:
    found, plain, truth = _estimates()
    z = (found.mean(0) - truth) / (found.std(0) / math.sqrt(len(found)))
    assert z.abs().max() < 4.5
    ratio, want = found[:, 1:] / found[:, :1], truth[1:] / truth[0]
    rmse = (ratio - want).square().mean(0).sqrt()
    assert ((ratio.mean(0) - want).abs() < 0.25 * rmse).all()  # consistent, hardly biased
    # The test can tell: without 1 / u the same sums are far off.
    z = (plain.mean(0) - truth) / (plain.std(0) / math.sqrt(len(plain)))
    assert z.abs().max() > 20


def test_sampling_everything_is_dense_attention(target: Target) -> None:
    k, v = torch.randn(2, 90, 2, 32), torch.randn(2, 90, 2, 32)
    q = torch.randn(2, 1, 4, 32)
    want, lse = attnforge.flash_attention(q, k, v, return_lse=True, backend="reference")
    for options in ({"num_bits": 0, "num_tables": 3}, {"window": 90}, {"sink": 90}):
        index = LSHIndex(k, v, **options, backend=target.backend)  # type: ignore[arg-type]
        out, stat = attnforge.lsh_attention(q, index, return_lse=True, backend=target.backend)
        torch.testing.assert_close(out, want, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(stat, lse, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dims", [(16, 16), (40, 24), (128, 128)])
def test_one_pass_is_a_look_up_and_attention(
    level: Target, dtype: torch.dtype, dims: tuple[int, int]
) -> None:
    """Against the reference: sinks, window, waiting keys and samples are of one softmax."""
    d, dv = dims
    k, v = torch.randn(2, 500, 2, d).to(dtype), torch.randn(2, 500, 2, dv).to(dtype)
    index = LSHIndex(k, v, num_bits=4, num_tables=20, window=30, sink=3,
                     lengths=torch.tensor([470, 12], dtype=torch.int32))  # fmt: skip
    q = torch.randn(2, 1, 6, d).to(dtype)
    index.k[0, 470:], index.v[0, 470:], index.v[1, 12:] = math.nan, math.nan, math.nan
    got, want = (
        attnforge.lsh_attention(q, index, return_lse=True, backend=b)
        for b in (level.backend, "reference")
    )
    # Both round a weight's u on their own: 1e-5 of it at most, and the output once more.
    torch.testing.assert_close(got[1], want[1], rtol=1e-5, atol=1e-4)
    near = 1e-4 if dtype is torch.float32 else 1e-2
    torch.testing.assert_close(got[0], want[0], rtol=near, atol=near)
    empty = LSHIndex(k[:, :0], v[:, :0])
    out, lse = attnforge.lsh_attention(q, empty, return_lse=True, backend=level.backend)
    assert not out.any()
    assert (lse == -math.inf).all()


def test_appended_keys_are_as_if_they_had_been_there(cpu: str) -> None:
    k, v = torch.randn(2, 900, 2, 16), torch.randn(2, 900, 2, 16)
    q = torch.randn(2, 1, 4, 16)
    options = {"num_bits": 5, "num_tables": 20, "window": 8}
    grown = LSHIndex(k[:, :300], v[:, :300], **options)  # type: ignore[arg-type]
    for at in range(300, 900, 100):
        grown.append(k[:, at : at + 100], v[:, at : at + 100])
    assert grown.hashed == [892, 892]
    assert same_bits(grown.k[:, :900], k)
    whole = LSHIndex(k, v, **options)  # type: ignore[arg-type]
    whole.mean = grown.mean
    whole._tables(1024, 1)
    whole.norms.zero_()
    whole.hashed = [0, 0]
    whole._hash([892, 892])
    for a, b in zip(attnforge.lsh_attention(q, grown, return_lse=True),
                    attnforge.lsh_attention(q, whole, return_lse=True), strict=True):  # fmt: skip
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    before = attnforge.lsh_attention(q, grown)
    grown.append(k[:, :7], v[:, :7]).truncate([900, 900])
    assert same_bits(attnforge.lsh_attention(q, grown), before)


def test_neighbours_threads_and_seeds(cpu: str) -> None:
    k, v, q = torch.randn(2, 400, 2, 16), torch.randn(2, 400, 2, 16), torch.randn(2, 1, 4, 16)
    options = {"num_bits": 4, "num_tables": 12}
    both = attnforge.lsh_attention(q, LSHIndex(k, v, **options))  # type: ignore[arg-type]
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        one = attnforge.lsh_attention(
            q[1:],
            LSHIndex(k[1:], v[1:], **options),  # type: ignore[arg-type]
        )
    finally:
        torch.set_num_threads(before)
    assert same_bits(both[1:], one)
    other = attnforge.lsh_attention(q, LSHIndex(k, v, seed=1, **options))  # type: ignore[arg-type]
    assert not torch.equal(both, other)


@pytest.mark.parametrize("kind", ["zero", "same", "huge", "parallel", "opposite"])
def test_strange_vectors_stay_finite(target: Target, kind: str) -> None:
    q, k, v = torch.randn(1, 1, 2, 16), torch.randn(1, 200, 1, 16), torch.randn(1, 200, 1, 16)
    if kind == "zero":
        k, q = k * 0, q * 0
    elif kind == "same":
        k = k[:, :1].expand_as(k)
    elif kind == "huge":
        k, q = k * 1e15, q * 1e15
    else:
        k = q[:, :, :1].expand(1, 200, 1, 16) * (1 if kind == "parallel" else -1)
    for center in (False, True):
        index = LSHIndex(k, v, num_bits=8, num_tables=30, center=center, backend=target.backend)
        scale = 1e-30 if kind == "huge" else None
        got = attnforge.lsh_attention(q, index, return_lse=True, softmax_scale=scale,
                                      backend=target.backend)  # fmt: skip
        assert all(x.isfinite().all() for x in got)


def test_centring_finds_keys_of_one_sign(cpu: str) -> None:
    q = torch.randn(1, 1, 1, 32)
    k = torch.randn(1, 2000, 1, 32) - 3 * q
    found = []
    for center in (False, True):
        index = LSHIndex(k, k, num_bits=8, num_tables=75, center=center)
        found.append(int(index.retrieve(q)[1]))
    assert found[1] > 10 * max(found[0], 1)


def test_budget_of_isotropic_keys(cpu: str) -> None:
    q, k = torch.randn(1, 1, 8, 128), torch.randn(1, 4096, 8, 128)
    index = LSHIndex(k, k, num_bits=9, num_tables=120, sink=0, window=0)
    share = float(index.retrieve(q)[1].float().mean()) / 4096
    cosine = torch.cosine_similarity(
        q, (k - k.mean(1, keepdim=True)).double(), -1
    )  # a little around 90 degrees
    u = float(inclusion(cosine, 9, 120).mean())
    assert 0.0234 < u < 0.04
    assert abs(share - u) < 0.1 * u
    assert index.nbytes / (4096 * 8) < 600  # of the paper's tables


def test_errors() -> None:
    k, q = torch.randn(1, 20, 2, 16), torch.randn(1, 1, 4, 16)
    index = LSHIndex(k, k, num_bits=2, num_tables=3)
    for call, text in (
        (lambda: LSHIndex(k, k[:, :3]), "k is float32"),
        (lambda: LSHIndex(k, k, num_bits=16), "num_bits is 16; want an int in 0 .. 15"),
        (lambda: LSHIndex(k, k, min_hits=3), "min_hits is 3"),
        (lambda: LSHIndex(k, k, lengths=torch.tensor([21]).int()), r"lengths\[0\] is 21"),
        (lambda: index.append(k[:, :, :1], k[:, :, :1]), "k has shape"),
        (lambda: index.truncate([21]), r"lengths is \[21\]"),
        (lambda: attnforge.lsh_attention(torch.randn(1, 2, 4, 16), index), "q has shape"),
        (lambda: attnforge.lsh_attention(q.double(), index), "q has dtype float64"),
        (lambda: attnforge.lsh_attention(q, index, clip=2.0), "clip is 2.0"),
    ):
        with pytest.raises(ValueError, match=text):
            call()
