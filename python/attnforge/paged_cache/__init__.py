"""A paged KV cache as an object: pages, the sequences in them, and the operators that use them.

`PagedKVCache` puts the operators `attnforge.paged_append` and `attnforge.paged_attention` together
with the host runtime in ``attnforge._host``: reference-counted pages with copy-on-write, a tree of
known prefixes, eviction, compaction. It holds no kernel and no policy.
"""

from typing import Any

from attnforge.paged_cache._runtime import host
from attnforge.paged_cache.cache import PagedKVCache
from attnforge.paged_cache.split_plan import SplitPlan
from attnforge.paged_cache.step import Step

__all__ = ["OutOfPages", "PagedKVCache", "SplitPlan", "Step"]


def __getattr__(name: str) -> Any:
    if name == "OutOfPages":  # of the native module, which importing attnforge does not load
        return host().OutOfPages
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
