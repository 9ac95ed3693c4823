"""nn.NativeSparseAttention: parts against the functions, packed and cached calls, gradients."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import attnforge
from attnforge import nn as anf


def layer(**options: object) -> anf.NativeSparseAttention:
    sizes = {"cmp_block": 8, "cmp_stride": 4, "slc_block": 16, "top_n": 4, "window": 12}
    return anf.NativeSparseAttention(32, 4, 2, **{**sizes, **options})  # type: ignore[arg-type]


def close(got: Tensor, want: Tensor) -> None:
    torch.testing.assert_close(got, want, rtol=2e-5, atol=2e-6)


def test_compression_sees_places() -> None:
    compress = anf.native_sparse.BlockCompression(8, 8, 4)
    x = torch.randn(2, 21, 3, 8)
    got = compress(x)
    assert got.shape == (2, 4, 3, 8)
    for i in range(4):
        window = (x[:, 4 * i : 4 * i + 8] + compress.position[:, None]).transpose(1, 2)
        close(got[:, i], compress.mlp(window.flatten(-2)))
    starts = torch.tensor([0, 4, 8, 12])
    close(compress(x[0], starts), got[0])


@pytest.mark.parametrize("expansion", [1, 4])
def test_compressed_keys_differ_from_the_start(expansion: int) -> None:
    """Of tokens that vary by 1 windows do, too: nothing common drowns what tells them apart."""
    torch.manual_seed(0)
    compress = anf.native_sparse.BlockCompression(32, 8, 4, expansion)
    keys = compress(torch.randn(4, 260, 1, 32)).detach().flatten(0, 2)
    assert 0.7 < float(keys.std(0).mean()) < 1.4
    assert float(keys.mean(0).abs().mean()) < 0.5 * float(keys.std(0).mean())


def test_compression_by_means() -> None:
    """The layer's compressed keys are those that the function makes where it gets none."""
    net = layer(compression="mean", share_kv=True, rope_base=None)
    assert not list(net.compress_k.parameters())
    x = torch.randn(2, 75, 32)
    q = net.q_proj(x).unflatten(-1, (4, 8))
    k, v = (f(x).unflatten(-1, (2, 8)) for f in (net.k_proj, net.v_proj))
    gates = net.gate_proj(x).unflatten(-1, (4, 3)).sigmoid()
    out = attnforge.nsa_attention(q, None, None, k, v, None, None, gates, **net.options)
    close(net(x), net.o_proj(out.flatten(2)))
    assert net.compress_k(k[:, :7]).shape == (2, 0, 2, 8)
    with pytest.raises(ValueError, match=r"compression is 'max'; want 'mlp' or 'mean'"):
        layer(compression="max")


@pytest.mark.parametrize(
    ("share_kv", "compression"), [(False, "mlp"), (True, "mlp"), (True, "mean")]
)
@pytest.mark.parametrize("prompt", [1, 7, 40])
def test_cached_calls_are_the_whole_call(share_kv: bool, compression: str, prompt: int) -> None:
    """A prompt, single tokens and a few at once: outputs of one call over everything."""
    net = layer(share_kv=share_kv, compression=compression, head_dim=16, v_head_dim=8)
    x = torch.randn(2, 75, 32)
    with torch.no_grad():
        want = net(x)
        cache = anf.NSACache()
        parts = [net(x[:, :prompt], cache=cache)]
        while cache.length < 75:
            step = 5 if cache.length % 3 == 0 else 1
            parts.append(net(x[:, cache.length : cache.length + step], cache=cache))
    got = torch.cat(parts, 1)
    assert got.shape == want.shape
    close(got, want)
    assert cache.compressed == (75 - 8) // 4 + 1


@pytest.mark.parametrize("compression", ["mlp", "mean"])
def test_packed_is_one_by_one(compression: str) -> None:
    net, lengths = layer(compression=compression), (30, 5, 0, 41)
    cu = torch.tensor([0, 30, 35, 35, 76], dtype=torch.int32)
    x = torch.randn(1, 76, 32)
    got = net(x, cu_seqlens=cu)
    first = 0
    for n in lengths:
        close(got[:, first : first + n], net(x[:, first : first + n]))
        first += n


def test_gradients_reach_every_parameter() -> None:
    net = layer().double()
    x = torch.randn(1, 60, 32, dtype=torch.float64, requires_grad=True)
    net(x).square().sum().backward()
    assert x.grad is not None
    for name, p in net.named_parameters():
        assert p.grad is not None, name
        assert p.grad.isfinite().all(), name
        assert p.grad.any(), name


def test_branches_against_dense() -> None:
    """Gates of one branch each: sums of blocks chosen, windows and compressed keys, by masks."""
    q, k, v = (torch.randn(1, 100, h, 16, dtype=torch.float64) for h in (4, 2, 2))
    sizes = {"cmp_block": 8, "cmp_stride": 4, "slc_block": 16}
    pools = [attnforge.pool_blocks(x, block=8, stride=4) for x in (k, v)]
    for n in range(3):
        gates = torch.zeros(1, 100, 4, 3, dtype=torch.float64)
        gates[..., n] = 0.5
        got, lists = attnforge.nsa_attention(
            q, None, None, k, v, None, None, gates, **sizes, top_n=4, window=12,
            return_selection=True,
        )  # fmt: skip
        i, j = torch.arange(100)[:, None], torch.arange(100)
        if n == 0:
            mask, keys, values = j[:24] // 1 * 4 + 7 <= i, *pools
            mask = mask[:, : keys.shape[1]].expand(1, 4, -1, -1)
        elif n == 1:
            mask = lists.to_mask(7).repeat_interleave(2, 1)[..., j // 16] & (j <= i)
            keys, values = k, v
        else:
            mask, keys, values = ((j <= i) & (i - j < 12)).expand(1, 4, -1, -1), k, v
        s = torch.einsum("bihd,bjhd->bhij", q, keys.repeat_interleave(2, 2)) / 4
        prob = s.masked_fill(~mask, -torch.inf).softmax(-1).nan_to_num(nan=0.0)
        want = torch.einsum("bhij,bjhd->bihd", prob, values.repeat_interleave(2, 2)) / 2
        torch.testing.assert_close(got, want)


def test_learns_a_needle() -> None:
    """A copy task far outside the window: the layer brings its loss down as attention does."""
    torch.manual_seed(0)
    net = layer(window=4, rope_base=None)
    head = torch.nn.Linear(32, 8)
    table = torch.nn.Embedding(10, 32)
    params = [*net.parameters(), *head.parameters(), *table.parameters()]
    optimizer = torch.optim.Adam(params, lr=5e-3)
    losses = []
    for _ in range(60):
        what = torch.randint(0, 8, (16,))
        tokens = torch.full((16, 64), 8)
        tokens[:, 20], tokens[:, 63] = what, 9
        y = net(table(tokens))[:, 63]
        loss = torch.nn.functional.cross_entropy(head(y), what)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[0] > 1.8
    assert sum(losses[-5:]) / 5 < 0.5


def test_errors() -> None:
    with pytest.raises(ValueError, match="num_heads is 5; want a multiple"):
        anf.NativeSparseAttention(40, 5, 2)
    net = layer()
    with pytest.raises(ValueError, match="x has shape"):
        net(torch.zeros(1, 4, 31))
    with pytest.raises(ValueError, match="cache serves inference"):
        net(torch.zeros(1, 4, 32), cache=anf.NSACache())
