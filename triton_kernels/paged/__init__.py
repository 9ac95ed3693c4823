"""Kernels of the paged family: attention over a KV cache in pages, and writing it."""
