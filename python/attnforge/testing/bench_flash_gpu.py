"""GPU cases of the `flash` family: the shapes of the papers, torch's own kernels as peers.

16,384 tokens and a hidden size of 2048 in every prefill case (Dao, 2023; Shah et al., 2024), random
data, bf16; decode by bytes of K and V. A peer that is not installed, or cannot run a shape, is
listed with its reason.
"""

from __future__ import annotations

import importlib
import importlib.util

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from attnforge.testing import bench_flash
from attnforge.testing.bench import Case, Goal
from attnforge.testing.bench_flash import Mode, Runner, Shape, Tensors

__all__ = ["sweep", "table"]

_TOKENS, _HIDDEN = 16384, 2048
_REPEATS, _QUICK = 9, 3


def _sdpa_by(backend: SDPBackend) -> bench_flash.Peer:
    """torch SDPA, held to one of its backends."""

    def peer(shape: Shape, t: Tensors) -> Runner:
        def forward(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(
                    q, k, v, is_causal=shape.causal and shape.mode != "decode",
                    enable_gqa=shape.q_heads != shape.kv_heads,
                )  # fmt: skip

        return bench_flash.runner_bhsd(shape, t, forward)

    return peer


def _flash_attn(shape: Shape, t: Tensors) -> Runner:
    """The flash-attn package: FlashAttention-3 where its interface is there, else 2."""
    third = importlib.util.find_spec("flash_attn_interface") is not None
    module = importlib.import_module("flash_attn_interface" if third else "flash_attn")

    def forward(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        out = module.flash_attn_func(q, k, v, causal=shape.causal)
        found: torch.Tensor = out[0] if isinstance(out, tuple) else out
        return found

    return bench_flash.runner_bshd(shape, t, forward)


bench_flash.PEERS.update(
    {
        "sdpa flash": _sdpa_by(SDPBackend.FLASH_ATTENTION),
        "sdpa cudnn": _sdpa_by(SDPBackend.CUDNN_ATTENTION),
        "flash-attn": _flash_attn,
    }
)
_PREFILL = ("sdpa flash", "sdpa cudnn", "flash-attn")


def _prefill(mode: Mode, s: int, d: int, causal: bool, dtype: torch.dtype) -> Shape:
    heads = _HIDDEN // d
    return Shape(
        mode, dtype, batch=_TOKENS // s, q_len=s, kv_len=s, q_heads=heads, kv_heads=heads,
        head_dim=d, causal=causal, device="cuda",
    )  # fmt: skip


def _decode(batch: int, keys: int, q_heads: int = 32, kv_heads: int = 8) -> Shape:
    return Shape(
        "decode", torch.bfloat16, batch=batch, q_len=1, kv_len=keys, q_heads=q_heads,
        kv_heads=kv_heads, head_dim=128, causal=True, device="cuda",
    )  # fmt: skip


def table(quick: bool = False) -> list[Case]:
    """The GPU speed table: forward, training step, decode, window."""
    n = _QUICK if quick else _REPEATS
    bf16, fp16 = torch.bfloat16, torch.float16
    modes: tuple[Mode, ...] = ("forward", "train")
    cases = [
        bench_flash.case(_prefill(mode, 16384, d, causal, bf16), _PREFILL, repeats=n)
        for mode in modes
        for d in (64, 128, 256)
        for causal in (False, True)
    ]
    cases.append(bench_flash.case(_prefill("forward", 4096, 128, True, fp16), _PREFILL, repeats=n))
    cases += [
        bench_flash.case(
            _decode(batch, keys), ("sdpa", "sdpa folded"), {"sdpa folded": Goal(1.0, 1.5)}, 0.85,
            repeats=n,
        )
        for batch, keys in ((1, 32768), (64, 8192))
    ]  # fmt: skip
    window = Shape(
        "forward", bf16, q_len=16384, kv_len=16384, q_heads=16, kv_heads=16, head_dim=128,
        causal=True, window=1024, device="cuda",
    )  # fmt: skip
    cases.append(bench_flash.case(window, ("flex compiled",), repeats=n))
    return cases


def sweep(quick: bool = False) -> list[Case]:
    """Cases over sequence length for the plots."""
    n = _QUICK if quick else 5
    lengths = (1024, 4096, 16384) if quick else (512, 1024, 2048, 4096, 8192, 16384)
    modes: tuple[tuple[Mode, str], ...] = (("forward", "forward"), ("train", "forward+backward"))
    return [
        bench_flash.case(
            _prefill(mode, s, d, True, torch.bfloat16), _PREFILL,
            series=f"{label}, causal, bf16, D{d}", repeats=n,
        )
        for mode, label in modes
        for d in (64, 128)
        for s in lengths
    ]  # fmt: skip
