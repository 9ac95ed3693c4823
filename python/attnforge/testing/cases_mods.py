"""Features of single scores for test cases: keywords made from names, with values from a seed.

A name is a feature and, after a colon, how it broadcasts or which kind it is: "key_bias",
"key_bias:b" (one for all batch entries), "bias:bh" (one for batch and heads), "score_fn:relu",
"mask:tree" (of the last keys alone), "rope:interleaved".
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

__all__ = ["Sizes", "options"]


class Sizes(NamedTuple):
    """Of one call; batch is None for packed tensors of ``sequences``."""

    batch: int | None
    sequences: int
    rows: int
    keys: int
    heads: int
    heads_kv: int
    dim: int


def options(
    names: Iterable[str], n: Sizes, dtype: torch.dtype, g: torch.Generator
) -> dict[str, Any]:
    """Keywords of a flash call."""
    out: dict[str, Any] = {}
    for name in names:
        feature, _, kind = name.partition(":")
        out |= _ONE[feature](n, kind, dtype, g)
    return out


def _lead(n: Sizes, kind: str) -> tuple[int, ...]:
    """[B|1, Hq|1]; "b" and "h" in ``kind`` broadcast."""
    batch = () if n.batch is None else (1 if "b" in kind else n.batch,)
    return (*batch, 1 if "h" in kind else n.heads)


def _stat(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype is torch.float64 else torch.float32


def _normal(g: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(shape, generator=g, dtype=torch.float64)


def _ints(g: torch.Generator, low: int, high: int, *shape: int) -> Tensor:
    return torch.randint(low, high, shape, generator=g, dtype=torch.int32)


def _windows(n: Sizes, _: str, __: torch.dtype, g: torch.Generator) -> dict[str, Any]:
    return {"window_size": _ints(g, -1, 24, n.heads, 2)}


def _prefix(n: Sizes, _: str, __: torch.dtype, g: torch.Generator) -> dict[str, Any]:
    return {"prefix_lens": _ints(g, 0, n.keys + 1, n.sequences)}


def _segments(n: Sizes, _: str, __: torch.dtype, g: torch.Generator) -> dict[str, Any]:
    batch = () if n.batch is None else (n.batch,)
    return {"segment_ids_q": _ints(g, 0, 3, *batch, n.rows),
            "segment_ids_k": _ints(g, 0, 3, *batch, n.keys)}  # fmt: skip


def _mask(n: Sizes, kind: str, _: torch.dtype, g: torch.Generator) -> dict[str, Any]:
    covered = min(n.keys, 11) if "tree" in kind else n.keys
    lead = _lead(n, kind.removeprefix("tree"))
    return {"mask": torch.rand(*lead, n.rows, covered, generator=g) > 0.4}


def _key_bias(n: Sizes, kind: str, dtype: torch.dtype, g: torch.Generator) -> dict[str, Any]:
    return {"key_bias": _normal(g, *_lead(n, kind), n.keys).to(_stat(dtype))}


def _bias(n: Sizes, kind: str, dtype: torch.dtype, g: torch.Generator) -> dict[str, Any]:
    stored = torch.float32 if "w" in kind else dtype
    return {"bias": _normal(g, *_lead(n, kind), n.rows, n.keys).to(stored)}


def _rel_bias(n: Sizes, kind: str, dtype: torch.dtype, g: torch.Generator) -> dict[str, Any]:
    radius = int(kind.strip("h") or 9)
    return {"rel_bias": _normal(g, 1 if "h" in kind else n.heads, 2 * radius + 1).to(_stat(dtype))}


def _log_forget(n: Sizes, kind: str, dtype: torch.dtype, g: torch.Generator) -> dict[str, Any]:
    *batch, heads = _lead(n, kind.replace("b", ""))
    gates = torch.nn.functional.logsigmoid(_normal(g, *batch, n.keys, heads) + 2)
    return {"log_forget": gates.to(_stat(dtype)), "causal": True}


def _row_scale(n: Sizes, kind: str, dtype: torch.dtype, g: torch.Generator) -> dict[str, Any]:
    return {"row_scale": _normal(g, *_lead(n, kind), n.rows).to(_stat(dtype))}


def _score_fn(_: Sizes, kind: str, __: torch.dtype, ___: torch.Generator) -> dict[str, Any]:
    return {"score_fn": kind}


def _dropout(_: Sizes, __: str, ___: torch.dtype, g: torch.Generator) -> dict[str, Any]:
    seed, offset = (int(torch.randint(0, 1 << 62, (), generator=g)) for _ in range(2))
    return {"dropout_p": 0.3, "dropout_seed": seed, "dropout_offset": offset}


def _rope(n: Sizes, kind: str, dtype: torch.dtype, g: torch.Generator) -> dict[str, Any]:
    half = max(1, n.dim // 2 if "part" not in kind else n.dim // 2 - 3)
    heads = n.heads_kv if "heads" in kind else 1
    angles = _normal(g, heads, 40, half) * 3
    tables = (angles.cos().to(_stat(dtype)), angles.sin().to(_stat(dtype)))
    found: dict[str, Any] = {"rope": tables, "rope_interleaved": "interleaved" in kind}
    if "at" in kind:  # some beyond the tables, on either side
        batch = () if n.batch is None else (1 if "b" in kind else n.batch,)
        found["positions_q"] = _ints(g, -9, 60, *batch, n.rows)
        found["positions_k"] = _ints(g, -9, 60, *batch, n.keys)
    return found


def _descale(n: Sizes, kind: str, _: torch.dtype, g: torch.Generator) -> dict[str, Any]:
    heads = (n.heads_kv,) if "one" not in kind else ()
    shape = heads if "b" in kind or not heads else (n.sequences, *heads)
    names = ("k_descale", "v_descale") if "kv" in kind else ("q_descale", "k_descale", "v_descale")
    return {name: torch.rand(shape, generator=g) + 0.5 for name in names}


def _out(_: Sizes, kind: str, __: torch.dtype, ___: torch.Generator) -> dict[str, Any]:
    return {"out_dtype": getattr(torch, kind)}


_ONE = {
    "windows": _windows,
    "prefix": _prefix,
    "segments": _segments,
    "mask": _mask,
    "key_bias": _key_bias,
    "bias": _bias,
    "rel_bias": _rel_bias,
    "log_forget": _log_forget,
    "row_scale": _row_scale,
    "score_fn": _score_fn,
    "dropout": _dropout,
    "rope": _rope,
    "descale": _descale,
    "out": _out,
}
