"""Kernels of the ``flash`` family: forward, backward, split-KV decode, merge."""
