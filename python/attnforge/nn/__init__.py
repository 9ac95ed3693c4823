"""Layers: projections, gates and caches around the operators, for training and decoding."""

from attnforge.nn.moba import MoBA as MoBA
from attnforge.nn.moba import MoBACache as MoBACache
from attnforge.nn.native_sparse import NativeSparseAttention as NativeSparseAttention
from attnforge.nn.native_sparse import NSACache as NSACache
from attnforge.nn.seer_gate import SeerAttentionGate as SeerAttentionGate
