"""Sliding-window attention: time grows with the length, not with its square.

Also: what kernel serves a call, and why the others do not (`attnforge.explain`).

    python examples/sliding_window.py
"""

import time

import torch

import attnforge

torch.manual_seed(0)
WINDOW = 256  # keys behind the query that it still sees


def seconds(length: int, window: tuple[int, int]) -> float:
    q, k, v = (torch.randn(1, length, h, 64) for h in (4, 2, 2))
    best = float("inf")
    for _ in range(3):
        begin = time.perf_counter()
        attnforge.flash_attention(q, k, v, causal=True, window_size=window)
        best = min(best, time.perf_counter() - begin)
    return best


print(f"{'length':>8} {'full ms':>9} {'window ms':>10}")
for length in (1024, 2048, 4096, 8192):
    full, local = seconds(length, (-1, 0)), seconds(length, (WINDOW, 0))
    print(f"{length:8d} {full * 1e3:9.1f} {local * 1e3:10.1f}")

# Same rows computed the slow way: a mask of the band over all pairs, in float64.
q, k, v = (torch.randn(1, 1024, 2, 64) for _ in range(3))
out = attnforge.flash_attention(q, k, v, causal=True, window_size=(WINDOW, 0))
at = torch.arange(1024)
band = (at[None] <= at[:, None]) & (at[None] >= at[:, None] - WINDOW)
dense = torch.nn.functional.scaled_dot_product_attention(
    *(x.double().transpose(1, 2) for x in (q, k, v)), attn_mask=band
).transpose(1, 2)
print(f"max |error| against a dense mask in float64: {(out - dense).abs().max():.1e}")

print()
print(attnforge.explain(attnforge.flash_attention, q, k, v, causal=True, window_size=(WINDOW, 0)))
