"""The kernels of ``csrc/cuda`` compiled at run time: NVRTC compiles, CuPy loads and launches.

For scores and masks of a user's own (``attnforge.jit``), and for head dims that
``libattnforge_cuda.so`` has no kernel of their own for.
"""
