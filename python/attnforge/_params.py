"""Parameters of the operators, one named tuple per operator: the Python twin of ``params.h``.

A launcher receives its tensors and one of these, never a long list of arguments.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

__all__ = [
    "FLOAT8",
    "KV_CODES",
    "SCORE_FNS",
    "BlockLists",
    "DeltaGrads",
    "DeltaParams",
    "FlashGrads",
    "FlashMods",
    "FlashParams",
    "FlashTape",
    "IndexedGrads",
    "IndexedParams",
    "LinearGrads",
    "LinearOutputs",
    "LinearParams",
    "LinearTape",
    "NsaSelectParams",
    "PagedCache",
    "PagedParams",
    "PagedWrite",
    "SelectParams",
]

FLOAT8 = torch.float8_e4m3fn  # the one 8-bit type of inputs
# What turns a logit s into a weight; the names of ``score_fn``.
SCORE_FNS = ("softmax", "sigmoid", "relu", "softplus", "signed_softmax")
# Page dtypes that hold codes, and what each is called; uint8 holds two int4 codes.
KV_CODES = {FLOAT8: "fp8", torch.int8: "int8", torch.uint8: "int4"}


class FlashMods(NamedTuple):
    """What a call may do to single scores: tensors, each None if unused.

    In the schemas they are one list ``Tensor?[] mods`` in this order, or an empty list. A leading
    size of 1 is broadcast; varlen tensors lack the batch and count packed rows or keys. With
    x = softmax_scale * row_scale * <q, k>, rotated first if there are tables, a visible score is

        s = softcap(x) - alibi + key_bias[j] + bias[i, j] + rel_bias[j - i - offset] + c_i - c_j

    where c = decay at the key positions of query i and of key j.
    """

    row_bounds: Tensor | None = None  # [B|1, Hq|1, Sq, 2] int32: row i sees keys lo <= j < hi only
    mask: Tensor | None = None  # [B|1, Hq|1, Sq, Sm] bool: of the last Sm keys, those that are seen
    segments_q: Tensor | None = None  # [B, Sq] int32; seen where the ids are equal
    segments_k: Tensor | None = None  # [B, Sk] int32
    key_bias: Tensor | None = None  # [B|1, Hq|1, Sk] fp32
    bias: Tensor | None = None  # [B|1, Hq|1, Sq, Sk] of q's dtype or fp32; batched calls only
    rel_bias: Tensor | None = None  # [Hq|1, 2 R + 1] fp32, distances beyond R take the ends
    decay: Tensor | None = None  # [B, Hq|1, Sk] fp64, cumulative log of the forget gates
    row_scale: Tensor | None = None  # [B|1, Hq|1, Sq] fp32
    rope_cos: Tensor | None = None  # [Hk|1, P, rotary_dim / 2] fp32
    rope_sin: Tensor | None = None
    positions_q: Tensor | None = None  # [B|1, Sq] int32, rows of the tables
    positions_k: Tensor | None = None  # [B|1, Sk] int32
    rng: Tensor | None = None  # [2] int64: Philox seed and offset, with dropout
    # [B, Hk] fp32, packed calls too: what <q, k> and v of fp8 tensors are multiplied by
    qk_descale: Tensor | None = None
    v_descale: Tensor | None = None


class FlashParams(NamedTuple):
    """Everything a ``flash_*`` launcher needs beyond q, k, v and its outputs.

    Windows are normalised: -1 is unlimited, and a causal call has ``window_right == 0``.
    Index tensors were validated on the CPU; on other devices only their metadata was.
    """

    cu_seqlens_q: Tensor | None  # [B + 1] int32; given together with cu_seqlens_k, or neither
    cu_seqlens_k: Tensor | None  # [B + 1] int32
    seqused_k: Tensor | None  # [B] int32: key slots at or past it are never read
    alibi_slopes: Tensor | None  # [Hq] or [B, Hq] fp32
    sinks: Tensor | None  # [Hq] fp32
    max_seqlen_q: int  # an upper bound of the rows of one sequence; exact on the CPU
    max_seqlen_k: int
    softmax_scale: float
    window_left: int
    window_right: int
    softcap: float  # 0 = off
    # A FlashMods, or () if nothing of it is used; behind it the tensors of the call's jit mods.
    mods: tuple[Tensor | None, ...] = ()
    score_fn: str = "softmax"  # or what stands for jit mods, with a softmax: attnforge.jit.known
    dropout_p: float = 0.0  # weights are dropped with this probability, the others scaled up
    rope_interleaved: bool = False  # pairs (2 n, 2 n + 1) instead of (n, n + rotary_dim / 2)
    out_dtype: torch.dtype | None = None  # with fp8 k and v; None is q's, or bf16 if that is fp8

    @property
    def score_mods(self) -> FlashMods:
        """``mods`` by name."""
        return FlashMods(*self.mods[: len(FlashMods._fields)])

    @property
    def jit_tensors(self) -> tuple[Tensor | None, ...]:
        """The tensors of jit mods, in the order of their signatures."""
        return self.mods[len(FlashMods._fields) :]


class FlashTape(NamedTuple):
    """What a forward leaves for the backward."""

    q: Tensor
    k: Tensor
    v: Tensor
    out: Tensor
    lse: Tensor
    out_lo: Tensor  # round16(O_fp32 - out), or empty


class FlashGrads(NamedTuple):
    """Outputs of a backward launcher, allocated by the operator."""

    dq: Tensor
    dk: Tensor
    dv: Tensor
    dsinks: Tensor  # [Hq], or empty without sinks
    # Gradients of mods, shaped like them; empty where not asked for.
    dkey_bias: Tensor
    dbias: Tensor
    drel_bias: Tensor
    ddecay: Tensor
    drow_scale: Tensor


class BlockLists(NamedTuple):
    """The lists of a ``BlockSelection``, as operators and launchers take them."""

    indices: Tensor  # [B | 1, H, R, S] int32, varlen [H, R, S]
    counts: Tensor | None  # [B | 1, H, R] int32
    q_block: int
    kv_block: int

    @property
    def rows(self) -> int:
        """List rows of a sequence, varlen of all."""
        return self.indices.shape[-2]


class NsaSelectParams(NamedTuple):
    """What ``nsa_importance`` and ``nsa_select`` are asked beyond their tensors."""

    flash: FlashParams  # boundaries and lengths in compressed keys, and the scale
    cmp_block: int  # tokens of a compressed key
    cmp_stride: int
    slc_block: int  # tokens of a block to select
    blocks: int  # an upper bound of the blocks of a sequence
    top_n: int = 0
    init_blocks: int = 0
    local_blocks: int = 0


class IndexedParams(NamedTuple):
    """Which keys ``indexed_*`` launchers attend to, beyond q, k, v and their outputs.

    With a block table k and v are pages [P, page_size, Hk, D], else [B, Sk, Hk, D].
    """

    ids: Tensor  # [B, 1 | Hk | Hq, N] int32; what names no key in use is ignored
    lens: Tensor | None  # [B, 1 | Hk | Hq] int32: entries at and past it are not read
    log_bias: Tensor | None  # like ids, fp32: added to the logit; -inf hides the entry
    block_table: Tensor | None  # [B, max_pages] int32
    cache_seqlens: Tensor | None  # [B] int32 keys in use; always there with a block table
    softmax_scale: float


class IndexedGrads(NamedTuple):
    """Outputs of a backward launcher."""

    dq: Tensor
    dk: Tensor
    dv: Tensor
    dlog_bias: Tensor  # like log_bias, or [0] without


class SelectParams(NamedTuple):
    """What ``select_columns`` is asked beyond scores and lengths."""

    kind: str  # "topk", "threshold" or "topp"
    k: int
    threshold: Tensor | None  # [1] or [R] fp32
    mass: float
    first: int  # columns that are always chosen: at the front,
    last: int  # and at the end of those in use


class PagedCache(NamedTuple):
    """Keys and values in pages, and where those of each sequence lie.

    Key j of sequence b and KV head h is slot j % page_size of page block_table[b, j // page_size].
    Pages of codes (``KV_CODES``) hold (code - zero) * scale; uint8 pages two channels per byte,
    the even one in the low nibble. Scales and zeros are fp32 and broadcast where a size is 1;
    without zeros int4 codes stand around 8, the others around 0.
    """

    k_pages: Tensor  # [P, page_size, Hk, D], any strides but for a last one of 1; int4: D / 2
    v_pages: Tensor  # [P, page_size, Hk, Dv]; may be a view of k_pages
    block_table: Tensor  # [B, max_pages] int32
    cache_seqlens: Tensor  # [B] or [B, Hk] int32
    k_scale: Tensor | None = None  # [P|1, page_size|1, Hk]
    v_scale: Tensor | None = None
    k_zero: Tensor | None = None
    v_zero: Tensor | None = None

    @property
    def page_size(self) -> int:
        """Slots of a page."""
        return self.k_pages.shape[1]

    @property
    def capacity(self) -> int:
        """Keys that a row of the table has room for."""
        return self.block_table.shape[1] * self.k_pages.shape[1]

    @property
    def latent(self) -> bool:
        """Whether V is the first channels of K, in the same memory (MLA)."""
        k, v = self.k_pages, self.v_pages
        shared: bool = torch._C._is_alias_of(k, v)  # type: ignore[attr-defined]  # of fakes, too
        return shared and k.storage_offset() == v.storage_offset() and k.stride() == v.stride()


class PagedParams(NamedTuple):
    """What ``paged_fwd`` and ``cascade_fwd`` are asked beyond q and the cache.

    Windows are normalised as in FlashParams. On the CPU the index tensors were validated.
    """

    cu_seqlens_q: Tensor | None  # [B + 1] int32: q is [T, Hq, D]
    alibi_slopes: Tensor | None  # [Hq] or [B, Hq] fp32
    sinks: Tensor | None  # [Hq] fp32
    mask: Tensor | None  # [B, 1, Sq, Sm] bool: of the last Sm keys, those that a row sees
    max_seqlen_q: int  # an upper bound; exact on the CPU
    softmax_scale: float
    window_left: int
    window_right: int
    softcap: float
    num_splits: int = 0
    # A plan of the splits (``paged_fwd``), above num_splits; both or neither. Piece n is keys
    # [1, n] .. [2, n] - 1 of sequence [0, n], or unused (-1); those of sequence b are first[b] ..
    # first[b + 1] - 1, ascending and without a gap.
    split_pieces: Tensor | None = None  # [3, N] int32
    split_first: Tensor | None = None  # [B + 1 or more] int32


class PagedWrite(NamedTuple):
    """What ``paged_append`` is asked beyond k, v and the cache, whose lengths are the old ones."""

    cu_seqlens: Tensor | None  # [B + 1] int32: k is [T, Hk, D]
    rope_cos: Tensor | None  # [Hk|1, P, rotary_dim / 2] fp32
    rope_sin: Tensor | None
    positions: Tensor | None  # [B, S] or [T] int32, rows of the tables; default: cache positions
    rope_interleaved: bool
    page_min: Tensor | None  # [P, Hk, D] of k's dtype or fp32: least stored value per channel
    page_max: Tensor | None


class LinearParams(NamedTuple):
    """Everything a ``linear_chunk_*`` launcher needs beyond q, k, v and its outputs.

    States, gates and denominators are fp32, or fp64 beside fp64 inputs.
    """

    gate: Tensor | None  # natural log; None with "none", else shaped as gate_kind says
    gate_kind: str  # "none", "head" [HV], "scalar" [B,T,HV], "key" [B,T,HV,K], "value" [B,T,HV,V]
    initial_state: Tensor | None  # [N, HV, K, V]
    initial_z: Tensor | None  # [N, HV, K], with normalize
    cu_seqlens: Tensor | None  # [N + 1] int32, with a batch of 1
    scale: float
    causal: bool  # False: every row reads the state of the whole sequence; no gate then
    normalize: str  # "", "sum" (n / (d + eps)) or "abs" (n / max(|d|, eps))
    eps: float


class LinearOutputs(NamedTuple):
    """Outputs of a forward launcher; [0] where not asked for."""

    out: Tensor  # [B, T, HV, V] of q's dtype; 0 in rows that no sequence has
    final_state: Tensor  # [N, HV, K, V]
    final_z: Tensor  # [N, HV, K]
    den: Tensor  # [B, T, HV]: d before eps
    out_lo: Tensor  # round16(O_fp32 - out), for a backward of a normalised 16-bit call


class LinearTape(NamedTuple):
    """What a forward leaves for the backward; final_state and final_z only with gradients."""

    q: Tensor
    k: Tensor
    v: Tensor
    outputs: LinearOutputs


class LinearGrads(NamedTuple):
    """Outputs of a backward launcher; [0] where there is no such input."""

    dq: Tensor
    dk: Tensor
    dv: Tensor
    dgate: Tensor  # like gate; [0] also where no gradient is asked for
    dinitial_state: Tensor
    dinitial_z: Tensor


class DeltaParams(NamedTuple):
    """Everything a ``delta_chunk_*`` launcher needs beyond q, k, v and its outputs.

    Gates, beta and states are fp32, or fp64 beside fp64 inputs.
    """

    g: Tensor | None  # natural-log gates [B, T, HV], or per key channel [B, T, HV, K]
    beta: Tensor  # [B, T, HV]
    initial_state: Tensor | None  # [N, HV, K, V]
    cu_seqlens: Tensor | None  # [N + 1] int32, with a batch of 1
    scale: float


class DeltaGrads(NamedTuple):
    """Outputs of a backward launcher; [0] where there is no such input."""

    dq: Tensor
    dk: Tensor
    dv: Tensor
    dg: Tensor
    dbeta: Tensor
    dinitial_state: Tensor
