"""Triton kernels, one subpackage per family; installed as ``attnforge.triton_kernels``.

The sources stand at the top level of the repository beside ``csrc`` and are mapped into the package
by ``package-dir``, because a top-level ``triton_kernels`` in an environment would hide Triton's own
package of that name. Import nothing here: Triton is optional and importing it is slow.
"""
