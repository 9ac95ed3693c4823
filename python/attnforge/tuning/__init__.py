"""Tuning: search spaces measured on this machine, results kept in readable files.

    attnforge.tune("flash", budget=60)                     # never implicit
    with attnforge.trace_shapes("shapes.jsonl"): serve()   # what a program really calls
    attnforge.tune("flash", trace="shapes.jsonl")

Look-up at a call, once per bucket of sizes: user cache, nearest bucket, shipped table, default.
"""

from attnforge.tuning.lookup import Tables
from attnforge.tuning.trace import read_trace, trace_shapes

__all__ = ["Tables", "read_trace", "trace_shapes"]
