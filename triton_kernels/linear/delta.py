"""The delta rules over one sequence of a head: DeltaNet, and gated ones (per head, per channel).

    S~ = decay_t S_{t-1}      e_t = v_t - S~^T k_t      S_t = S~ + k_t w_t^T,  w_t = beta_t e_t
    o_t = scale S_t^T q_t

Algorithm (Yang et al., 2024; gates as in Gated DeltaNet and Kimi Delta Attention): a program owns
BLOCK_C columns of the state, which stay in registers; columns are independent. Per chunk of 16
tokens, with S of its start, D the decays between its tokens, ``ahead``, ``behind``, ``whole`` of
``decays``, and E_ij = <k_i, k_j D_ij> for j < i,

    w = M beta (v - (ahead k) S)      M = (I + diag(beta) E)^-1
    o = scale ((ahead q) S + <q, k D> w)          S <- whole S + (behind k)^T w

M comes from forward substitution in fp32, row by row: an inverse by powers of E is wrong by many
times the result where keys repeat. No state goes to memory.

Cost: 6 K C flops per token, and 16 (4 K + 2 C) beside; q and k are read ceil(V / BLOCK_C) times.
Numerics: as ``walk``; M and its product are fp32.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from attnforge.triton_kernels.lang import packed_span
from attnforge.triton_kernels.linear.decays import (
    channel_edges,
    channel_factor,
    next_decays,
    no_decays,
    of_numbers,
)
from attnforge.triton_kernels.linear.walk import operand, operand_row, product, row_numbers
from attnforge.triton_kernels.tensors import head_ptr, tile_ptr


class Delta(NamedTuple):
    """Inputs: Operands of ``walk``, Views of fp32 [B, T, HV] or [B, T, HV, K]."""

    q: Any
    k: Any
    v: Any
    gate: Any  # or None
    beta: Any
    scale: Any
    seal: Any = None  # see ``walk``


@triton.jit
def pairs(
    q, k, x, b, h, first, start, length,
    K: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_T: tl.constexpr, BY_KEY: tl.constexpr,
):  # fmt: skip
    """(<q_i, k_j D_ij> for j <= i, E, ahead q, ahead k, behind k, whole [BLOCK_K])."""
    i = tl.arange(0, BLOCK_T)
    if BY_KEY:
        channels = tl.arange(0, BLOCK_K)
        wide_q, wide_k = q.to(tl.float32), k.to(tl.float32)
        scores = tl.zeros([BLOCK_T, BLOCK_T], tl.float32)
        erase = tl.zeros([BLOCK_T, BLOCK_T], tl.float32)
        decays = no_decays(BLOCK_T, BLOCK_K)
        for n in tl.range(0, BLOCK_T):
            j = BLOCK_T - 1 - n
            logs = head_ptr(x.gate, b, h, first)
            own = channel_factor(logs, x.gate, start + j, length, channels, K)
            decays = next_decays(decays, own, j, BLOCK_T, False)
            row = operand_row(x.k, b, h, first, start + j, length, channels, K)
            decayed = decays[0] * row[None, :]
            here = (i == j)[None, :]
            scores = tl.where(here, tl.sum(wide_q * decayed, 1)[:, None], scores)
            erase = tl.where(here, tl.sum(wide_k * decayed, 1)[:, None], erase)
        ahead, behind, whole = channel_edges(decays, False)
        q_ahead, k_ahead, k_behind = wide_q * ahead, wide_k * ahead, wide_k * behind
    else:
        between, ahead, behind, total = of_numbers(
            x.gate, b, h, first, start, length, BLOCK_T, False
        )
        DTYPE: tl.constexpr = x.k.view.ptr.dtype.element_ty
        scores = tl.where(between > 0.0, product(q, tl.trans(k), DTYPE) * between, 0.0)
        erase = tl.where(between > 0.0, product(k, tl.trans(k), DTYPE) * between, 0.0)
        q_ahead = q.to(tl.float32) * ahead[:, None]
        k_ahead = k.to(tl.float32) * ahead[:, None]
        k_behind = k.to(tl.float32) * behind[:, None]
        whole = tl.full([BLOCK_K], 1.0, tl.float32) * total
    erase = tl.where(i[:, None] > i[None, :], erase, 0.0)
    return scores, erase, q_ahead, k_ahead, k_behind, whole


@triton.jit
def inverse(erase, beta, BLOCK_T: tl.constexpr):
    """M = (I + diag(beta) erase)^-1: row i is e_i - beta_i sum_{j<i} erase_ij M_j."""
    i = tl.arange(0, BLOCK_T)
    by_row = tl.trans(erase * beta[:, None])
    m = tl.where(i[:, None] == i[None, :], 1.0, 0.0)
    for n in tl.range(1, BLOCK_T):
        factors = tl.sum(tl.where((i == n)[None, :], by_row, 0.0), 1)
        row = tl.sum(factors[:, None] * m, 0)
        m = tl.where((i == n)[:, None], m - row[None, :], m)
    return m


@triton.jit
def exact(a, b):
    """a b of fp32 tiles in fp32."""
    acc = tl.zeros([a.shape[0], b.shape[1]], tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def state_tile(pointer, n, h, heads, column, K: tl.constexpr, V: tl.constexpr,
               BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr):  # fmt: skip
    """(pointers [BLOCK_K, BLOCK_C] into fp32 [N, HV, K, V] from ``column`` on, their mask)."""
    r, c = tl.arange(0, BLOCK_K)[:, None], column + tl.arange(0, BLOCK_C)[None, :]
    own = tl.cast(n, tl.int64) * heads + h
    return pointer + own * (K * V) + r * V + c, (r < K) & (c < V)


@triton.jit
def store_tile(
    view, shift, value, b, h, first, start, length, column,
    SIZE: tl.constexpr, BLOCK_T: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Stores a tile [BLOCK_T, WIDTH] of rows ``start ..`` from ``column`` on, ``shift`` further."""
    base = head_ptr(view, b, h, first) + column + shift
    real = start + tl.arange(0, BLOCK_T) < length
    mask = real[:, None] & (column + tl.arange(0, WIDTH) < SIZE)[None, :]
    tl.store(tile_ptr(base, start, view, BLOCK_T, WIDTH), value, mask=mask)


@triton.jit(do_not_specialize=["count", "heads", "tiles"])
def delta_fwd(
    x, out, initial, final, ends, count, heads, tiles,
    K: tl.constexpr, V: tl.constexpr, BY_KEY: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """x: a Delta; out: a View; initial, final: fp32 [N, HV, K, V] or None; ends: see ``walk``."""
    DTYPE: tl.constexpr = x.k.view.ptr.dtype.element_ty
    pid = tl.program_id(0)
    column = pid % tiles * BLOCK_C
    h = pid // tiles % heads
    n = pid // tiles // heads
    b = n
    if ends is not None:
        b = 0
    first, length = packed_span(ends, count, n)
    state = tl.zeros([BLOCK_K, BLOCK_C], tl.float32)
    if initial is not None:
        at, inner = state_tile(initial, n, h, heads, column, K, V, BLOCK_K, BLOCK_C)
        state = tl.load(at, mask=inner, other=0.0)
    for start in tl.range(0, length, BLOCK_T):
        rows = start + tl.arange(0, BLOCK_T)
        q = operand(x.q, b, h, first, start, length, 0, K, BLOCK_T, BLOCK_K)
        k = operand(x.k, b, h, first, start, length, 0, K, BLOCK_T, BLOCK_K)
        v = operand(x.v, b, h, first, start, length, column, V, BLOCK_T, BLOCK_C)
        beta = row_numbers(x.beta, b, h, first, rows, length)
        scores, erase, q_ahead, k_ahead, k_behind, whole = pairs(
            q, k, x, b, h, first, start, length, K, BLOCK_K, BLOCK_T, BY_KEY
        )
        error = v.to(tl.float32) - product(k_ahead, state, DTYPE)
        write = exact(inverse(erase, beta, BLOCK_T), error * beta[:, None])
        y = product(q_ahead, state, DTYPE) + product(scores, write, DTYPE)
        state = state * whole[:, None] + product(tl.trans(k_behind), write, DTYPE)
        store_tile(out, 0, y * x.scale, b, h, first, start, length, column, V, BLOCK_T, BLOCK_C)
    if final is not None:
        at, inner = state_tile(final, n, h, heads, column, K, V, BLOCK_K, BLOCK_C)
        tl.store(at, state, mask=inner)
