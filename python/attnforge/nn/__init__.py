"""Layers: projections, feature maps and gates around the operators, for training and decoding.

from attnforge import nn as anf

layer = anf.GatedDeltaNet(hidden_size=512, num_heads=8)
y, _ = layer(x)                                          # [B, T, 512]
y, state = layer(prompt, output_final_state=True)
y, state = layer(token, state=state, output_final_state=True)
"""

from attnforge.nn.based import Based as Based
from attnforge.nn.cottention import Cottention as Cottention
from attnforge.nn.delta_net import DeltaNet as DeltaNet
from attnforge.nn.fast import FAST as FAST
from attnforge.nn.feature_maps import HedgehogFeatureMap as HedgehogFeatureMap
from attnforge.nn.flowformer import Flowformer as Flowformer
from attnforge.nn.gated_delta_net import GatedDeltaNet as GatedDeltaNet
from attnforge.nn.gated_linear import GatedLinearAttention as GatedLinearAttention
from attnforge.nn.gated_slot import GatedSlotAttention as GatedSlotAttention
from attnforge.nn.hedgehog import Hedgehog as Hedgehog
from attnforge.nn.hgrn2 import HGRN2 as HGRN2
from attnforge.nn.kimi_delta import KimiDeltaAttention as KimiDeltaAttention
from attnforge.nn.lightning import LightningAttention as LightningAttention
from attnforge.nn.log_normal import LinearLogNormal as LinearLogNormal
from attnforge.nn.mamba2 import Mamba2 as Mamba2
from attnforge.nn.moba import MoBA as MoBA
from attnforge.nn.moba import MoBACache as MoBACache
from attnforge.nn.native_sparse import NativeSparseAttention as NativeSparseAttention
from attnforge.nn.native_sparse import NSACache as NSACache
from attnforge.nn.regla import ReGLA as ReGLA
from attnforge.nn.seer_gate import SeerAttentionGate as SeerAttentionGate
from attnforge.nn.seer_training import SeerSample as SeerSample
from attnforge.nn.seer_training import distil_seer_gate as distil_seer_gate
from attnforge.nn.seer_training import seer_sample as seer_sample
from attnforge.nn.short_conv import ShortConvolution as ShortConvolution
from attnforge.nn.window import window_linear_attention as window_linear_attention
