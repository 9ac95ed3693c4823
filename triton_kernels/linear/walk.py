"""The additive recurrence over one sequence of a head, and with other operands its gradients.

    S_t = decay_t S_{t-1} + write_t x_t^T        y_t = S_t^T read_t        forwards or backwards

    o    reads q,   writes k,   x = v     forwards, the state [K, V]
    dq   reads dO,  writes v,   x = k     forwards, [V, K]
    dv   reads k,   writes q,   x = dO    backwards, [K, V]
    dk   reads v,   writes dO,  x = q     backwards, [V, K]

Algorithm (chunkwise form of Yang et al., 2024): a program owns BLOCK_C columns of a state, which
stay in registers from the first token to the last. Per chunk of BLOCK_T tokens, S of its start,

    y = ahead (read S) + (read write^T * between) x        S <- whole S + (behind write)^T x

and decays of ``decays``: numbers (DECAY 0, also without a gate), or one per row (1) or column (2)
of the state. No state of a chunk goes to memory, forwards or backwards; nothing is kept from one
to the other. Columns are independent, so that results do not depend on the split.

A denominator d_t = scale q_t^T z_t: o carries z beside S and divides by it. In gradients z is one
more row of the state, ``extra`` its entry of dO, and the other operand has 1 there. BOTH: all
writes first, then all reads. Gradients of gates are sums over time of <other, y> of dq less that of
dk (of o and dv for gates of value channels): ``sides`` takes them per column tile, or per channel,
where the backward walk also sums them from the end.

Cost: 4 R C flops per token for the state, and 2 BLOCK_T (R + BLOCK_C) in the chunk; R is read
ceil(C / BLOCK_C) times. Numerics: states and sums are fp32. Beside 16-bit inputs operands of
products are rounded to bf16, or with fp16, whose range states leave, to tf32.
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
from attnforge.triton_kernels.tensors import head_ptr, tile_ptr

NUMBERS, ROWS, COLUMNS = (tl.constexpr(n) for n in range(3))  # what a decay belongs to


# In a tuple of tuples Triton 3.6 forgets inside loops that an inner number is the constant 1, but
# where a constant of the outer tuple comes after it: ``seal``.


class Operand(NamedTuple):
    """Rows of a walk: a View, the value heads that share a head of it, a factor per row."""

    view: Any
    group: Any
    factor: Any  # View of fp32 [B, T, HV], or None
    seal: Any = None


class Roles(NamedTuple):
    """What is read, written and mixed, and what multiplies reads and writes."""

    read: Any
    write: Any
    x: Any
    read_gain: Any
    write_gain: Any
    gate: Any  # View of fp32 [B, T, HV] or [B, T, HV, channels], or None
    extra: Any  # View of fp32 [B, T, HV], or None; of reads forwards and of writes backwards
    seal: Any = None


class States(NamedTuple):
    """Initial and final states [N, HV, rows, columns], and z [N, HV, rows or columns], fp32."""

    first: Any  # pointers, or None
    last: Any
    z_first: Any
    z_last: Any
    row: Any  # strides of a state in elements
    column: Any


class Sink(NamedTuple):
    """Where y goes. Denominators: kind 1 is n / (d + eps), 2 is n / max(|d|, eps)."""

    out: Any  # View, or None
    low: Any  # View for what rounding drops, or None
    den: Any  # View of fp32 [B, T, HV], or None
    eps: Any
    seal: Any = None


class Sides(NamedTuple):
    """Terms of a gate's gradient."""

    other: Any  # Operand; meant only with terms (a tuple that holds None compares with none)
    terms: Any  # View of fp32 [tiles, B, T, HV] or [B, T, HV, columns]
    tile: Any  # elements from tile to tile, or None for channels
    end: Any  # fp32 [N, HV, columns]: where sums of channels start, or None forwards
    seal: Any = None


@triton.jit
def product(a, b, DTYPE: tl.constexpr):
    """a b in fp32, from operands as tensor cores take them beside inputs of DTYPE."""
    acc = tl.zeros([a.shape[0], b.shape[1]], tl.float32)
    if tl.bfloat16 == DTYPE:
        acc = tl.dot(a.to(tl.bfloat16), b.to(tl.bfloat16), acc)
    elif tl.float16 == DTYPE:
        acc = tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="tf32")
    else:
        acc = tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="ieee")
    return acc


@triton.jit
def row_numbers(view, b, h, first, rows, length):
    """Numbers of ``rows`` of a View of fp32 [B, T, HV], 0 past the end."""
    at = head_ptr(view, b, h, first) + tl.cast(rows, tl.int64) * view.row
    return tl.load(at, mask=rows < length, other=0.0)


@triton.jit
def operand(x, b, h, first, start, length, column, SIZE: tl.constexpr, BLOCK_T: tl.constexpr,
            WIDTH: tl.constexpr):  # fmt: skip
    """A tile [BLOCK_T, WIDTH] of an Operand from ``column`` on, times its factor."""
    base = head_ptr(x.view, b, h // x.group, first) + column
    rows = start + tl.arange(0, BLOCK_T)
    mask = (rows < length)[:, None] & (column + tl.arange(0, WIDTH) < SIZE)[None, :]
    tile = tl.load(tile_ptr(base, start, x.view, BLOCK_T, WIDTH), mask=mask, other=0.0)
    if x.factor is not None:
        tile = tile.to(tl.float32) * row_numbers(x.factor, b, h, first, rows, length)[:, None]
    return tile


@triton.jit
def operand_row(x, b, h, first, row, length, columns, SIZE: tl.constexpr):
    """One row of an Operand in fp32, times its factor; 0 past the end."""
    at = head_ptr(x.view, b, h // x.group, first) + tl.cast(row, tl.int64) * x.view.row + columns
    value = tl.load(at, mask=(columns < SIZE) & (row < length), other=0.0).to(tl.float32)
    if x.factor is not None:
        value = value * row_numbers(x.factor, b, h, first, row, length)
    return value


@triton.jit
def by_rows(
    read, roles, b, h, first, start, length,
    R: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_T: tl.constexpr, BACKWARD: tl.constexpr,
):  # fmt: skip
    """(scores, ahead, behind, whole) with a decay per row of the state, a column at a time."""
    i = tl.arange(0, BLOCK_T)
    channels = tl.arange(0, BLOCK_R)
    read = read.to(tl.float32)
    scores = tl.zeros([BLOCK_T, BLOCK_T], tl.float32)
    decays = no_decays(BLOCK_T, BLOCK_R)
    for n in tl.range(0, BLOCK_T):
        j = n if BACKWARD else BLOCK_T - 1 - n
        gate_head = head_ptr(roles.gate, b, h, first)
        own = channel_factor(gate_head, roles.gate, start + j, length, channels, R)
        decays = next_decays(decays, own, j, BLOCK_T, BACKWARD)
        row = operand_row(roles.write, b, h, first, start + j, length, channels, R)
        score = tl.sum(read * decays[0] * row[None, :], 1)
        scores = tl.where((i == j)[None, :], score[:, None], scores)
    ahead, behind, whole = channel_edges(decays, BACKWARD)
    return scores, ahead, behind, whole


@triton.jit
def by_columns(
    scores, roles, b, h, first, start, length, column,
    C: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_T: tl.constexpr, BACKWARD: tl.constexpr,
):  # fmt: skip
    """(scores x with a decay per column of the state, ahead, behind, whole), a row at a time."""
    i = tl.arange(0, BLOCK_T)
    channels = column + tl.arange(0, BLOCK_C)
    y = tl.zeros([BLOCK_T, BLOCK_C], tl.float32)
    decays = no_decays(BLOCK_T, BLOCK_C)
    for n in tl.range(0, BLOCK_T):
        j = n if BACKWARD else BLOCK_T - 1 - n
        gate_head = head_ptr(roles.gate, b, h, first)
        own = channel_factor(gate_head, roles.gate, start + j, length, channels, C)
        decays = next_decays(decays, own, j, BLOCK_T, BACKWARD)
        row = operand_row(roles.x, b, h, first, start + j, length, channels, C)
        score = tl.sum(tl.where((i == j)[None, :], scores, 0.0), 1)
        y += score[:, None] * decays[0] * row[None, :]
    ahead, behind, whole = channel_edges(decays, BACKWARD)
    return y, ahead, behind, whole


@triton.jit
def running(terms, carry, gate_head, gate, start, length, channels, C, BLOCK_T: tl.constexpr):
    """(sums of ``terms`` from each row to the end, the carry); a reset begins them anew."""
    i = tl.arange(0, BLOCK_T)[:, None]
    sums = tl.zeros_like(terms)
    for n in tl.range(0, BLOCK_T):
        j = BLOCK_T - 1 - n
        own = channel_factor(gate_head, gate, start + j, length, channels, C)
        carry += tl.sum(tl.where(i == j, terms, 0.0), 0).to(tl.float64)
        carry = tl.where(own == 0.0, 0.0, carry)
        sums = tl.where(i == j, carry.to(tl.float32)[None, :], sums)
    return sums, carry


@triton.jit
def finish(
    y, den, sink, sides, carry, gate, b, h, first, start, length, column, tile,
    C: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr, BACKWARD: tl.constexpr,
    NORM: tl.constexpr,
):  # fmt: skip
    """Stores y and what belongs to it; returns the carry of a gate's sums."""
    rows = start + tl.arange(0, BLOCK_T)
    real = rows < length
    mask = real[:, None] & (column + tl.arange(0, BLOCK_C) < C)[None, :]
    if NORM:
        at = head_ptr(sink.den, b, h, first) + rows.to(tl.int64) * sink.den.row
        tl.store(at, den, mask=real & (tile == 0))
        base = den + sink.eps if NORM == 1 else tl.maximum(tl.abs(den), sink.eps)
        y = y / base[:, None]
    if sides.terms is not None:
        other = operand(sides.other, b, h, first, start, length, column, C, BLOCK_T, BLOCK_C)
        terms = other.to(tl.float32) * y
        if sides.tile is not None:
            at = head_ptr(sides.terms, b, h, first) + tl.cast(tile, tl.int64) * sides.tile
            tl.store(at + rows.to(tl.int64) * sides.terms.row, tl.sum(terms, 1), mask=real)
        else:
            base = head_ptr(sides.terms, b, h, first) + column
            at = tile_ptr(base, start, sides.terms, BLOCK_T, BLOCK_C)
            if BACKWARD:
                terms = tl.load(at, mask=mask, other=0.0) - terms
                gate_head = head_ptr(gate, b, h, first)
                channels = column + tl.arange(0, BLOCK_C)
                terms, carry = running(
                    terms, carry, gate_head, gate, start, length, channels, C, BLOCK_T
                )
            tl.store(at, terms, mask=mask)
    if sink.out is not None:
        base = head_ptr(sink.out, b, h, first) + column
        rounded = y.to(sink.out.ptr.dtype.element_ty)
        tl.store(tile_ptr(base, start, sink.out, BLOCK_T, BLOCK_C), rounded, mask=mask)
        if sink.low is not None:
            base = head_ptr(sink.low, b, h, first) + column
            rest = y - rounded.to(tl.float32)
            tl.store(tile_ptr(base, start, sink.low, BLOCK_T, BLOCK_C), rest, mask=mask)
    return carry


@triton.jit
def chunk(
    state, z, extra, roles, b, h, first, start, length, column,
    R: tl.constexpr, C: tl.constexpr, DECAY: tl.constexpr, BACKWARD: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, NORM: tl.constexpr,
):  # fmt: skip
    """(y, d, state and z behind the chunk), gains of reads left out."""
    DTYPE: tl.constexpr = roles.x.view.ptr.dtype.element_ty
    read = operand(roles.read, b, h, first, start, length, 0, R, BLOCK_T, BLOCK_R)
    write = operand(roles.write, b, h, first, start, length, 0, R, BLOCK_T, BLOCK_R)
    x = operand(roles.x, b, h, first, start, length, column, C, BLOCK_T, BLOCK_C)
    left = x.to(tl.float32) * roles.write_gain
    if DECAY == ROWS:
        scores, ahead, behind, whole = by_rows(
            read, roles, b, h, first, start, length, R, BLOCK_R, BLOCK_T, BACKWARD
        )
        read = read.to(tl.float32) * ahead
        write = write.to(tl.float32) * behind
        y = product(scores * roles.write_gain, x, DTYPE) + product(read, state, DTYPE)
        state = state * whole[:, None] + product(tl.trans(write), left, DTYPE)
        den = tl.sum(scores, 1)
        if NORM:
            den += tl.sum(read * z[None, :], 1)
            z = z * whole + tl.sum(write, 0)
    else:
        scores = product(read, tl.trans(write), DTYPE)
        far = product(read, state, DTYPE)
        if extra is not None:
            scores += extra[None, :] if BACKWARD else extra[:, None]
            far += z[None, :] if BACKWARD else extra[:, None] * z[None, :]
        if DECAY == COLUMNS:
            y, ahead, behind, whole = by_columns(
                scores, roles, b, h, first, start, length, column, C, BLOCK_C, BLOCK_T, BACKWARD
            )
            y = y * roles.write_gain + far * ahead
            left = left * behind
            state = state * whole[None, :]
        else:
            between, ahead, behind, whole = of_numbers(
                roles.gate, b, h, first, start, length, BLOCK_T, BACKWARD
            )
            scores = tl.where(between > 0.0, scores * between, 0.0)
            y = product(scores * roles.write_gain, x, DTYPE) + far * ahead[:, None]
            left = left * behind[:, None]
            state = state * whole
        den = tl.sum(scores, 1)
        if NORM:
            den += tl.sum(read.to(tl.float32) * z[None, :], 1) * ahead
            z = z * whole + tl.sum(write.to(tl.float32) * behind[:, None], 0)
        state += product(tl.trans(write), left, DTYPE)
        if extra is not None:
            z = z * whole + tl.sum(left * extra[:, None] if BACKWARD else left, 0)
    return y, den, state, z


@triton.jit
def all_writes(
    state, z, roles, b, h, first, length, column,
    R: tl.constexpr, C: tl.constexpr, BACKWARD: tl.constexpr, BLOCK_T: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, NORM: tl.constexpr,
):  # fmt: skip
    """(state, z) after the whole sequence, without decays."""
    DTYPE: tl.constexpr = roles.x.view.ptr.dtype.element_ty
    for start in tl.range(0, length, BLOCK_T):
        write = operand(roles.write, b, h, first, start, length, 0, R, BLOCK_T, BLOCK_R)
        x = operand(roles.x, b, h, first, start, length, column, C, BLOCK_T, BLOCK_C)
        left = x.to(tl.float32) * roles.write_gain
        state += product(tl.trans(write), left, DTYPE)
        if NORM:
            z += tl.sum(write.to(tl.float32), 0)
        if roles.extra is not None:
            if BACKWARD:
                rows = start + tl.arange(0, BLOCK_T)
                left = left * row_numbers(roles.extra, b, h, first, rows, length)[:, None]
            z += tl.sum(left, 0)
    return state, z


@triton.jit(do_not_specialize=["count", "heads", "tiles"])
def walk(
    roles, states, sink, sides, ends, count, heads, tiles,
    R: tl.constexpr, C: tl.constexpr, DECAY: tl.constexpr, NORM: tl.constexpr,
    BACKWARD: tl.constexpr, BOTH: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """A tile of columns of a state: one program, over all tokens of its sequence.

    ends: int32 [N + 1] of packed sequences, or None; count: rows of a sequence, or of all.
    """
    pid = tl.program_id(0)
    tile = pid % tiles
    h = pid // tiles % heads
    n = pid // tiles // heads
    b = n
    if ends is not None:
        b = 0
    first, length = packed_span(ends, count, n)
    column = tile * BLOCK_C
    r, c = tl.arange(0, BLOCK_R), column + tl.arange(0, BLOCK_C)
    own = tl.cast(n, tl.int64) * heads + h
    at = own * (R * C) + r[:, None] * states.row + c[None, :] * states.column
    inner = (r < R)[:, None] & (c < C)[None, :]
    state = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    if states.first is not None:
        state = tl.load(states.first + at, mask=inner, other=0.0)
    if NORM:  # z is a column that o divides by: every tile has it
        z_at, z_real = own * R + r, r < R
        z = tl.zeros([BLOCK_R], tl.float32)
    else:  # z is a row of a transposed state
        z_at, z_real = own * C + c, c < C
        z = tl.zeros([BLOCK_C], tl.float32)
    if states.z_first is not None:
        z = tl.load(states.z_first + z_at, mask=z_real, other=0.0)
    carry = tl.zeros([BLOCK_C], tl.float64)
    if sides.end is not None:
        carry = tl.load(sides.end + own * C + c, mask=c < C, other=0.0).to(tl.float64)
    if BOTH:
        state, z = all_writes(
            state, z, roles, b, h, first, length, column, R, C, BACKWARD, BLOCK_T, BLOCK_R,
            BLOCK_C, NORM,
        )  # fmt: skip
    chunks = tl.cdiv(length, BLOCK_T)
    for t in tl.range(0, chunks):
        start = t * BLOCK_T
        if BACKWARD:
            start = (chunks - 1 - t) * BLOCK_T
        extra = None
        if roles.extra is not None:
            rows = start + tl.arange(0, BLOCK_T)
            extra = row_numbers(roles.extra, b, h, first, rows, length)
        if BOTH:
            read = operand(roles.read, b, h, first, start, length, 0, R, BLOCK_T, BLOCK_R)
            y = product(read, state, roles.x.view.ptr.dtype.element_ty)
            den = tl.zeros([BLOCK_T], tl.float32)
            if NORM:
                den = tl.sum(read.to(tl.float32) * z[None, :], 1)
            if extra is not None:
                y += z[None, :] if BACKWARD else extra[:, None] * z[None, :]
        else:
            y, den, state, z = chunk(
                state, z, extra, roles, b, h, first, start, length, column, R, C, DECAY, BACKWARD,
                BLOCK_T, BLOCK_R, BLOCK_C, NORM,
            )  # fmt: skip
        carry = finish(
            y * roles.read_gain, den * roles.read_gain, sink, sides, carry, roles.gate, b, h,
            first, start, length, column, tile, C, BLOCK_T, BLOCK_C, BACKWARD, NORM,
        )  # fmt: skip
    if states.last is not None:
        tl.store(states.last + at, state, mask=inner)
    if states.z_last is not None:
        tl.store(states.z_last + z_at, z, mask=z_real & ((tile == 0) | (NORM == 0)))
