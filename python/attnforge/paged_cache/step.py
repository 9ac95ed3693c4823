"""One forward pass over a paged cache: its tables are made once and used by every layer."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from attnforge.ops.paged import cascade_attention, paged_append, paged_attention

if TYPE_CHECKING:
    from attnforge.paged_cache.cache import PagedKVCache

__all__ = ["Step"]

_WHERE = "attnforge.PagedKVCache"


class Step:
    """Room for new tokens at the ends of some sequences, made by `PagedKVCache.begin`.

    Attributes:
        sequences: ids, one per row of the tables.
        rows: new tokens of each.
        block_table: [B, columns] int32 page ids, -1 behind a sequence's last page.
        seqlens_before, seqlens_after: [B] int32 lengths without and with the new tokens, of the
            longest head. `head_seqlens` tells those of each head, where they differ.
        cu_seqlens: [B + 1] int32 boundaries of the packed new tokens.

    Sequences that are extended, truncated, compacted or freed later make a step stale.
    """

    def __init__(
        self,
        cache: PagedKVCache,
        sequences: list[int],
        rows: list[int],
        block_table: Tensor,
        seqlens_after: Tensor,
        head_seqlens: Tensor | None = None,
    ) -> None:
        """head_seqlens: [L, B, Hk] int32 lengths with the new tokens, where heads differ."""
        device = block_table.device
        self.sequences, self.rows = sequences, rows
        self.block_table, self.seqlens_after = block_table, seqlens_after
        counts = torch.tensor(rows, dtype=torch.int32, device=device)
        self.seqlens_before = seqlens_after - counts
        self.cu_seqlens = torch.nn.functional.pad(counts.cumsum(0), (1, 0)).to(torch.int32)
        self._cache, self._counts, self._head_seqlens = cache, counts, head_seqlens
        self._places: tuple[Tensor, Tensor] | None = None
        self._groups: tuple[Tensor, Tensor] | None = None
        self._shares_prefix = False

    @property
    def ragged(self) -> bool:
        """Whether KV heads of some sequence have lengths of their own."""
        return self._head_seqlens is not None

    def head_seqlens(self, layer: int = 0) -> Tensor:
        """Lengths with the new tokens as the operators take them: [B], or [B, Hk] if `ragged`."""
        return self.seqlens_after if self._head_seqlens is None else self._head_seqlens[layer]

    def _lengths_before(self, layer: int) -> Tensor:
        if self._head_seqlens is None:
            return self.seqlens_before
        return self._head_seqlens[layer] - self._counts.unsqueeze(1)

    def places(self, layer: int = 0) -> tuple[Tensor, Tensor]:
        """Page and slot of each new token, int64: [T], or [T, Hk] if `ragged`."""
        if self._places is not None:
            return self._places
        device, size = self.block_table.device, self._cache.page_size
        owner = torch.arange(len(self.rows), device=device).repeat_interleave(self._counts)
        row = torch.arange(owner.numel(), device=device) - self.cu_seqlens[:-1].long()[owner]
        before = self._lengths_before(layer).long()[owner]
        if before.dim() == 2:
            owner, row = owner.unsqueeze(1), row.unsqueeze(1)
        token = before + row
        found = self.block_table[owner, token // size].long(), token % size
        if not self.ragged:  # then of every layer
            self._places = found
        return found

    def _packed(self, x: Tensor, name: str) -> bool:
        """Whether x is [T, H, D]; else it must be [B, S, H, D] with S new tokens of each."""
        if x.dim() == 3 and x.shape[0] == sum(self.rows):
            return True
        if x.dim() == 4 and [x.shape[1]] * x.shape[0] == self.rows:
            return False
        raise ValueError(
            f"{_WHERE}: {name} has shape {tuple(x.shape)}, but this step gives {self.rows} tokens "
            f"to {len(self.rows)} sequences; want [{sum(self.rows)}, heads, head_dim] packed, or "
            "[batch, tokens, heads, head_dim] where all get as many"
        )

    def append(
        self,
        k: Tensor,
        v: Tensor,
        *,
        layer: int = 0,
        rope: tuple[Tensor, Tensor] | None = None,
        positions: Tensor | None = None,
        rope_interleaved: bool = False,
        backend: str | None = None,
    ) -> None:
        """Write the new keys and values of one layer.

        k, v: [B, S, Hk, D] and Dv, or packed [T, Hk, D] in the order of `sequences`. rope turns k
        on the way, as in `attnforge.paged_append`; not with int8 and int4 pages, whose scales are
        taken from the keys as they come, and with `positions` alone where heads have lengths of
        their own, which are no positions.
        """
        cache = self._cache
        store = cache.storage
        own = store.layer(layer)
        packed = self._packed(k, "k")
        if store.ranged:
            if rope is not None:
                raise ValueError(
                    f"{_WHERE}: rope= with {store.dtype} pages; their scales are those of the keys "
                    "that are stored: turn k before append"
                )
            flat = (k, v) if packed else (k.flatten(0, 1), v.flatten(0, 1))
            store.write_ranges(layer, flat, *self.places(layer))
        if self.ragged and rope is not None and positions is None:
            raise ValueError(
                f"{_WHERE}: rope= without positions=, but KV heads have lengths of their own here; "
                "pass the position of each new token in its sequence"
            )
        bounds = own.bounds or (None, None)
        paged_append(
            k,
            v,
            own.k_pages,
            own.v_pages,
            block_table=self.block_table,
            cache_seqlens=self._lengths_before(layer),
            cu_seqlens=self.cu_seqlens if packed else None,
            kv_scales=own.kv_scales,
            kv_zeros=own.kv_zeros,
            rope=rope,
            positions=positions,
            rope_interleaved=rope_interleaved,
            page_min=bounds[0],
            page_max=bounds[1],
            kv_layout=store.kv_layout,
            backend=backend,
        )

    def attention(self, q: Tensor, *, layer: int = 0, cascade: bool = False, **options: Any) -> Any:
        """Attention of the new tokens' queries over their sequences, themselves included.

        q: [B, S, Hq, D], or packed [T, Hq, D]. `cascade` reads prefixes that neighbours in
        `sequences` share once for all of them; results are the same up to the order of sums, and
        masks other than causal are not served. options: those of `attnforge.paged_attention`
        (`attnforge.cascade_attention`), which also says what is returned.
        """
        own = self._cache.storage.layer(layer)
        if self._packed(q, "q"):
            options |= {
                "cu_seqlens_q": self.cu_seqlens,
                "max_seqlen_q": max(self.rows, default=0),
            }
        options |= {
            "block_table": self.block_table,
            "cache_seqlens": self.head_seqlens(layer),
            "kv_scales": own.kv_scales,
            "kv_zeros": own.kv_zeros,
            "kv_layout": self._cache.storage.kv_layout,
        }
        if cascade:
            groups, prefixes = self.groups()
            options |= {"cu_groups": groups, "prefix_lens": prefixes}
            return cascade_attention(q, own.k_pages, own.v_pages, **options)
        return paged_attention(q, own.k_pages, own.v_pages, **options)

    @property
    def shares_prefix(self) -> bool:
        """Whether neighbours in `sequences` have whole pages in common."""
        self.groups()
        return self._shares_prefix

    def groups(self) -> tuple[Tensor, Tensor]:
        """Neighbours with a common prefix: cu_groups [G + 1] and prefix_lens [G], int32.

        A group ends where the first page changes; its prefix is what all its members share,
        in whole pages that were full before this step.
        """
        if self._groups is None:
            size, table = self._cache.page_size, self.block_table.cpu()
            before = self.seqlens_before
            if self._head_seqlens is not None:  # what all heads of all layers have
                before = self._head_seqlens.amin((0, 2)) - self._counts
            full = (before.cpu() // size).tolist()
            same = (table[1:] == table[:-1]) & (table[1:] >= 0)
            shared = same.to(torch.int32).cumprod(1).sum(1).tolist()
            ends, prefixes = [0], []
            for b in range(len(self.sequences)):
                if b == ends[-1]:
                    prefixes.append(full[b])
                else:
                    prefixes[-1] = min(prefixes[-1], shared[b - 1], full[b])
                if b + 1 == len(self.sequences) or shared[b] == 0:
                    ends.append(b + 1)
            alone = [stop - start == 1 for start, stop in pairwise(ends)]
            lens = [0 if one else n * size for n, one in zip(prefixes, alone, strict=True)]
            device = self.block_table.device
            self._shares_prefix = any(lens)
            self._groups = (
                torch.tensor(ends, dtype=torch.int32, device=device),
                torch.tensor(lens, dtype=torch.int32, device=device),
            )
        return self._groups
