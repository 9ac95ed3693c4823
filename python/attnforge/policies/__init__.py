"""Sparse decode policies, one small file each, over scores, selections and ``indexed_attention``.

All of them are a ``Policy``: ``observe`` after the prefill, ``attend`` at each step.
"""

from attnforge.policies._policy import Lists, Policy
from attnforge.policies.quest import Quest
from attnforge.policies.snapkv import H2O, PyramidKV, SnapKV
from attnforge.policies.sparq import SparQ
from attnforge.policies.streaming import StreamingLLM
from attnforge.policies.tidal import Recycled, TidalDecode
from attnforge.policies.tokenselect import TokenSelect
from attnforge.policies.twilight import Twilight

__all__ = [
    "H2O",
    "Lists",
    "Policy",
    "PyramidKV",
    "Quest",
    "Recycled",
    "SnapKV",
    "SparQ",
    "StreamingLLM",
    "TidalDecode",
    "TokenSelect",
    "Twilight",
]
