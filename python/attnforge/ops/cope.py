"""Contextual position encoding (CoPE; Golovneva et al., 2024, arXiv 2405.18719).

    g_ij = sigmoid(x_ij),  x_ij = scale <q_i, k_j>       a gate per visible key
    p_ij = min(sum of g_it over visible t >= j, N - 1)   a position: how many gates are open
    s_ij = x_ij + z_i(p_ij),  z_i(n) = <q_i, e_n>        linear between whole positions
    O    = softmax(S) V

The kernels walk the keys from right to left with a running sum, so that no S x S matrix is made.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from attnforge._params import FlashParams
from attnforge.ops import _checks, _flash_ops
from attnforge.ops._checks import fail
from attnforge.ops._cope_ops import attend
from attnforge.ops._feature_checks import shaped
from attnforge.ops.flash import _autocast, _choice
from attnforge.registry.explain import explained_by
from attnforge.registry.spec import Request

__all__ = ["cope_attention"]

_OP = "cope_attention"


def _problem(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pos_emb: Tensor,
    *,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    seqused_k: Tensor | None = None,
    softmax_scale: float | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, FlashParams]:
    q, k, v = _autocast(_OP, q, k, v)
    if (cu_seqlens_q is None) != (cu_seqlens_k is None):
        fail(_OP, "one of cu_seqlens_q and cu_seqlens_k is given; want both, or neither")
    if cu_seqlens_q is not None and cu_seqlens_k is not None:
        _checks.varlen(_OP, q, k, v, cu_seqlens_q, cu_seqlens_k)
        batch, sizes = cu_seqlens_q.shape[0] - 1, (q.shape[0], k.shape[0])
    else:
        _checks.dense(_OP, q, k, v)
        batch, sizes = q.shape[0], (q.shape[1], k.shape[1])
    _checks.lengths(_OP, "seqused_k", seqused_k, q, batch)
    if k.dtype.itemsize == 1:
        fail(_OP, f"k has dtype {k.dtype}; want a wider one; multiply it by its descale first")
    _checks.tensor(_OP, "pos_emb", pos_emb)
    if pos_emb.dim() == 2:
        pos_emb = pos_emb.unsqueeze(0)
    positions = pos_emb.shape[-1] if pos_emb.dim() else 0
    if positions == 0:
        fail(_OP, f"pos_emb has shape {tuple(pos_emb.shape)}; want [heads_q|1, head_dim, n] with "
                  "at least one position")  # fmt: skip
    sizes_of = [(q.shape[-2], 1), (q.shape[-1],), (positions,)]
    shaped(_OP, "pos_emb", pos_emb, q, sizes_of, None)
    left, right = _checks.window(_OP, window_size, causal)
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    _checks.scalars(_OP, scale, 0.0)
    indices = (cu_seqlens_q, cu_seqlens_k, seqused_k, None, None)
    return q, k, v, pos_emb, FlashParams(*indices, *sizes, scale, left, right, 0.0)


def _requests(
    q: Tensor, k: Tensor, v: Tensor, pos_emb: Tensor, *, return_lse: bool = False, **options: Any
) -> Sequence[Request]:
    q, _, v, _, p = _problem(q, k, v, pos_emb, **options)
    meta = _flash_ops.metadata(q, v, p)
    return [_flash_ops.request(op, meta) for op in ("cope_fwd", "cope_bwd")]


@explained_by(_requests)
def cope_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pos_emb: Tensor,
    *,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    seqused_k: Tensor | None = None,
    softmax_scale: float | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> Any:
    """Attention whose positions are counted by gates; differentiable in q, k, v and pos_emb.

    q [B, Sq, Hq, D], k [B, Sk, Hk, D], v [B, Sk, Hk, Dv] as ``flash_attention`` takes them; with
    cu_seqlens_q and cu_seqlens_k [B + 1] int32 packed: q [Tq, Hq, D] and so on.

    pos_emb: [1|Hq, D, N] or [D, N], any floating dtype: column n is the embedding of position n.
        Sums of gates beyond N - 1 count as N - 1.
    causal, window_size, seqused_k, softmax_scale, return_lse, backend: as ``flash_attention``. A
        key that a row does not see has no gate. The gate is of the scaled logit, the table of the
        query as it is, as in the paper's code. Biases, softcap, sinks, dropout and other score
        functions are not taken.

    Returns out like q with Dv, or (out, lse) with lse fp32 of the logits that have their positions.
    A row that sees no key gives 0 and -inf. At a whole position the gradient takes the slope to the
    right. Raises ValueError or TypeError on arguments that do not fit. Memory is linear in Sq and
    Sk; flops are those of attention and 2 D N per row.
    """
    q, k, v, emb, p = _problem(
        q,
        k,
        v,
        pos_emb,
        causal=causal,
        window_size=window_size,
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k,
        seqused_k=seqused_k,
        softmax_scale=softmax_scale,
    )
    out, lse = attend(q, k, v, emb, p, _choice(_OP, backend))
    return (out, lse) if return_lse else out
