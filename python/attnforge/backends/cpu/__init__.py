"""C++ kernels of ``csrc/cpu``, through the private operators of the native library."""
