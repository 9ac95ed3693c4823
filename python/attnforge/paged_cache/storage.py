"""The tensors of a paged cache: pages of all layers, their scales, their bounds.

Every tensor has the layers first and the pages second, so that one index list copies, moves or
poisons the same pages of all layers at once.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

__all__ = ["DTYPES", "Layer", "Storage"]

DTYPES: dict[str, torch.dtype] = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp8": torch.float8_e4m3fn,
    "int8": torch.int8,
    "int4": torch.uint8,  # two codes per byte
}
_WHERE = "attnforge.PagedKVCache"
_FP8_NAN = 0x7F


class Layer(NamedTuple):
    """One layer's tensors, as the operators take them."""

    k_pages: Tensor
    v_pages: Tensor
    kv_scales: tuple[Tensor, Tensor] | None
    kv_zeros: tuple[Tensor, Tensor] | None
    bounds: tuple[Tensor, Tensor] | None


class Storage:
    """Pages [L, P, page_size, Hk, D] ("NHD") or [L, P, Hk, page_size, D] ("HND"), K and V apart.

    int8 and int4 pages have one fp32 scale (int4 also a zero) per token and KV head, [L, P,
    page_size, Hk], taken from the token's own range when it is written: no calibration, and a
    token's code never depends on its neighbours. fp8 codes are the rounded values themselves.
    With `page_bounds`, page_min and page_max [L, P, Hk, D] follow the keys (Quest).
    """

    def __init__(
        self,
        shape: tuple[int, int, int, int],
        dims: tuple[int, int],
        dtype: torch.dtype | str,
        kv_layout: str,
        page_bounds: bool,
        device: torch.device,
    ) -> None:
        """shape: layers, pages, page_size, KV heads. dims: D and Dv."""
        known = {*DTYPES.values()}
        self.dtype = DTYPES.get(dtype, dtype) if isinstance(dtype, str) else dtype
        if self.dtype not in known:
            raise ValueError(
                f"{_WHERE}: dtype {dtype!r} cannot be stored; want one of {', '.join(DTYPES)} or "
                f"the torch dtypes {', '.join(str(d).removeprefix('torch.') for d in known)} "
                "(uint8 holds int4 codes)"
            )
        if kv_layout not in ("NHD", "HND"):
            raise ValueError(f"{_WHERE}: kv_layout is {kv_layout!r}; want 'NHD' or 'HND'")
        if min(*shape, *dims) < 1:
            raise ValueError(
                f"{_WHERE}: num_layers, num_pages, page_size, num_kv_heads are {shape} and the "
                f"head dims {dims}; want at least 1 of each"
            )
        packed = self.dtype is torch.uint8
        if packed and any(d % 2 for d in dims):
            raise ValueError(
                f"{_WHERE}: head dims {dims} with int4 pages; want even ones, two codes per byte"
            )
        layers, pages, size, heads = shape
        self.heads = heads
        self.kv_layout = kv_layout
        inner = (size, heads) if kv_layout == "NHD" else (heads, size)

        def make(*last: int, dtype: torch.dtype) -> Tensor:
            return torch.empty((layers, pages, *last), dtype=dtype, device=device)

        codes = [make(*inner, d // 2 if packed else d, dtype=self.dtype) for d in dims]
        self._k, self._v = codes
        self._scales: list[Tensor] = []
        self._zeros: list[Tensor] = []
        if self.dtype in (torch.int8, torch.uint8):
            self._scales = [make(size, heads, dtype=torch.float32) for _ in range(2)]
        if packed:
            self._zeros = [make(size, heads, dtype=torch.float32) for _ in range(2)]
        self._bounds = (
            [make(heads, dims[0], dtype=torch.float32) for _ in range(2)] if page_bounds else []
        )

    @property
    def ranged(self) -> bool:
        """Whether codes need a scale per token."""
        return bool(self._scales)

    @property
    def has_bounds(self) -> bool:
        """Whether page_min and page_max are kept."""
        return bool(self._bounds)

    def layer(self, n: int) -> Layer:
        """The tensors of layer n, as views."""

        def pair(x: list[Tensor]) -> Any:
            return (x[0][n], x[1][n]) if x else None

        return Layer(
            self._k[n], self._v[n], pair(self._scales), pair(self._zeros), pair(self._bounds)
        )

    def _all(self) -> list[Tensor]:
        """Every tensor, fp8 as bytes: indexing lacks it."""
        tensors = [self._k, self._v, *self._scales, *self._zeros, *self._bounds]
        return [t.view(torch.uint8) if t.dtype is torch.float8_e4m3fn else t for t in tensors]

    def copy_pages(self, source: list[int], target: list[int]) -> None:
        """Copy whole pages, of all layers."""
        a, b = (torch.tensor(x, device=self._k.device) for x in (source, target))
        for t in self._all():
            t[:, b] = t[:, a]

    def move_slots(self, moves: Tensor) -> None:
        """moves [n, 5] int64: page and slot from, page and slot to, and the lane.

        That is layer * Hk + head, or -1, in all moves, for all lanes. All are read before any is
        written.

        Bounds of a page that receives tokens become those of all pages they come from: true, if
        wider than need be.
        """
        a, i, b, j, lane = moves.unbind(1)
        if moves.numel() == 0:
            return
        source: Any = (slice(None), a, i)
        target: Any = (slice(None), b, j)
        if int(lane[0]) >= 0:
            layer, head = lane // self.heads, lane % self.heads
            source, target = (layer, a, i, head), (layer, b, j, head)
        slots = [t.view(torch.uint8) if t.dtype is torch.float8_e4m3fn else t
                 for t in (self._k, self._v)]  # fmt: skip
        if self.kv_layout == "HND":
            slots = [t.transpose(2, 3) for t in slots]
        for t in (*slots, *self._scales, *self._zeros):
            t[target] = t[source]
        if self._bounds:
            self._move_bounds(a, b, j, lane)

    def _move_bounds(self, a: Tensor, b: Tensor, j: Tensor, lane: Tensor) -> None:
        """Bounds after `move_slots`; a page whose first slot comes from another keeps nothing."""
        count, heads = self._k.shape[1], self.heads
        keys, where = torch.unique(lane * count + b, return_inverse=True)
        stays = torch.ones_like(keys, dtype=torch.bool)
        stays[where[(a != b) & (j == 0)]] = False
        pages, owner = keys % count, keys.div(count, rounding_mode="floor")
        at: Any
        for t, name in zip(self._bounds, ("amin", "amax"), strict=True):
            if int(lane[0]) < 0:  # as [P, L, Hk, D]: all lanes of a page are one row
                rows = t.transpose(0, 1)
                at, source = pages, rows[a]
            else:  # as [L, Hk, P, D]
                rows = t.transpose(1, 2)
                at = (owner // heads, owner % heads, pages)
                source = rows[lane // heads, lane % heads, a]
            fold = rows[at]
            fold[~stays] = float("inf") if name == "amin" else -float("inf")
            index = where.view(-1, *[1] * (source.dim() - 1)).expand_as(source)
            rows[at] = fold.scatter_reduce(0, index, source, name)

    def write_ranges(self, n: int, x: tuple[Tensor, Tensor], page: Tensor, slot: Tensor) -> None:
        """Scales (and zeros) of new tokens, before they are written; x is k and v [T, Hk, D], page
        and slot are [T], or [T, Hk] where heads have lengths of their own.
        """
        where: Any = (n, page, slot)
        if page.dim() == 2:
            where = (*where, torch.arange(self.heads, device=page.device))
        for which, values in enumerate(x):
            wide = values.float().nan_to_num(0.0, 0.0, 0.0)  # as the codes treat NaN; inf clamps
            if self._zeros:
                low = wide.amin(-1).clamp_max(0.0)
                scale = (wide.amax(-1).clamp_min(0.0) - low) / 15
            else:
                scale = wide.abs().amax(-1) / 127
            scale = torch.where(scale > 0, scale, 1.0)
            self._scales[which][where] = scale
            if self._zeros:
                self._zeros[which][where] = (-low / scale).round()

    def poison(self, pages: list[int] | None) -> None:
        """Make these pages (None: all) unreadable: NaN in the values or in their scales."""
        at: Any = slice(None) if pages is None else torch.tensor(pages, device=self._k.device)
        for t in (self._k, self._v):
            if t.dtype is torch.float8_e4m3fn:
                t.view(torch.uint8)[:, at] = _FP8_NAN
            elif t.is_floating_point():
                t[:, at] = float("nan")
        for t in (*self._scales, *self._zeros, *self._bounds):
            t[:, at] = float("nan")

    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(t.numel() * t.element_size() for t in self._all())
