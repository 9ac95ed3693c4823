"""Scores, selections and LSH as torch sees them: schemas, fake kernels, a captured graph."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from attnforge import retrieval

OPS = torch.ops.attnforge


@pytest.mark.plain_memory
def test_opcheck(backend: str) -> None:
    q, k = torch.randn(2, 1, 4, 16), torch.randn(2, 20, 2, 16)
    used = torch.tensor([20, 7], dtype=torch.int32)
    counts = torch.ones(2, 2, 20, dtype=torch.int32)
    scores = torch.randn(5, 30)
    limit = torch.zeros(1)
    calls: list[tuple[Any, tuple[Any, ...]]] = [
        (OPS.key_scores, (q, k, None, used, None, 0.25, backend)),
        (OPS.key_scores, (q, k, None, None, counts, 0.25, backend)),
        (OPS.page_scores, (q, k - 1, k + 1, None, None, used, 0.25, False, backend)),
        (OPS.page_scores, (q, k - 1, k + 1, None, None, None, 0.25, True, backend)),
        (OPS.nearest, (k[0].float(), k[0, :, :9].float().contiguous(), None, backend)),
        (OPS.cluster_sums, (k[0].float(), torch.zeros(k.shape[1:3]).long(), 3, backend)),
        (OPS.select_columns, (scores, None, "topk", 4, None, 1.0, 1, 1, 4, backend)),
        (OPS.select_columns, (scores, None, "threshold", 0, limit, 1.0, 0, 0, 30, backend)),
        (OPS.select_columns, (scores, None, "topp", 0, None, 0.5, 0, 0, 9, backend)),
        (OPS.lsh_encode, (k, None, torch.randn(16, 12), 3, 4, backend)),
    ]
    for op, args in calls:
        torch.library.opcheck(op.default, args, test_utils=("test_schema", "test_faketensor"))
    torch.library.opcheck(*(calls[-2][0].default, calls[-2][1]))  # one of them in full


@pytest.mark.plain_memory
def test_opcheck_of_tables(backend: str) -> None:
    starts = torch.zeros(1, 1, 1, 4, 9, dtype=torch.int32)
    ids = torch.zeros(1, 1, 1, 4, 64, dtype=torch.int16)
    codes = torch.randint(0, 8, (1, 1, 50, 4), dtype=torch.int16)
    first, count = torch.tensor([0]).int(), torch.tensor([50]).int()
    insert = (starts, ids, 3, codes, first, count, backend)
    torch.library.opcheck(OPS.lsh_insert.default, insert)
    OPS.lsh_insert(*insert)
    torch.library.opcheck(OPS.lsh_truncate.default, (starts, ids, 3, first + 20, backend))
    q, k = torch.randn(1, 1, 2, 8), torch.randn(1, 50, 1, 8)
    norms = k.norm(dim=-1).transpose(1, 2).contiguous()
    args = (starts, ids, 3, codes[:, :, :2].transpose(1, 2).reshape(1, 2, 4), q, k, None, norms,
            first, count, 2, 0.0, backend)  # fmt: skip
    # What stands behind a length is undefined, so outputs cannot be compared as a whole.
    torch.library.opcheck(
        OPS.lsh_retrieve.default, args, test_utils=("test_schema", "test_faketensor")
    )


def test_compile(cpu: str) -> None:
    q, k = torch.randn(2, 1, 4, 16), torch.randn(2, 40, 2, 16)

    def call(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        scores = retrieval.score_pages(q, *retrieval.page_bounds(k, 8))[:, :, 0]
        return retrieval.select_topk(scores, 3, last=1)

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    for got, want in zip(compiled(q, k), call(q, k), strict=True):
        assert torch.equal(got, want)
