"""Triton kernels of ``triton_kernels``: compiled at their first call, for the device at hand."""
