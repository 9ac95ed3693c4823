"""pool_blocks against windows taken one by one, packed sequences, gradients."""

from __future__ import annotations

import pytest
import torch

import attnforge

POOLS = {"mean": torch.mean, "max": torch.amax, "min": torch.amin}


@pytest.mark.parametrize("mode", POOLS)
@pytest.mark.parametrize("partial", [False, True])
@pytest.mark.parametrize(("block", "stride"), [(32, 16), (4, 4), (5, 3), (1, 1), (6, 9), (7, 1)])
def test_windows(mode: str, partial: bool, block: int, stride: int) -> None:
    for tokens in (0, 1, block - 1, block, block + stride, 75):
        x = torch.randn(2, tokens, 3, 5)
        got = attnforge.pool_blocks(x, block=block, stride=stride, mode=mode, partial=partial)
        starts = [s for s in range(0, tokens, stride) if s + block <= tokens]
        after = len(starts) * stride
        covered = starts[-1] + block if starts else 0
        if partial and tokens > covered and after < tokens:
            starts.append(after)
        want = [POOLS[mode](x[:, s : s + block], 1) for s in starts]
        assert got.shape == (2, len(starts), 3, 5)
        if want:
            torch.testing.assert_close(got, torch.stack(want, 1))


def test_packed_and_several_modes() -> None:
    lengths = [5, 0, 17, 1]
    cu = torch.tensor([0, 5, 5, 22, 23], dtype=torch.int32)
    x = torch.randn(25, 2, 3, dtype=torch.float64)
    modes = ("max", "min", "mean")
    y, blocks = attnforge.pool_blocks(x, block=4, mode=modes, partial=True, cu_seqlens=cu)
    assert blocks.tolist() == [0, 2, 2, 7, 8]
    assert y.shape == (8, 2, 9)
    for n, a, b in zip(lengths, cu.tolist(), blocks.tolist(), strict=False):
        own = x[None, a : a + n]
        one = attnforge.pool_blocks(own, block=4, mode=modes, partial=True)[0]
        assert torch.equal(y[b : b + one.shape[0]], one)


@pytest.mark.parametrize("partial", [False, True])
@pytest.mark.parametrize(("block", "stride"), [(32, 16), (4, 4), (5, 3), (1, 1), (7, 1)])
def test_packed_with_room(block: int, stride: int, partial: bool) -> None:
    """The same blocks without a look at the boundaries, and zeros behind them."""
    cu = torch.tensor([0, 5, 5, 45, 46, 80], dtype=torch.int32)
    x = torch.randn(85, 2, 3, dtype=torch.float64)
    x[80:] = torch.nan  # of no sequence
    modes = ("max", "min", "mean")
    options = {"block": block, "stride": stride, "mode": modes, "partial": partial}
    y, blocks = attnforge.pool_blocks(x, cu_seqlens=cu, **options)
    got, same = attnforge.pool_blocks(x, cu_seqlens=cu, total_blocks=y.shape[0] + 3, **options)
    assert torch.equal(same, blocks)
    torch.testing.assert_close(got[:-3], y)
    assert not got[-3:].any()


@pytest.mark.parametrize("mode", POOLS)
def test_gradients_of_packed_with_room(mode: str) -> None:
    x = torch.randn(13, 1, 2, dtype=torch.float64, requires_grad=True)
    cu = torch.tensor([0, 4, 13], dtype=torch.int32)
    assert torch.autograd.gradcheck(
        lambda x: attnforge.pool_blocks(
            x, block=4, stride=2, mode=mode, partial=True, cu_seqlens=cu, total_blocks=9
        )[0],
        (x,),
    )


@pytest.mark.parametrize("mode", POOLS)
def test_gradients(mode: str) -> None:
    x = torch.randn(1, 13, 1, 2, dtype=torch.float64, requires_grad=True)
    for partial in (False, True):
        assert torch.autograd.gradcheck(
            lambda x, p=partial: attnforge.pool_blocks(x, block=4, stride=2, mode=mode, partial=p),
            (x,),
        )


def test_errors() -> None:
    x = torch.zeros(1, 4, 1, 2)
    for options, text in (
        ({"block": 0}, "block is 0"),
        ({"block": 2, "mode": "sum"}, "mode is 'sum'"),
        ({"block": 2, "cu_seqlens": torch.tensor([0, 4])}, r"want \[total, heads, dim\]"),
        ({"block": 2, "total_blocks": 2}, "total_blocks is for packed calls"),
    ):
        with pytest.raises(ValueError, match=text):
            attnforge.pool_blocks(x, **options)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="total_blocks is -1"):
        attnforge.pool_blocks(x[0], block=2, cu_seqlens=torch.tensor([0, 4]), total_blocks=-1)
    with pytest.raises(ValueError, match="rising boundaries"):
        attnforge.pool_blocks(x[0], block=2, cu_seqlens=torch.tensor([0, 9]))
