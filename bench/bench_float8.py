"""fp8 beside bf16, as a pytest-benchmark suite: decodes over a long cache, and a prefill.

    pytest bench/bench_float8.py --benchmark-only

"fp8 cache" has bf16 queries. A decode reads half the bytes and widens twice the elements of them.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("pytest_benchmark")

import attnforge

F8 = torch.float8_e4m3fn
KINDS = {"bf16": (torch.bfloat16, torch.bfloat16), "fp8 cache": (torch.bfloat16, F8),
         "fp8": (F8, F8)}  # fmt: skip
# heads, KV heads, head dim, keys
DECODES = {"gqa-d128": (32, 8, 128, 32768), "mha-d128": (8, 8, 128, 32768),
           "gqa-d64": (32, 8, 64, 32768)}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", DECODES)
def test_decode(benchmark: Any, name: str, kind: str) -> None:
    heads, heads_k, dim, keys = DECODES[name]
    q_dtype, dtype = KINDS[kind]
    q = torch.randn(1, 1, heads, dim).to(q_dtype)
    k, v = (torch.randn(1, keys, heads_k, dim).to(dtype) for _ in range(2))
    benchmark.group = name
    benchmark.pedantic(lambda: attnforge.flash_decode(q, k, v), rounds=20, warmup_rounds=2)


@pytest.mark.parametrize("kind", ["bf16", "fp8"])
def test_prefill(benchmark: Any, kind: str) -> None:
    q, k, v = (torch.randn(1, 2048, 8, 128).to(KINDS[kind][1]) for _ in range(3))
    benchmark.group = "prefill-s2048-d128"
    benchmark.pedantic(
        lambda: attnforge.flash_attention(q, k, v, causal=True), rounds=5, warmup_rounds=1
    )
