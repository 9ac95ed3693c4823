"""Triton kernels of linear attention: recurrences walked in chunks, their states in registers."""
