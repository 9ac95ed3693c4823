"""Small problems of every GPU kernel, once each, against the bounds: what a sanitizer watches.

    compute-sanitizer --tool memcheck python -m attnforge.testing.gpu_smoke

Shapes are odd and small, every feature of the foundation is in one of them, and each kernel that
the registry lists for a GPU runs or is named with its reason.
"""

from __future__ import annotations

import sys
from dataclasses import replace

import torch

from attnforge.registry import list_kernels
from attnforge.testing.cases import FlashCase
from attnforge.testing.compare import compare

__all__ = ["CASES", "main"]

CASES = (
    FlashCase(seqlen_q=70, seqlen_k=131, heads_q=4, heads_k=2, head_dim=64, causal=True),
    FlashCase(seqlen_q=33, seqlen_k=65, head_dim=40, v_head_dim=24, alibi="batch", sinks="mixed",
              softcap=5.0, window=(17, 3)),
    FlashCase(lengths=((5, 7), (0, 3), (66, 66)), causal=True, head_dim=128),
    FlashCase(seqlen_q=2, seqlen_k=300, heads_q=8, heads_k=1, head_dim=64, decode=True,
              used=(300, 17), causal=True),
)  # fmt: skip


def main(device: str = "cuda") -> int:
    """Run every case in every 16-bit and 32-bit dtype on each GPU backend; 1 on a wrong result."""
    backends = sorted({spec.backend for spec in list_kernels()} - {"reference", "cpu"})
    wrong = 0
    for backend in backends:
        for case in CASES:
            for dtype in (torch.float32, torch.bfloat16, torch.float16):
                inputs = replace(case, dtype=dtype, device=device).make()
                truth = inputs.truth(grad=not case.decode, rounded=True)
                got = inputs.forward(backend) if case.decode else inputs.run(backend)
                try:
                    compare(got, truth, inputs.context).check()
                except AssertionError as error:
                    wrong += 1
                    print(f"WRONG {backend}: {error}", flush=True)
                else:
                    print(f"ok {backend} {inputs.context}", flush=True)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
