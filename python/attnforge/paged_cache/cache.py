"""`PagedKVCache`: keys and values of many sequences in pages of one pool."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from attnforge.paged_cache._runtime import Tokens, host, int32, token_list
from attnforge.paged_cache.step import Step
from attnforge.paged_cache.storage import Storage
from attnforge.registry import override

__all__ = ["PagedKVCache", "Stats"]

_WHERE = "attnforge.PagedKVCache"


class Stats(NamedTuple):
    """What a cache holds and has done."""

    num_pages: int
    free_pages: int
    prefix_pages: int  # held by the tree of known prefixes, used by sequences or not
    evictable_pages: int  # of these, held by nothing else
    sequences: int
    prompt_tokens: int  # asked of the tree by allocate(tokens)
    prefix_tokens: int  # of these found
    pages_copied: int  # copy-on-write
    pages_evicted: int

    @property
    def used_pages(self) -> int:
        """Pages that sequences hold."""
        return self.num_pages - self.free_pages - self.evictable_pages


class PagedKVCache:
    """Keys and values of many sequences in pages of one pool, with shared prefixes.

    Args:
        num_pages, page_size: the pool; a page holds `page_size` tokens of every layer.
        num_kv_heads, head_dim, v_head_dim: Hk, D and Dv (default D).
        dtype: of the pages, a torch dtype or "fp32", "bf16", "fp16", "fp8" (e4m3), "int8",
            "int4". int8 and int4 have a scale (int4 also a zero) per token and head.
        kv_layout: "NHD" or "HND".
        num_layers: layers that share the tables of this cache.
        page_bounds: keep page_min and page_max of the keys, for selection by page.
        device: of the pages and tables.

    A sequence is an int that `allocate` or `fork` gave. One layer:

        cache = attnforge.PagedKVCache(1024, 16, 8, 128, dtype=torch.bfloat16)
        a, b = cache.allocate(), cache.allocate()
        cache.append(k, v, [a, b])               # k, v [2, S, 8, 128]
        out = cache.attention(q, [a, b])         # q [2, S, 32, 128]

    Many layers: `begin` makes room once, its `Step` writes and attends per layer.

    Pages are counted by reference. Appending to a page that others hold copies it first. A page
    that is freed is never read again; under `attnforge.debug(checks=True)` it is filled with NaN
    besides. Calls are atomic and may come from several threads; what a thread does with its own
    sequences is its own affair.

    Raises:
        ImportError: the host runtime is not built.
        ValueError: sizes, dtypes, sequences or tokens that do not fit.
        attnforge.paged_cache.OutOfPages (a RuntimeError): the pool is full; nothing was changed.
    """

    def __init__(
        self,
        num_pages: int,
        page_size: int,
        num_kv_heads: int,
        head_dim: int,
        *,
        v_head_dim: int | None = None,
        dtype: torch.dtype | str = torch.bfloat16,
        kv_layout: str = "NHD",
        num_layers: int = 1,
        page_bounds: bool = False,
        device: torch.device | str = "cpu",
    ) -> None:
        lanes = max(num_layers * num_kv_heads, 1)  # what may have a length of its own
        self._pool: Any = host().PagePool(num_pages, page_size, lanes)
        self.num_layers, self.page_size = num_layers, page_size
        self.device = torch.device(device)
        dims = (head_dim, head_dim if v_head_dim is None else v_head_dim)
        shape = (num_layers, num_pages, page_size, num_kv_heads)
        self.storage = Storage(shape, dims, dtype, kv_layout, page_bounds, self.device)
        # The pool has a lock of its own. This one also covers what follows from its answers: a
        # page is copied before its other holder may write to it, and poisoned before it is used
        # again.
        self._lock = threading.Lock()
        if override.checks:
            self.storage.poison(None)

    # ---- sequences ----

    def allocate(self, tokens: Tokens = (), *, space: int = 0) -> int:
        """A new sequence that starts with the longest known prefix of `tokens`.

        `length` tells how many tokens were found: whole pages. To have logits for the last token
        of a prompt, look for all tokens but that one. `space` separates what must not be shared,
        such as adapters or tenants.
        """
        sequence: int
        sequence, _ = self._pool.create(token_list(tokens), space)
        return sequence

    def fork(self, sequence: int) -> int:
        """A second sequence with the same tokens, in the same pages until one is written to."""
        twin: int = self._pool.fork(sequence)
        return twin

    def free(self, *sequences: int) -> None:
        """Give sequences back. Pages that nothing else holds are free; ids are never used again."""
        for sequence in sequences:
            with self._lock:
                self._freed(self._pool.free(sequence))

    def truncate(self, sequence: int, length: int) -> None:
        """Forget the tokens from `length` on (rejected drafts).

        Where heads have lengths of their own, all lose as many tokens as the longest one.
        """
        with self._lock:
            self._freed(self._pool.truncate(sequence, length))

    def compact(
        self,
        sequence: int,
        scores: Tensor,
        keep: int | Tensor,
        *,
        sink: int = 0,
        recent: int = 0,
    ) -> None:
        """Keep the `keep` tokens of highest score and close the gaps.

        scores: [length], finite or -inf (attention mass of H2O or SnapKV, say): one choice for all
            heads and layers. [Hk, length] or [L, Hk, length]: each KV head keeps its own tokens.
        keep: an int, or an int tensor [Hk] or [L, Hk]: then KV heads have lengths of their own
            from here on (`head_seqlens`), 0 among them. Scores behind a head's length are ignored.
        sink, recent: the first and last tokens of each head that are kept in any case.

        Keys keep the rotation of their position; the lengths shrink, so that positions of later
        tokens are the caller's to count. `length` is that of the longest head, and pages become
        free as it shrinks: a page holds all heads. Shorter heads are less to read.
        """
        if scores.dim() == 1 and isinstance(keep, int):
            self._compact(sequence, scores.double().tolist(), keep, sink, recent)
            return
        lanes = (self.num_layers, self.storage.heads)
        budget = torch.as_tensor(keep)
        if budget.is_floating_point() or budget.dim() > 2:
            raise ValueError(
                f"{_WHERE}.compact: keep is {budget.dtype} {tuple(budget.shape)}; want an int, or "
                f"an int tensor [{lanes[1]}] or {list(lanes)}, one per KV head (and layer)"
            )
        each = (self._per_lane("scores", scores, scores.shape[-1:]), self._per_lane("keep", budget))
        self._compact(sequence, each[0].double().tolist(), each[1].tolist(), sink, recent)

    def stream(
        self, sequence: int, heads: Tensor | Sequence[int], *, sink: int, recent: int
    ) -> None:
        """Keep the first `sink` and last `recent` tokens of some KV heads, all of the others.

        heads: bool [Hk] or [L, Hk], or numbers of heads, of all layers. Streaming heads are cut
        when this is called, not by themselves: between calls they grow with the others. Sources:
        StreamingLLM, Xiao et al., 2024; DuoAttention, Xiao et al., 2025.
        """
        if not isinstance(heads, Tensor) or heads.dtype is not torch.bool:
            chosen = torch.zeros(self.storage.heads, dtype=torch.bool)
            chosen[torch.as_tensor(heads, dtype=torch.long)] = True
            heads = chosen
        streams = self._per_lane("heads", heads.cpu())
        if min(sink, recent) < 0:
            raise ValueError(
                f"{_WHERE}.stream: sink {sink} and recent {recent}; want numbers of tokens >= 0"
            )
        lengths = self._lane_lengths([sequence]).flatten()
        keep = torch.where(streams, lengths.clamp_max(sink + recent), lengths)
        self._compact(sequence, [], keep.tolist(), sink, recent)

    def _per_lane(self, name: str, x: Tensor, last: tuple[int, ...] = ()) -> Tensor:
        """x [*last], [Hk, *last] or [L, Hk, *last], flat in the order of lanes."""
        shape = (self.num_layers, self.storage.heads, *last)
        if tuple(x.shape) not in (shape, shape[1:], shape[2:]):
            raise ValueError(
                f"{_WHERE}: {name} has shape {tuple(x.shape)}; want {list(shape[2:])}, "
                f"{list(shape[1:])} or {list(shape)}: for all KV heads, each, or each of each layer"
            )
        return x.expand(shape).flatten()

    def _compact(
        self, sequence: int, scores: list[float], keep: int | list[int], sink: int, recent: int
    ) -> None:
        with self._lock:
            moves, freed = self._pool.compact(sequence, scores, keep, sink, recent)
            if len(moves):
                self.storage.move_slots(int32(moves, (-1, 5), self.device).long())
            self._freed(freed)

    # ---- prefixes ----

    def match_prefix(self, tokens: Tokens, *, space: int = 0) -> int:
        """How many tokens `allocate(tokens)` would find now."""
        found: int = self._pool.match_prefix(token_list(tokens), space)
        return found

    def commit(self, sequence: int, tokens: Tokens, *, space: int = 0) -> None:
        """Let others find the pages of this sequence, whose first tokens are `tokens`.

        Whole pages only. Where the same prefix is known already, the sequence changes over to
        those pages and gives up its own. Committed pages outlive their sequences until room is
        needed; the least recently used ends go first.
        """
        with self._lock:
            self._freed(self._pool.commit(sequence, token_list(tokens), space))

    def evict(self, pages: int) -> None:
        """Forget up to `pages` pages of known prefixes that no sequence uses."""
        with self._lock:
            self._freed(self._pool.evict(pages))

    def _freed(self, pages: list[int]) -> None:
        if pages and override.checks:
            self.storage.poison(pages)

    # ---- one forward pass ----

    def begin(self, sequences: Sequence[int], rows: Sequence[int] | int) -> Step:
        """Room for `rows` new tokens at the end of each sequence, in all of them or in none.

        rows: one number for all, or one each; 0 is allowed. The lengths grow now; the pages are
        written by `Step.append`, once per layer.
        """
        ids = list(sequences)
        counts = [rows] * len(ids) if isinstance(rows, int) else list(rows)
        with self._lock:
            source, target, evicted = self._pool.extend(ids, counts)
            self._freed(evicted)
            if source:
                self.storage.copy_pages(source, target)
        return self._step(ids, counts)

    def _step(self, ids: list[int], counts: list[int]) -> Step:
        table, lengths = self.block_table(ids), self._pool.lane_lengths(ids)
        per_head = self._lanes(lengths, len(ids)).to(self.device) if len(lengths) else None
        return Step(self, ids, counts, table, self.cache_seqlens(ids), per_head)

    def append(
        self,
        k: Tensor,
        v: Tensor,
        sequences: Sequence[int],
        *,
        rows: Sequence[int] | None = None,
        **options: Any,
    ) -> Step:
        """`begin` and `Step.append` in one, for a cache of one layer.

        k [B, S, Hk, D], or packed [T, Hk, D] with the `rows` of each sequence. options: those of
        `Step.append`.
        """
        if self.num_layers != 1:
            raise ValueError(
                f"{_WHERE}.append: this cache has {self.num_layers} layers, which grow together; "
                "use step = cache.begin(sequences, rows) and step.append(k, v, layer=n) for each"
            )
        if rows is None and k.dim() != 4:
            raise ValueError(
                f"{_WHERE}.append: k has shape {tuple(k.shape)} without rows; want [batch, tokens, "
                "heads, head_dim], or rows= with packed tokens"
            )
        step = self.begin(sequences, k.shape[1] if rows is None else rows)
        step.append(k, v, **options)
        return step

    def attention(
        self,
        q: Tensor,
        sequences: Sequence[int],
        *,
        rows: Sequence[int] | None = None,
        layer: int = 0,
        **options: Any,
    ) -> Any:
        """Attention of each sequence's last tokens over the whole sequence.

        q [B, S, Hq, D], or packed [T, Hq, D] with the `rows` of each sequence. options and result:
        those of `Step.attention`. Makes the tables anew; with many layers use a `Step`.
        """
        ids = list(sequences)
        counts = [q.shape[1]] * len(ids) if rows is None else list(rows)
        return self._step(ids, counts).attention(q, layer=layer, **options)

    # ---- tables and facts ----

    def block_table(self, sequences: Sequence[int], *, columns: int = 0) -> Tensor:
        """[B, columns] int32 page ids, -1 behind the last page; 0 columns: as few as fit."""
        ids = list(sequences)
        table = self._pool.block_table(ids, columns)
        return int32(table, (len(ids), -1 if ids else max(columns, 1)), self.device)

    def cache_seqlens(self, sequences: Sequence[int]) -> Tensor:
        """[B] int32 lengths, of the longest KV heads."""
        ids = list(sequences)
        return int32(self._pool.lengths(ids), (len(ids),), self.device)

    def head_seqlens(self, sequences: Sequence[int], *, layer: int = 0) -> Tensor:
        """[B, Hk] int32 lengths of each KV head of a layer."""
        return self._lane_lengths(list(sequences))[layer].to(self.device)

    def _lane_lengths(self, ids: list[int]) -> Tensor:
        """[L, B, Hk] int32."""
        lengths = self._pool.lane_lengths(ids)
        if len(lengths) or not ids:
            return self._lanes(lengths, len(ids))
        return self._lanes(self._pool.lengths(ids), len(ids), lanes=False)

    def _lanes(self, lengths: Any, batch: int, lanes: bool = True) -> Tensor:
        shape = (batch, self.num_layers if lanes else 1, self.storage.heads if lanes else 1)
        each = int32(lengths, shape, torch.device("cpu")).transpose(0, 1)
        return each.expand(self.num_layers, batch, self.storage.heads).contiguous()

    def length(self, sequence: int) -> int:
        """Tokens of one sequence, in its longest KV head."""
        return int(self.cache_seqlens([sequence])[0])

    def memory_bytes(self, pages: int | None = None) -> int:
        """Bytes of the pool, or of some of its pages: `memory_bytes(stats().used_pages)`."""
        total = self.storage.nbytes()
        num_pages: int = self._pool.state()["num_pages"]
        return total if pages is None else total // num_pages * pages

    def stats(self) -> Stats:
        """Counts of pages, sequences, prefix hits, copies and evictions."""
        return Stats(**self._pool.state())

    def __repr__(self) -> str:
        s = self.stats()
        return (
            f"PagedKVCache({s.sequences} sequences in {s.used_pages} of {s.num_pages} pages of "
            f"{self.page_size} tokens, {self.storage.dtype})"
        )
