"""Sparse decode policies, one small file each, over scores, selections and ``indexed_attention``.

All of them are a ``Policy``: ``observe`` after the prefill, ``attend`` at each step. ``POLICIES``
has them by name.
"""

from attnforge.policies._policy import Lists, Policy
from attnforge.policies.hip import HiP
from attnforge.policies.lserve import LServe
from attnforge.policies.magicpig import MagicPIG
from attnforge.policies.quest import Quest
from attnforge.policies.razor import HeadTyping, RazorAttention
from attnforge.policies.snapkv import H2O, PyramidKV, SnapKV
from attnforge.policies.sparq import SparQ
from attnforge.policies.squeezed import Squeezed
from attnforge.policies.streaming import StreamingLLM
from attnforge.policies.tidal import Recycled, TidalDecode
from attnforge.policies.tokenselect import TokenSelect
from attnforge.policies.twilight import Twilight

__all__ = [
    "H2O",
    "POLICIES",
    "HeadTyping",
    "HiP",
    "LServe",
    "Lists",
    "MagicPIG",
    "Policy",
    "PyramidKV",
    "Quest",
    "RazorAttention",
    "Recycled",
    "SnapKV",
    "SparQ",
    "Squeezed",
    "StreamingLLM",
    "TidalDecode",
    "TokenSelect",
    "Twilight",
]

POLICIES: dict[str, type[Policy]] = {
    "centroid": Squeezed,
    "h2o": H2O,
    "hip": HiP,
    "lserve": LServe,
    "lsh": MagicPIG,
    "pyramidkv": PyramidKV,
    "quest": Quest,
    "razor": RazorAttention,
    "recycled": Recycled,
    "snapkv": SnapKV,
    "sparq": SparQ,
    "streaming": StreamingLLM,
    "tidal": TidalDecode,
    "tokenselect": TokenSelect,
    "twilight": Twilight,
}
"""Name -> policy, as ``attn_implementation="attnforge:<name>"`` has them."""
