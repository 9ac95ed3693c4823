"""Contextual positions (CoPE) in plain PyTorch: the definition of ``cope_fwd``, ``cope_bwd``.

    x_ij = scale <q_i, k_j>;  g_ij = sigmoid(x_ij) where j is visible, else 0
    p_ij = min(sum_{t >= j} g_it, N - 1);  z_i(n) = <q_i, e_n>, linear between whole n
    s_ij = x_ij + z_i(p_ij);  O = softmax(S) V over visible j

with the tables e [D, N] of a head. The gate sees the logit, the table the query as it is. Rows are
walked in chunks, as in ``flash``, whose conventions about sequences, accumulation and hidden NaN
hold here too. At a whole position the slope of z is the one to the right.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from attnforge._params import FlashParams, FlashTape
from attnforge.reference import flash

__all__ = ["backward", "forward"]


class _Positions(NamedTuple):
    """Of a chunk, all [B, Hk, G, R, N]."""

    score: Tensor  # s, hidden places -inf
    gate: Tensor
    floor: Tensor  # int64
    weight: Tensor  # of the position above it
    slope: Tensor  # dz / dp, 0 at the last position


def _suffix(x: Tensor) -> Tensor:
    return x.flip(-1).cumsum(-1).flip(-1)


def _table(rows: Tensor, emb: Tensor) -> Tensor:
    """<q_i, e_n> [B, Hk, G, R, N] of rows [B, Hk, G, R, D]; emb [H|1, D, N]."""
    heads = rows.shape[1:3] if emb.shape[0] > 1 else (1, 1)
    return rows @ emb.to(rows.dtype).view(1, *heads, *emb.shape[1:])


def _positions(x: Tensor, visible: Tensor | None, table: Tensor) -> _Positions:
    top = table.shape[-1] - 1
    gate = torch.sigmoid(x)
    if visible is not None:
        gate = gate.masked_fill(~visible, 0.0)
    at = _suffix(gate).clamp(max=top)
    floor = at.nan_to_num(0.0).to(torch.int64).clamp(0, max(top - 1, 0))
    weight = at - floor
    steps = torch.cat((table.diff(dim=-1), torch.zeros_like(table[..., :1])), -1)
    slope = steps.gather(-1, floor)
    score = x + table.gather(-1, floor) + weight * slope
    if visible is not None:
        score = score.masked_fill(~visible, float("-inf"))
    return _Positions(score, gate, floor, weight, slope.masked_fill(at >= top, 0.0))


def forward(
    q: Tensor, k: Tensor, v: Tensor, emb: Tensor, p: FlashParams,
    out: Tensor, lse: Tensor, out_lo: Tensor,
) -> None:  # fmt: skip
    """Fill ``out``, ``lse`` and, unless it is empty, ``out_lo``. emb [Hq|1, D, N]."""
    acc, heads_kv = flash._accumulator(q.dtype), k.shape[-2]
    if p.cu_seqlens_q is not None:  # rows past the last sequence
        lse.fill_(float("-inf"))
        for x in (out, out_lo):
            x.zero_()
    if out.numel() == 0 or heads_kv == 0:
        return
    for seq in flash._sequences(q, k, p):
        rows = flash._group_rows(flash._cut(q, seq, seq.rows), heads_kv, acc)
        keys, values = (flash._cut(x, seq, seq.keys).to(acc).transpose(1, 2) for x in (k, v))
        heads = rows.shape[0] * q.shape[-2]
        o_view, lse_view = flash._cut(out, seq, seq.rows), flash._cut_stat(lse, seq)
        for chunk in flash._chunks(rows.shape[3], keys.shape[2], heads, p, q.device):
            part = rows[:, :, :, chunk.rows]
            x = flash._split_rows(
                part.flatten(2, 3) @ keys[:, :, chunk.keys].transpose(-1, -2), part.shape[2]
            )
            found = _positions(x * p.softmax_scale, chunk.visible, _table(part, emb))
            prob, stat = _softmax(found.score)
            o = flash._split_rows(
                flash._visible_matmul(
                    prob.flatten(2, 3), values[:, :, chunk.keys], _wide(chunk.visible, part)
                ),
                part.shape[2],
            )
            lse_view[:, :, chunk.rows] = stat.flatten(1, 2).to(lse.dtype)
            o = o.permute(0, 3, 1, 2, 4).flatten(2, 3)
            high = o.to(out.dtype)
            o_view[:, chunk.rows] = high
            if out_lo.numel():
                flash._cut(out_lo, seq, seq.rows)[:, chunk.rows] = (o - high).to(out.dtype)


def _wide(visible: Tensor | None, part: Tensor) -> Tensor | None:
    """[G * R, N] from [R, N]."""
    return None if visible is None else visible.repeat(part.shape[2], 1)


def _softmax(s: Tensor) -> tuple[Tensor, Tensor]:
    """P and the LSE of rows; 0 and -inf where nothing is visible."""
    if s.shape[-1] == 0:
        return s, s.new_full(s.shape[:-1], float("-inf"))
    top = s.amax(-1, keepdim=True)
    base = torch.where(top == float("-inf"), 0.0, top)
    value = torch.exp(s - base)
    total = value.sum(-1, keepdim=True)
    prob = (value / total).masked_fill(total == 0, 0.0)
    stat = (base + torch.log(total)).masked_fill(total == 0, float("-inf"))
    return prob, stat.squeeze(-1)


def backward(
    dout: Tensor, dlse: Tensor | None, tape: FlashTape, emb: Tensor, p: FlashParams,
    grads: tuple[Tensor, Tensor, Tensor, Tensor],
) -> None:  # fmt: skip
    """Fill ``grads = (dq, dk, dv, demb)``."""
    q, k, v, out, lse, out_lo = tape
    dq, dk, dv, demb = grads
    acc, heads_kv = flash._accumulator(q.dtype), k.shape[-2]
    for x in grads:  # unused key slots, rows past the last sequence
        x.zero_()
    if q.numel() == 0 or heads_kv == 0:
        return
    wide = emb.to(acc)
    sum_emb = torch.zeros(q.shape[-2], *emb.shape[1:], dtype=acc, device=q.device)
    for seq in flash._sequences(q, k, p):
        rows, d_out, o = (
            flash._group_rows(flash._cut(x, seq, seq.rows), heads_kv, acc) for x in (q, dout, out)
        )
        if out_lo.numel():
            o = o + flash._group_rows(flash._cut(out_lo, seq, seq.rows), heads_kv, acc)
        delta = (d_out * o).sum(-1, keepdim=True)
        if dlse is not None:
            delta = delta - flash._cut_stat(dlse, seq).to(acc).reshape(delta.shape)
        stat = flash._cut_stat(lse, seq).to(acc).reshape(delta.shape)
        keys, values = (flash._cut(x, seq, seq.keys).to(acc).transpose(1, 2) for x in (k, v))
        heads = rows.shape[0] * q.shape[-2]
        sum_dq, sum_dk, sum_dv = map(torch.zeros_like, (rows, keys, values))
        for chunk in flash._chunks(rows.shape[3], keys.shape[2], heads, p, q.device):
            part, d_part = rows[:, :, :, chunk.rows], d_out[:, :, :, chunk.rows]
            k_part, v_part = keys[:, :, chunk.keys], values[:, :, chunk.keys]
            group, visible = part.shape[2], _wide(chunk.visible, part)
            x = flash._split_rows(part.flatten(2, 3) @ k_part.transpose(-1, -2), group)
            table = _table(part, wide)
            found = _positions(x * p.softmax_scale, chunk.visible, table)
            dp = flash._split_rows(d_part.flatten(2, 3) @ v_part.transpose(-1, -2), group)
            row_lse = stat[:, :, :, chunk.rows]
            hidden = row_lse == float("-inf")
            if chunk.visible is not None:
                hidden = hidden | ~chunk.visible
            prob = torch.exp(found.score - row_lse).masked_fill(hidden, 0.0)
            ds = (prob * (dp - delta[:, :, :, chunk.rows])).masked_fill(hidden, 0.0)
            moves = (ds * found.slope).masked_fill(hidden, 0.0)
            d_table = torch.zeros_like(table)
            high = (ds * found.weight).masked_fill(hidden, 0.0)
            d_table.scatter_add_(-1, found.floor, ds - high)
            above = (found.floor + 1).clamp_max(table.shape[-1] - 1)
            d_table.scatter_add_(-1, above, high)
            bent = (found.gate * (1.0 - found.gate)).masked_fill(hidden, 0.0)
            dx = (ds + bent * moves.cumsum(-1)).masked_fill(hidden, 0.0)
            dx, prob = dx.flatten(2, 3) * p.softmax_scale, prob.flatten(2, 3)
            back = None if visible is None else visible.transpose(-1, -2)
            g = flash._split_rows(flash._visible_matmul(dx, k_part, visible), group)
            sum_dq[:, :, :, chunk.rows] = g + _table(d_table, wide.transpose(-1, -2))
            flat = part.flatten(2, 3)
            sum_dk[:, :, chunk.keys] += flash._visible_matmul(dx.transpose(-1, -2), flat, back)
            sum_dv[:, :, chunk.keys] += flash._visible_matmul(
                prob.transpose(-1, -2), d_part.flatten(2, 3), back
            )
            dead = (row_lse == float("-inf")).expand(part.shape)
            each = part.masked_fill(dead, 0.0).transpose(-1, -2) @ d_table  # [B, Hk, G, D, N]
            sum_emb += each.sum(0).flatten(0, 1)
        flash._cut(dq, seq, seq.rows).copy_(sum_dq.permute(0, 3, 1, 2, 4).flatten(2, 3))
        flash._cut(dk, seq, seq.keys).copy_(sum_dk.transpose(1, 2))
        flash._cut(dv, seq, seq.keys).copy_(sum_dv.transpose(1, 2))
    demb.copy_(sum_emb if emb.shape[0] > 1 else sum_emb.sum(0, keepdim=True))
