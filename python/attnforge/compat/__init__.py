"""The functions of other libraries, by their own names and signatures, on attnforge's operators.

    from attnforge.compat.flash_attn import flash_attn_func        # in place of flash_attn
    from attnforge.compat.fla import chunk_gla                     # in place of fla.ops

A program that imports from here runs on every device attnforge has kernels for, CPUs too. What a
function cannot serve is an error that names the argument; nothing is ignored silently.
"""
