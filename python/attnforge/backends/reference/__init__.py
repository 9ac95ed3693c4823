"""The definitions in plain PyTorch, as kernels of last resort."""
