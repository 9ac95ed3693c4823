"""`PagedCache`: a transformers cache whose keys and values lie in the pages of a `PagedKVCache`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from attnforge.integrations._paged_states import PackedPass, PagedStates, Pass
from attnforge.paged_cache import PagedKVCache, Step

__all__ = ["PagedCache", "PagedStep"]

_WHERE = "attnforge.integrations.transformers.PagedCache"


class PagedCache(Cache):  # type: ignore[misc]
    """Pass it as ``past_key_values`` to a model with ``attn_implementation="attnforge"``.

        cache = hf.PagedCache(model.config, num_pages=256)
        out = model.generate(**inputs, past_key_values=cache, max_new_tokens=64)

    Padding takes no room, sequences grow page by page, beams share pages until they part. With
    `batch`, prompts start on what the cache knows of them from earlier prompts:

        inputs = cache.batch(prompts, model=model)      # lists of token ids
        out = model.generate(**inputs, past_key_values=cache, max_new_tokens=64)
        new = out[:, inputs["input_ids"].shape[1] :]

    Args:
        config: of the model; every layer must have the same KV heads and head dims.
        num_pages, page_size: the pool.
        dtype: of the pages as in `PagedKVCache`; default: that of the keys.
        cascade: read prefixes that neighbours in the batch share once for all of them.

    Inference only. Sliding windows are applied, but what has left the window is kept.
    """

    def __init__(
        self,
        config: Any,
        *,
        num_pages: int,
        page_size: int = 16,
        dtype: torch.dtype | str | None = None,
        kv_layout: str = "NHD",
        cascade: bool = False,
    ) -> None:
        super().__init__(layers=[])
        decoder = config.get_text_config(decoder=True)
        self.num_layers: int = decoder.num_hidden_layers
        self.cascade = cascade
        self._options = {
            "num_pages": num_pages,
            "page_size": page_size,
            "kv_layout": kv_layout,
            "num_layers": self.num_layers,
        }
        self._dtype = dtype
        self._kv: PagedKVCache | None = None
        self._pass: Pass | None = None
        self._updated: set[int] = set()  # layers of this pass
        self._sequences: list[int] = []
        self._real = torch.ones(0, 0, dtype=torch.bool)  # [B, seen]
        self._uncommitted: list[list[int]] = []
        self._space = 0

    # ---- prompts and prefixes ----

    def batch(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        model: Any = None,
        pad_token_id: int = 0,
        space: int = 0,
        device: torch.device | str = "cpu",
    ) -> dict[str, Tensor]:
        """Start a new batch on known prefixes; returns ``input_ids`` and ``attention_mask``.

        Columns are: known tokens, left-padded, then the others, left-padded. ``generate`` runs the
        model over the latter only. With `model`, a prefix common to all prompts that is not known
        yet is run once, for all of them, before. Prompts are remembered when they have been run.
        `space` separates what must not be shared.
        """
        if not prompts or any(len(p) == 0 for p in prompts):
            raise ValueError(f"{_WHERE}.batch: a prompt has no token; want at least one in each")
        self.reset()
        rows = [[int(t) for t in p] for p in prompts]
        self._space = space
        if model is not None:
            self._run_common(model, rows, device)
        known = [0] * len(rows)
        if self._kv is not None:
            self._sequences = [self._kv.allocate(row[:-1], space=space) for row in rows]
            known = [int(n) for n in self._kv.cache_seqlens(self._sequences)]
        self._uncommitted = rows
        ids, real = [], []
        for width, parts in (
            (max(known), [row[:n] for row, n in zip(rows, known, strict=True)]),
            (None, [row[n:] for row, n in zip(rows, known, strict=True)]),
        ):
            columns = max(map(len, parts)) if width is None else width
            ids.append([[pad_token_id] * (columns - len(p)) + p for p in parts])
            real.append([[0] * (columns - len(p)) + [1] * len(p) for p in parts])
        self._real = torch.tensor(real[0], dtype=torch.bool).view(len(rows), max(known))
        return {
            "input_ids": torch.cat([torch.tensor(x, dtype=torch.long) for x in ids], 1).to(device),
            "attention_mask": torch.cat([torch.tensor(x, dtype=torch.long) for x in real], 1).to(
                device
            ),
        }

    def _run_common(self, model: Any, rows: list[list[int]], device: torch.device | str) -> None:
        size = int(self._options["page_size"])
        shared = 0  # all but one token of the shortest prompt at most: that one gives its logits
        while shared < min(map(len, rows)) - 1 and len({row[shared] for row in rows}) == 1:
            shared += 1
        common = rows[0][: shared // size * size]
        if len(rows) < 2 or not common:
            return
        known = 0
        if self._kv is not None:
            self._sequences = [self._kv.allocate(common, space=self._space)]
            known = self._kv.length(self._sequences[0])
            self._real = torch.ones(1, known, dtype=torch.bool)
        if known < len(common):
            self._uncommitted = [common]
            with torch.no_grad():
                ids = torch.tensor([common[known:]], device=device)
                model(input_ids=ids, past_key_values=self, use_cache=True, logits_to_keep=1)
        self.reset()

    def _commit(self) -> None:
        """Remember the prompts that the last pass has written, if it came through all layers."""
        owner = self._pass
        if self._kv is not None and owner is not None and len(owner.written) == self.num_layers:
            for sequence, tokens in zip(self._sequences, self._uncommitted, strict=False):
                self._kv.commit(sequence, tokens[: self._kv.length(sequence)], space=self._space)
        self._uncommitted = []

    # ---- what models call ----

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Stand-ins for all keys and values of a layer; attention writes the new ones."""
        if torch.is_grad_enabled() and (key_states.requires_grad or value_states.requires_grad):
            raise ValueError(
                f"{_WHERE}: keys require grad, but pages have no gradient; run the model under "
                "torch.no_grad(), or train without a cache"
            )
        if self._pass is None or layer_idx in self._updated:
            self._pass = self._start(key_states, value_states)
            self._updated = set()
        self._updated.add(layer_idx)
        fresh = (key_states, value_states)
        keys, values = (PagedStates(self._pass, layer_idx, x, fresh) for x in fresh)
        return keys, values

    def _start(self, k: Tensor, v: Tensor) -> Pass:
        batch, heads, rows, dim = k.shape
        if self._kv is None:
            options: dict[str, Any] = dict(self._options)
            self._kv = PagedKVCache(
                num_kv_heads=heads,
                head_dim=dim,
                v_head_dim=v.shape[-1],
                dtype=k.dtype if self._dtype is None else self._dtype,
                device=k.device,
                **options,
            )
        if not self._sequences:
            self._sequences = [self._kv.allocate() for _ in range(batch)]
            self._real = torch.ones(batch, 0, dtype=torch.bool)
        elif self._pass is not None:
            self._commit()
        if len(self._sequences) != batch:
            raise ValueError(
                f"{_WHERE}: the cache holds {len(self._sequences)} sequences and gets {batch} "
                "more rows of keys; call reset() or batch() before another batch"
            )
        self._real = torch.nn.functional.pad(self._real, (0, rows), value=True)
        return Pass(self._kv, self._sequences, self._real, rows, self.cascade)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns seen so far, padding included: what transformers' masks and slices count."""
        return self._real.shape[1]

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        """(columns with the new ones, 0)."""
        return self._real.shape[1] + query_length, 0

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """-1: the pool is the limit, and all sequences share it."""
        return -1

    def __len__(self) -> int:
        return self.num_layers

    @property
    def is_initialized(self) -> bool:
        """Whether the pages are allocated."""
        return self._kv is not None

    @property
    def batch_size(self) -> int:
        """Sequences of the current batch, -1 before the first."""
        return len(self._sequences) or -1

    def reset(self) -> None:
        """Free the sequences of this batch. Remembered prefixes stay."""
        if self._kv is not None:
            self._commit()
            self._kv.free(*self._sequences)
        self._sequences, self._uncommitted, self._pass = [], [], None
        self._real = self._real[:0, :0]

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last ``-tokens_to_remove`` columns (rejected drafts)."""
        count = min(-tokens_to_remove, self._real.shape[1])
        if tokens_to_remove > 0:
            raise ValueError(
                f"{_WHERE}.crop: {tokens_to_remove} is positive; pass minus the columns to remove"
            )
        if count == 0 or self._kv is None:
            return
        self._commit()
        lengths = self._kv.cache_seqlens(self._sequences).tolist()
        gone = self._real[:, -count:].sum(1).tolist()
        for sequence, length, n in zip(self._sequences, lengths, gone, strict=True):
            self._kv.truncate(sequence, length - n)
        self._real, self._pass = self._real[:, :-count], None

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row i becomes a copy of row beam_idx[i]: pages are shared until they are written to."""
        if self._kv is None:
            return
        self._commit()
        order: list[int] = beam_idx.tolist()
        taken: set[int] = set()
        sequences = []
        for i in order:
            old = self._sequences[i]
            sequences.append(self._kv.fork(old) if i in taken else old)
            taken.add(i)
        self._kv.free(*(s for i, s in enumerate(self._sequences) if i not in taken))
        self._sequences, self._real, self._pass = sequences, self._real[order], None

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each row `repeats` times."""
        rows = torch.arange(len(self._sequences))
        self.reorder_cache(rows.repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """These rows only."""
        self.reorder_cache(torch.arange(len(self._sequences))[indices.cpu()])

    # ---- facts ----

    @property
    def kv(self) -> PagedKVCache:
        """The pages and tables, once the model has run."""
        if self._kv is None:
            raise ValueError(f"{_WHERE}: nothing is cached yet; run the model first")
        return self._kv

    @property
    def sequences(self) -> list[int]:
        """Sequences of the current batch, as `kv` names them."""
        return list(self._sequences)

    def memory_bytes(self) -> int:
        """Bytes of the pages in use; the pool is ``kv.memory_bytes()``."""
        return self.kv.memory_bytes(self.kv.stats().used_pages)

    def __repr__(self) -> str:
        return f"PagedCache({self._kv!r})"


class PagedStep(Cache):  # type: ignore[misc]
    """One pass of a model over the new tokens of a `Step`, packed: for continuous batching.

        step = kv.begin(sequences, rows)        # some prompts, some single tokens
        model(input_ids=ids[None], position_ids=at[None], past_key_values=hf.PagedStep(step))

    ids and at: [T] new tokens and their positions, in the order of the sequences. The model sees a
    batch of one; each token attends to its own sequence. Made for one pass and then useless.
    """

    def __init__(self, step: Step, *, cascade: bool = False) -> None:
        super().__init__(layers=[])
        self._pass = PackedPass(step, cascade)

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Stand-ins for all keys and values of a layer; attention writes the new ones."""
        fresh = (key_states, value_states)
        keys, values = (PagedStates(self._pass, layer_idx, x, fresh) for x in fresh)
        return keys, values

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """0: positions are given, and the mask is of the new tokens."""
        return 0

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        """(new tokens, 0)."""
        return query_length, 0
