"""Backward of the delta rules: the chunks of a head from right to left, states made again.

With the names of ``delta``, dS the gradient of a chunk's end state and E its erase matrix,

    dwrite = M^T (scores^T scale dO + (behind k) dS)      derror = beta dwrite = dv
    dbeta  = <dwrite, error> per token                    error = w / beta, without the division
    dscores = tril(scale dO w^T)                          dE = -stril(derror w^T)
    dS <- whole dS + (ahead q)^T scale dO - (ahead k)^T derror

and q and k take their gradients from dscores, dE and the products with S and dS. With dk split into
what k erases (read) and writes, a gate's gradient is the sum of q dq + k dk_read - k dk_write
from its token to the end of the chunk, and of whole <dS, S> + sum (behind k) d(behind k).

Algorithm: a program owns BLOCK_C columns of a state. It walks forward once and keeps the state of
every 8th chunk, then takes these segments from the right: a second walk puts the states of its 8
chunks into a workspace of its own, which stays in L2, and they are used in turn. Sums over columns
(dq, dk, dbeta, dg) leave as parts per column tile, in fp32; the launcher adds them. No atomics.

Cost: 24 K C flops per token, about 4 times the forward. Memory: T / 128 states per head, 8 more per
program. Numerics: as the forward; what 16 x 16 matrices multiply is fp32 but for dq and dk.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from attnforge.triton_kernels.lang import packed_span
from attnforge.triton_kernels.linear.decays import (
    RESET,
    channel_edges,
    channel_factor,
    next_decays,
    no_decays,
    of_numbers,
)
from attnforge.triton_kernels.linear.delta import exact, inverse, pairs, state_tile, store_tile
from attnforge.triton_kernels.linear.walk import operand, operand_row, product, row_numbers
from attnforge.triton_kernels.tensors import head_ptr

SEGMENT = tl.constexpr(8)  # chunks whose states are made again at once


class Parts(NamedTuple):
    """Gradients of a column tile: Views of [B, T, HV, K] or [B, T, HV], and how far the next is."""

    q: Any
    k: Any
    beta: Any
    gate: Any  # or None
    channels: Any  # from tile to tile in q, k and gates of channels
    numbers: Any  # in beta and gates of numbers
    seal: Any = None


@triton.jit
def errors(
    state, x, b, h, first, start, length, column,
    K: tl.constexpr, V: tl.constexpr, BY_KEY: tl.constexpr, BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr, QUERIES: tl.constexpr,
):  # fmt: skip
    """A chunk's (q, k, beta, what ``pairs`` gives, M, v less what the state has, w)."""
    k = operand(x.k, b, h, first, start, length, 0, K, BLOCK_T, BLOCK_K)
    q = k
    if QUERIES:
        q = operand(x.q, b, h, first, start, length, 0, K, BLOCK_T, BLOCK_K)
    v = operand(x.v, b, h, first, start, length, column, V, BLOCK_T, BLOCK_C)
    rows = start + tl.arange(0, BLOCK_T)
    beta = row_numbers(x.beta, b, h, first, rows, length)
    both = pairs(q, k, x, b, h, first, start, length, K, BLOCK_K, BLOCK_T, BY_KEY)
    m = inverse(both[1], beta, BLOCK_T)
    lacks = v.to(tl.float32) - product(both[3], state, x.k.view.ptr.dtype.element_ty)
    return q, k, beta, both, m, lacks, exact(m, lacks * beta[:, None])


@triton.jit
def advance(
    state, x, b, h, first, start, length, column,
    K: tl.constexpr, V: tl.constexpr, BY_KEY: tl.constexpr, BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """The state behind a chunk."""
    _q, _k, _beta, both, _m, _lacks, write = errors(
        state, x, b, h, first, start, length, column, K, V, BY_KEY, BLOCK_T, BLOCK_K, BLOCK_C, False
    )
    left = product(tl.trans(both[4]), write, x.k.view.ptr.dtype.element_ty)
    return state * both[5][:, None] + left


@triton.jit
def through_numbers(
    q, k, dscores, derase, dq, dk_read, dk_write, x, b, h, first, start, length,
    BLOCK_T: tl.constexpr,
):  # fmt: skip
    """(dq, dk_read, dk_write) with what comes through scores and E; decays are numbers."""
    DTYPE: tl.constexpr = x.k.view.ptr.dtype.element_ty
    between, ahead, behind, _whole = of_numbers(x.gate, b, h, first, start, length, BLOCK_T, False)
    dscores, derase = dscores * between, derase * between
    dq = dq * ahead[:, None] + product(dscores, k, DTYPE)
    dk_read = dk_read * ahead[:, None] + product(derase, k, DTYPE)
    dk_write = dk_write * behind[:, None] + product(tl.trans(dscores), q, DTYPE)
    return dq, dk_read, dk_write + product(tl.trans(derase), k, DTYPE)


@triton.jit
def through_channels(
    q, k, dscores, derase, dq, dk_read, dk_write, x, b, h, first, start, length,
    K: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """The same with a decay per key channel, a key at a time."""
    i, channels = tl.arange(0, BLOCK_T), tl.arange(0, BLOCK_K)
    q, k = q.to(tl.float32), k.to(tl.float32)
    near_q = tl.zeros([BLOCK_T, BLOCK_K], tl.float32)
    near_read = tl.zeros([BLOCK_T, BLOCK_K], tl.float32)
    near_write = tl.zeros([BLOCK_T, BLOCK_K], tl.float32)
    decays = no_decays(BLOCK_T, BLOCK_K)
    for n in tl.range(0, BLOCK_T):
        j = BLOCK_T - 1 - n
        logs = head_ptr(x.gate, b, h, first)
        own = channel_factor(logs, x.gate, start + j, length, channels, K)
        decays = next_decays(decays, own, j, BLOCK_T, False)
        row = operand_row(x.k, b, h, first, start + j, length, channels, K)
        here = (i == j)[None, :]
        score = tl.sum(tl.where(here, dscores, 0.0), 1)[:, None] * decays[0]
        erase = tl.sum(tl.where(here, derase, 0.0), 1)[:, None] * decays[0]
        near_q += score * row[None, :]
        near_read += erase * row[None, :]
        written = tl.sum(score * q + erase * k, 0)
        near_write = tl.where((i == j)[:, None], written[None, :], near_write)
    ahead, behind, _whole = channel_edges(decays, False)
    return dq * ahead + near_q, dk_read * ahead + near_read, dk_write * behind + near_write


@triton.jit
def gate_gradient(
    terms, end, x, parts, far, b, h, first, start, length,
    K: tl.constexpr, BY_KEY: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Stores dg: sums to the end of the chunk; a reset has none."""
    rows = start + tl.arange(0, BLOCK_T)
    logs = head_ptr(x.gate, b, h, first) + rows.to(tl.int64) * x.gate.row
    out = head_ptr(parts.gate, b, h, first) + rows.to(tl.int64) * parts.gate.row
    real = rows < length
    if BY_KEY:
        channels = tl.arange(0, BLOCK_K)[None, :]
        mask = real[:, None] & (channels < K)
        log = tl.load(logs[:, None] + channels, mask=mask, other=0.0)
        sums = tl.cumsum(terms, 0, reverse=True) + end[None, :]
        at = out[:, None] + far * parts.channels + channels
        tl.store(at, tl.where(log < RESET, 0.0, sums), mask=mask)
    else:
        log = tl.load(logs, mask=real, other=0.0)
        sums = tl.cumsum(tl.sum(terms, 1), 0, reverse=True) + tl.sum(end, 0)
        tl.store(out + far * parts.numbers, tl.where(log < RESET, 0.0, sums), mask=real)


@triton.jit
def chunk_bwd(
    state, dstate, x, dout, dv, parts, tile, b, h, first, start, length, column,
    K: tl.constexpr, V: tl.constexpr, BY_KEY: tl.constexpr, BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Stores the gradients of a chunk that begins at ``state``; returns dS of its start."""
    DTYPE: tl.constexpr = x.k.view.ptr.dtype.element_ty
    q, k, beta, both, m, lacks, write = errors(
        state, x, b, h, first, start, length, column, K, V, BY_KEY, BLOCK_T, BLOCK_K, BLOCK_C, True
    )
    scores, erase, q_ahead, k_ahead, k_behind, whole = both
    error = lacks - exact(erase, write)
    do = operand(dout, b, h, first, start, length, column, V, BLOCK_T, BLOCK_C)
    do = do.to(tl.float32) * x.scale
    dwrite = exact(tl.trans(scores), do) + product(k_behind, dstate, DTYPE)
    dwrite = exact(tl.trans(m), dwrite)
    derror = dwrite * beta[:, None]
    store_tile(dv, 0, derror, b, h, first, start, length, column, V, BLOCK_T, BLOCK_C)
    far = tl.cast(tile, tl.int64)
    rows = start + tl.arange(0, BLOCK_T)
    at = head_ptr(parts.beta, b, h, first) + rows.to(tl.int64) * parts.beta.row
    tl.store(at + far * parts.numbers, tl.sum(dwrite * error, 1), mask=rows < length)

    i = tl.arange(0, BLOCK_T)
    dscores = tl.where(i[:, None] >= i[None, :], product(do, tl.trans(write), DTYPE), 0.0)
    derase = tl.where(i[:, None] > i[None, :], -product(derror, tl.trans(write), DTYPE), 0.0)
    dq = product(do, tl.trans(state), DTYPE)
    dk_read = -product(derror, tl.trans(state), DTYPE)
    dk_write = product(write, tl.trans(dstate), DTYPE)
    end = whole * tl.sum(dstate * state, 1) + tl.sum(k_behind * dk_write, 0)
    if BY_KEY:
        dq, dk_read, dk_write = through_channels(
            q, k, dscores, derase, dq, dk_read, dk_write, x, b, h, first, start, length, K,
            BLOCK_K, BLOCK_T,
        )  # fmt: skip
    else:
        dq, dk_read, dk_write = through_numbers(
            q, k, dscores, derase, dq, dk_read, dk_write, x, b, h, first, start, length, BLOCK_T
        )
    if parts.gate is not None:
        terms = q.to(tl.float32) * dq + k.to(tl.float32) * (dk_read - dk_write)
        gate_gradient(
            terms, end, x, parts, far, b, h, first, start, length, K, BY_KEY, BLOCK_T, BLOCK_K
        )
    shift = far * parts.channels
    dk = dk_read + dk_write
    store_tile(parts.q, shift, dq, b, h, first, start, length, 0, K, BLOCK_T, BLOCK_K)
    store_tile(parts.k, shift, dk, b, h, first, start, length, 0, K, BLOCK_T, BLOCK_K)
    dstate = dstate * whole[:, None] + product(tl.trans(q_ahead), do, DTYPE)
    return dstate - product(tl.trans(k_ahead), derror, DTYPE)


@triton.jit(do_not_specialize=["count", "heads", "tiles"])
def delta_bwd(
    x, dout, dv, parts, initial, dfinal, dinitial, kept, space, ends, count, heads, tiles,
    K: tl.constexpr, V: tl.constexpr, BY_KEY: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """x: a Delta; dout: an Operand; dv: a View; parts: Parts; initial, dfinal, dinitial or None.

    kept: fp32 [segments, HV, K, V]; a segment's place follows from its first row, see below.
    space: fp32 [programs, SEGMENT, BLOCK_K, BLOCK_C].
    """
    pid = tl.program_id(0)
    tile = pid % tiles
    column = tile * BLOCK_C
    h = pid // tiles % heads
    n = pid // tiles // heads
    b = n
    if ends is not None:
        b = 0
    first, length = packed_span(ends, count, n)
    SPAN: tl.constexpr = SEGMENT * BLOCK_T
    segments = tl.cdiv(length, SPAN)
    # Rows before the sequence hold at most one segment per span, and one more for each sequence.
    place = (tl.cast(b, tl.int64) * count + first) // SPAN + n
    inner = tl.arange(0, BLOCK_K)[:, None] * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    own = space + tl.cast(pid, tl.int64) * (SEGMENT * BLOCK_K * BLOCK_C) + inner
    state = tl.zeros([BLOCK_K, BLOCK_C], tl.float32)
    dstate = tl.zeros([BLOCK_K, BLOCK_C], tl.float32)
    if initial is not None:
        at, mask = state_tile(initial, n, h, heads, column, K, V, BLOCK_K, BLOCK_C)
        state = tl.load(at, mask=mask, other=0.0)
    if dfinal is not None:
        at, mask = state_tile(dfinal, n, h, heads, column, K, V, BLOCK_K, BLOCK_C)
        dstate = tl.load(at, mask=mask, other=0.0)
    for s in tl.range(0, segments):
        to, real = state_tile(kept, place + s, h, heads, column, K, V, BLOCK_K, BLOCK_C)
        tl.store(to, state, mask=real)
        if s + 1 < segments:
            for start in tl.range(s * SPAN, (s + 1) * SPAN, BLOCK_T):
                state = advance(
                    state, x, b, h, first, start, length, column, K, V, BY_KEY, BLOCK_T, BLOCK_K,
                    BLOCK_C,
                )  # fmt: skip
    tl.debug_barrier()
    for t in tl.range(0, segments):
        s = segments - 1 - t
        chunks = tl.cdiv(tl.minimum(length - s * SPAN, SPAN), BLOCK_T)
        to, real = state_tile(kept, place + s, h, heads, column, K, V, BLOCK_K, BLOCK_C)
        state = tl.load(to, mask=real, other=0.0)
        for c in tl.range(0, chunks):
            tl.store(own + c * (BLOCK_K * BLOCK_C), state)
            state = advance(
                state, x, b, h, first, s * SPAN + c * BLOCK_T, length, column, K, V, BY_KEY,
                BLOCK_T, BLOCK_K, BLOCK_C,
            )  # fmt: skip
        tl.debug_barrier()
        for c in tl.range(0, chunks):
            last = chunks - 1 - c
            before = tl.load(own + last * (BLOCK_K * BLOCK_C))
            dstate = chunk_bwd(
                before, dstate, x, dout, dv, parts, tile, b, h, first,
                s * SPAN + last * BLOCK_T, length, column, K, V, BY_KEY, BLOCK_T, BLOCK_K, BLOCK_C,
            )  # fmt: skip
        tl.debug_barrier()
    if dinitial is not None:
        at, mask = state_tile(dinitial, n, h, heads, column, K, V, BLOCK_K, BLOCK_C)
        tl.store(at, dstate, mask=mask)
