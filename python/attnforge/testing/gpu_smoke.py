"""Small problems of every GPU kernel, once each, against the bounds: what a sanitizer watches.

    compute-sanitizer --tool memcheck python -m attnforge.testing.gpu_smoke

Shapes are odd and small, every feature of the foundation is in one of them, and each kernel that
the registry lists for a GPU runs or is named with its reason.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from attnforge.registry import list_kernels
from attnforge.testing.cases import FlashCase
from attnforge.testing.compare import compare
from attnforge.testing.oracle import Truth
from attnforge.testing.paged import PagedCase, planned

__all__ = ["CASES", "PLANNED", "main"]

CASES = (
    FlashCase(seqlen_q=70, seqlen_k=131, heads_q=4, heads_k=2, head_dim=64, causal=True),
    FlashCase(seqlen_q=33, seqlen_k=65, head_dim=40, v_head_dim=24, alibi="batch", sinks="mixed",
              softcap=5.0, window=(17, 3)),
    FlashCase(lengths=((5, 7), (0, 3), (66, 66)), causal=True, head_dim=128),
    FlashCase(seqlen_q=2, seqlen_k=300, heads_q=8, heads_k=1, head_dim=64, decode=True,
              used=(300, 17), causal=True),
)  # fmt: skip

# Pages with a split plan: rows of either launch that splits keys, codes, and the latent pair.
PLANNED = (
    PagedCase(lengths=(300, 0, 47), rows=(1,) * 3, sinks=True, window=(90, 0), page_size=8),
    PagedCase(lengths=(300, 0, 47), rows=(2, 1, 21), heads_q=8, code="int4", scales="page"),
    PagedCase(lengths=(300, 0, 47), rows=(1,) * 3, heads_q=16, heads_k=1, head_dim=576,
              v_head_dim=512, latent=True),
)  # fmt: skip
# Ends of pieces, one plan after the other in the same tensors, as replays of a graph have them.
PLANS = (((16, 211, 300), (), (47,)), ((*range(32, 300, 32), 300), (), (16, 47)))


def _flash(case: FlashCase, backend: str) -> tuple[str, Mapping[str, Tensor], Truth]:
    inputs = case.make()
    truth = inputs.truth(grad=not case.decode, rounded=True)
    return inputs.context, inputs.forward(backend) if case.decode else inputs.run(backend), truth


def _planned(
    case: PagedCase, backend: str, device: str
) -> Iterator[tuple[str, Mapping[str, Tensor], Truth]]:
    inputs = case.make()
    truth = inputs.truth(rounded=True)

    def on(x: Any) -> Any:
        if isinstance(x, tuple) and isinstance(x[0], Tensor):
            return tuple(map(on, x))
        return x.to(device) if isinstance(x, Tensor) else x

    k, v = on(inputs.k_pages), on(inputs.v_pages)
    moved = inputs.with_(
        q=on(inputs.q), k_pages=k, v_pages=k[..., : v.shape[-1]] if case.latent else v,
        **{name: on(x) for name, x in inputs.options.items()},
    )  # fmt: skip
    held = on(planned(PLANS[0], 16))
    for cuts in PLANS:
        for mine, new in zip(held, planned(cuts, 16), strict=True):
            mine.copy_(new)
        got = moved.forward(backend, split_plan=held)
        yield f"{case} planned {cuts}", {name: x.cpu() for name, x in got.items()}, truth


def _results(backend: str, device: str) -> Iterator[tuple[str, Mapping[str, Tensor], Truth]]:
    pages = any((spec.op, spec.backend) == ("paged_fwd", backend) for spec in list_kernels())
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for case in CASES:
            yield _flash(replace(case, dtype=dtype, device=device), backend)
        for paged in PLANNED if pages else ():
            if dtype is not torch.float32 or not paged.latent:
                yield from _planned(replace(paged, dtype=dtype), backend, device)


def main(device: str = "cuda") -> int:
    """Run every case in every 16-bit and 32-bit dtype on each GPU backend; 1 on a wrong result."""
    backends = sorted({spec.backend for spec in list_kernels()} - {"reference", "cpu"})
    wrong = 0
    for backend in backends:
        for context, got, truth in _results(backend, device):
            try:
                compare(got, truth, context).check()
            except AssertionError as error:
                wrong += 1
                print(f"WRONG {backend}: {error}", flush=True)
            else:
                print(f"ok {backend} {context}", flush=True)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
