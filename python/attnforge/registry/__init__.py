"""Which kernel serves a call, and why. Knows no family of attention and no backend."""

from attnforge.registry.explain import Explanation, explain
from attnforge.registry.override import backend, debug
from attnforge.registry.space import Config, SearchSpace
from attnforge.registry.spec import (
    KernelSpec,
    Request,
    add_source,
    list_kernels,
    register,
    unregister,
)
from attnforge.registry.tuned import set_table

__all__ = [
    "Config",
    "Explanation",
    "KernelSpec",
    "Request",
    "SearchSpace",
    "add_source",
    "backend",
    "debug",
    "explain",
    "list_kernels",
    "register",
    "set_table",
    "unregister",
]
