"""Triton kernels of the reductions family: statistics of P = exp(S - LSE), tile by tile."""
