"""Kernels in CUDA C++ (``csrc/cuda``)."""
