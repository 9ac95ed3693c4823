"""MagicPIG: attention by sampling keys that a locality-sensitive hash finds, with exact weights.

Chen et al., 2024 (arXiv 2410.16179). Keys are hashed by the signs of random projections; a query
attends to the keys that share a bucket with it in at least two of L tables. A key's probability u
of that is known from its angle alone, so adding -log u to its logit makes numerator and denominator
of the softmax unbiased (self-normalised importance sampling). The first keys and the last ones are
attended to exactly, and both parts meet by their LSEs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from attnforge.ops import _checks, _retrieval_ops
from attnforge.ops._checks import _name, _shape, fail
from attnforge.ops.flash import _choice, merge_states
from attnforge.ops.indexed import indexed_attention

__all__ = ["LSHIndex", "lsh_attention"]

_CLASS = "LSHIndex"
_SEGMENT = 65536  # keys that a 16-bit local id can name
_INSERT_EVERY = 256  # keys that wait, attended to exactly, before they are hashed


def _whole(name: str, value: Any, least: int, most: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        fail(_CLASS, f"{name} is {value!r}; want an int in {least} .. {most}")
    return value


class LSHIndex:
    """Hash tables over the keys of a batch of sequences, which grow and can be rolled back.

    k [B, S, Hk, D] (as attention sees them, after RoPE), v [B, S, Hk, Dv].
    num_bits (K), num_tables (L): the paper's presets are (10, 150), (9, 120) and (8, 75): about 1,
        2.3 and 3.5% of isotropic keys, 1.4 to 2 times as many of real ones. K = 0 samples all.
    seed: of the projections; the same on every device and for every dtype.
    sink, window: keys at the start, and at the end, that are always attended to exactly.
    lengths: int32 [B], keys in use of each sequence; None: all S.
    center: hash keys less their mean over the keys between sink and window, which is then frozen:
        keys of one sign otherwise share all buckets, or none with the query.
    min_hits: tables in which a key must be hit: 2 as in the paper, or 1.

    Per key and KV head the tables take 2 L bytes and 4 L (2^K + 1) / segment for their bucket
    starts (``nbytes`` says how much), and appended keys wait at most 256 positions beyond the
    window before they are hashed.
    """

    def __init__(
        self,
        k: Tensor,
        v: Tensor,
        *,
        num_bits: int = 10,
        num_tables: int = 150,
        seed: int = 0,
        sink: int = 4,
        window: int = 64,
        lengths: Tensor | None = None,
        center: bool = True,
        min_hits: int = 2,
        backend: str | None = None,
    ) -> None:
        if k.dim() != 4 or v.dim() != 4 or k.shape[:3] != v.shape[:3] or k.dtype is not v.dtype:
            fail(_CLASS, f"k is {_name(k.dtype)} {_shape(k)}, v {_name(v.dtype)} {_shape(v)}; want "
                         "[batch, keys, heads, head_dim] of one dtype")  # fmt: skip
        self.num_bits = _whole("num_bits", num_bits, 0, 15)
        self.num_tables = _whole("num_tables", num_tables, 1, 1024)
        self.min_hits = _whole("min_hits", min_hits, 1, 2)
        self.sink, self.window = (
            _whole("sink", sink, 0, 1 << 30),
            _whole("window", window, 0, 1 << 30),
        )
        batch, size, heads, dim = k.shape
        if lengths is None:
            own = [size] * batch
        else:
            _checks.lengths(_CLASS, "lengths", lengths, k, batch)
            own = lengths.tolist()
            _checks._used(_CLASS, "lengths", own, None, size)
        self.lengths: list[int] = own
        self.k, self.v = k.detach(), v.detach()
        self._own = False  # the buffers are the caller's: they are copied before the first write
        self._backend = backend
        generator = torch.Generator().manual_seed(seed)
        self.planes = torch.randn(dim, num_bits * num_tables, generator=generator).to(k.device)
        self.mean = self._mean() if center else None
        self.norms = torch.zeros(batch, heads, size, device=k.device)
        self.hashed = [0] * batch
        segment = min(_SEGMENT, max(256, 1 << max(size - 1, 0).bit_length()))
        self._tables(segment, max(1, -(-size // segment)))
        self._hash([max(0, n - window) for n in own])

    def _tables(self, segment: int, segments: int) -> None:
        batch, _, heads, _ = self.k.shape
        shape = (batch, heads, segments, self.num_tables)
        device = self.k.device
        self.starts = torch.zeros(*shape, (1 << self.num_bits) + 1, dtype=torch.int32,
                                  device=device)  # fmt: skip
        self.ids = torch.zeros(*shape, segment, dtype=torch.int16, device=device)

    def _mean(self) -> Tensor:
        """fp32 [B, Hk, D] over the keys that are hashed at first; 0 where there are none."""
        found = []
        for b, n in enumerate(self.lengths):
            rows = self.k[b, min(self.sink, n) : max(self.sink, n - self.window)]
            found.append(rows.float().sum(0) / max(1, rows.shape[0]))
        return torch.stack(found) if found else self.k.new_zeros((0, *self.k.shape[2:])).float()

    @property
    def nbytes(self) -> int:
        """Bytes of the tables, the norms and the projections: what the index adds to K and V."""
        parts = (self.starts, self.ids, self.norms, self.planes)
        return sum(x.numel() * x.element_size() for x in parts)

    # ---- growth ----

    def append(self, k: Tensor, v: Tensor) -> LSHIndex:
        """Add keys [B, m, Hk, D] and values behind those of every sequence; returns self."""
        want = (self.k.shape[0], *self.k.shape[2:])
        if k.dim() != 4 or (k.shape[0], *k.shape[2:]) != want or k.shape[:3] != v.shape[:3]:
            fail(_CLASS, f"k has shape {_shape(k)}, v {_shape(v)}; want [{want[0]}, keys, "
                         f"{want[1]}, {want[2]}] like those of the index")  # fmt: skip
        rows = k.shape[1]
        self._reserve(max(self.lengths, default=0) + rows)
        for b, n in enumerate(self.lengths):
            self.k[b, n : n + rows] = k[b].detach()
            self.v[b, n : n + rows] = v[b].detach()
            self.lengths[b] = n + rows
        ends = [max(0, n - self.window) for n in self.lengths]
        waiting = max((e - h for e, h in zip(ends, self.hashed, strict=True)), default=0)
        if waiting >= _INSERT_EVERY:
            self._hash([max(e, h) for e, h in zip(ends, self.hashed, strict=True)])
        return self

    def truncate(self, lengths: list[int] | Tensor) -> LSHIndex:
        """Drop keys at and past ``lengths`` [B], as after rejected drafts; returns self."""
        own = [int(n) for n in lengths]
        if len(own) != len(self.lengths) or any(
            not 0 <= n <= m for n, m in zip(own, self.lengths, strict=False)
        ):
            fail(_CLASS, f"lengths is {own}; want one per sequence, at most {self.lengths}")
        self.lengths = own
        kept = [min(n, h) for n, h in zip(own, self.hashed, strict=True)]
        if kept != self.hashed:
            self.hashed = kept
            at = torch.tensor(kept, dtype=torch.int32, device=self.k.device)
            _retrieval_ops.lsh_truncate(self.starts, self.ids, self.num_bits, at, self._choice())
        return self

    def _choice(self) -> str | None:
        return _choice(_CLASS, self._backend)

    def _reserve(self, keys: int) -> None:
        """Room for so many keys: buffers grow by half at least, segments double, then add up."""
        size = self.k.shape[1]
        if keys > size or not self._own:
            room = max(keys, size + size // 2 + _INSERT_EVERY) if keys > size else size
            keep = room == size and not self._own
            self.k, self.v = (x.clone() if keep else _grown(x, 1, room) for x in (self.k, self.v))
            self.norms = _grown(self.norms, 2, room)
            self._own = True
        segment, segments = self.ids.shape[4], self.ids.shape[2]
        while segment < min(keys, _SEGMENT):
            segment *= 2
        self.ids = _grown(self.ids, 4, segment)
        segments = max(segments, -(-keys // segment))
        self.ids, self.starts = _grown(self.ids, 2, segments), _grown(self.starts, 2, segments)

    def _hash(self, ends: list[int]) -> None:
        """Hash keys hashed[b] .. ends[b] - 1 and put them into the tables."""
        start, stop = min(self.hashed, default=0), max(ends, default=0)
        if stop <= start:
            return
        for b, (first, end) in enumerate(zip(self.hashed, ends, strict=True)):
            rows = self.k[b : b + 1, first:end]
            if rows.shape[1] == 0:
                continue
            one = slice(b, b + 1)
            mean = None if self.mean is None else self.mean[one]
            codes = self.encode(rows, mean)
            at = [
                torch.tensor([x], dtype=torch.int32, device=self.k.device)
                for x in (first, end - first)
            ]
            _retrieval_ops.lsh_insert(
                self.starts[one], self.ids[one], self.num_bits, codes, *at, self._choice()
            )
            centred = rows.float() if mean is None else rows.float() - mean.unsqueeze(1)
            self.norms[b, :, first:end] = centred.norm(dim=-1)[0].transpose(0, 1)
        self.hashed = list(ends)

    def encode(self, x: Tensor, mean: Tensor | None = None) -> Tensor:
        """Codes int16 [B, H, S, L] of rows x [B, S, H, D], less mean [B, H, D] if there is one."""
        codes: Tensor = _retrieval_ops.lsh_encode(
            x, mean, self.planes, self.num_bits, self.num_tables, self._choice()
        )
        return codes

    def retrieve(self, q: Tensor, *, clip: float = 0.0) -> tuple[Tensor, Tensor, Tensor]:
        """The sampled keys of q [B, 1, Hq, D]: ids [B, Hq, S] ascending, lens, log_bias = -log u.

        Entries behind a length are undefined. Keys of sink and window are not among them.
        """
        found: tuple[Tensor, Tensor, Tensor] = _retrieval_ops.lsh_retrieve(
            *self._look_up(q), self.min_hits, clip, self._choice()
        )
        return found

    def _ends(self) -> list[int]:
        """Of each sequence, where the keys that may be sampled end."""
        both = zip(self.hashed, self.lengths, strict=True)
        return [max(0, min(h, n - self.window)) for h, n in both]

    def _look_up(self, q: Tensor) -> tuple[Any, ...]:
        """What the look-up of q [B, 1, Hq, D] is asked: tables, codes, keys and their bounds."""
        top = q.float().abs().amax(-1, keepdim=True)
        # A power of two changes no sign and keeps the projections from overflowing.
        scale = torch.exp2(-torch.floor(torch.log2(top.clamp_min(1e-30))))
        # All queries as the rows of one product.
        codes = self.encode((q.float() * scale).reshape(1, -1, 1, q.shape[3]))
        codes = codes.view(q.shape[0], q.shape[2], self.num_tables)
        ends = self._ends()
        begin, end = (
            torch.tensor(x, dtype=torch.int32, device=q.device)
            for x in ([self.sink] * len(ends), ends)
        )
        return (self.starts, self.ids, self.num_bits, codes, q, self.k, self.mean, self.norms,
                begin, end)  # fmt: skip

    def _fused(self, q: Tensor, backend: str | None) -> str | None:
        """The backend of look-up and attention in one operator; "" where they are two."""
        chosen = {x for x in (self._choice(), _choice("lsh_attention", backend)) if x}
        if q.device.type != "cpu" or len(chosen) > 1 or not chosen <= {"cpu", "reference"}:
            return ""
        return next(iter(chosen), None)

    def static(self) -> Tensor:
        """Ids [B, 1, N] of the keys that are attended to exactly, -1 behind."""
        lists = []
        for end, n in zip(self._ends(), self.lengths, strict=True):
            lists.append([*range(min(self.sink, n)), *range(max(self.sink, end), n)])
        longest = max(map(len, lists), default=0)
        padded = [own + [-1] * (longest - len(own)) for own in lists]
        ids = torch.tensor(padded, dtype=torch.int32, device=self.k.device)
        return ids.view(len(lists), 1, longest)


def _grown(x: Tensor, dim: int, size: int) -> Tensor:
    """x, or a copy of it with room for ``size`` along ``dim``, zeros behind."""
    if x.shape[dim] == size:
        return x
    out = x.new_zeros((*x.shape[:dim], size, *x.shape[dim + 1 :]))
    out.narrow(dim, 0, x.shape[dim]).copy_(x)
    return out


def lsh_attention(
    q: Tensor,
    index: LSHIndex,
    *,
    clip: float = 0.0,
    softmax_scale: float | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> Any:
    """Attention of one new query per sequence, q [B, 1, Hq, D], over ``index``: decode.

    Sinks, window and keys not hashed yet are attended to exactly; of the others those that share
    at least min_hits buckets, each weighed by 1 / u. clip is added to every u: it bounds weights
    at the price of a bias (public code uses 1e-4 without saying so); 0 leaves the estimator
    consistent. Probabilities below 1e-12 count as 1e-12.

    Returns out [B, 1, Hq, Dv], or (out, lse), where the LSE is the log of the estimated
    denominator. Has no gradient. Raises ValueError or TypeError on arguments that do not fit.
    """
    op = "lsh_attention"
    _checks.tensor(op, "q", q)
    want = (index.k.shape[0], 1, index.k.shape[3])
    if q.dim() != 4 or (q.shape[0], q.shape[1], q.shape[3]) != want or (
        q.shape[2] % index.k.shape[2]
    ):  # fmt: skip
        fail(op, f"q has shape {_shape(q)}; want [{want[0]}, 1, heads, {want[2]}] with a multiple "
                 f"of {index.k.shape[2]} heads")  # fmt: skip
    if q.dtype is not index.k.dtype:
        fail(op, f"q has dtype {_name(q.dtype)}; want {_name(index.k.dtype)} like the keys")
    if not 0.0 <= clip < 1.0:
        fail(op, f"clip is {clip!r}; want a probability below 1; 0 turns it off")
    q = q.detach()
    fused = index._fused(q, backend)
    if fused != "":
        scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
        _checks.scalars(op, scale, 0.0)
        length = torch.tensor(index.lengths, dtype=torch.int32)
        out, lse = _retrieval_ops.lsh_attend(
            *index._look_up(q), index.min_hits, clip, index.v, length, scale, fused
        )
        return (out, lse) if return_lse else out
    ids, lens, log_bias = index.retrieve(q, clip=clip)
    parts = [
        indexed_attention(q, index.k, index.v, ids=own, lens=count, log_bias=bias,
                          softmax_scale=softmax_scale, return_lse=True, backend=backend)
        for own, count, bias in ((index.static(), None, None), (ids, lens, log_bias))
    ]  # fmt: skip
    out, lse = merge_states(*map(list, zip(*parts, strict=True)), backend=backend)
    return (out, lse) if return_lse else out
