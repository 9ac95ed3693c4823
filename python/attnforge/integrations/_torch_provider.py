"""attnforge as a flash-attention implementation of ``torch.nn.attention`` (torch 2.13).

While the provider is active, the aten operators of torch's own flash kernels are functions of
ours, on the CPU and on CUDA. They stand below autograd: the forward returns the LSE, the backward
gets it back.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor

from attnforge.ops import _flash_ops
from attnforge.ops._checks import fail
from attnforge.ops.flash import _dense

__all__ = ["NAME", "register", "top_left"]

NAME = "attnforge"
_CPU = "_scaled_dot_product_flash_attention_for_cpu"
_CUDA = "_scaled_dot_product_flash_attention"
Problem = tuple[Tensor, Tensor, Tensor, Any]  # q, k, v, FlashParams


def top_left(rows: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, tuple[int, int]]:
    """Keys, values [.., S, D] and the window for torch's causal mask, aligned to the top left.

    Keys past the square of ``rows`` are seen by nobody and cut off.
    """
    key, value = key[..., :rows, :], value[..., :rows, :]
    return key, value, (-1, rows - key.shape[-2])


def _problem(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    dropout_p: float,
    is_causal: bool,
    attn_mask: Tensor | None,
    scale: float | None,
) -> Problem:
    """[B, H, S, D] as [B, S, H, D], with torch's top-left causal mask."""
    op = "flash_attention"
    if dropout_p > 0.0:
        fail(op, f"dropout_p is {dropout_p} through the provider {NAME!r}; want 0; use "
                 "attnforge.integrations.torch.sdpa() for dropout")  # fmt: skip
    options: dict[str, Any] = {"softmax_scale": scale}
    if is_causal:
        key, value, options["window_size"] = top_left(query.shape[2], key, value)
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    if attn_mask is not None:
        mask = attn_mask[(None,) * (4 - attn_mask.dim())]
        mask = mask.expand(*mask.shape[:2], q.shape[1], k.shape[1])
        options["mask" if mask.dtype is torch.bool else "bias"] = mask
    return _dense(op, q, k, v, "seqused_k", None, **options)


def _fwd(problem: Problem) -> tuple[Tensor, Tensor]:
    q, k, v, p = problem
    out, lse, _ = _flash_ops.flash_fwd(
        q, k, v, *p[:11], list(p.mods), *p[12:], False, None
    )  # fmt: skip
    return out.transpose(1, 2), lse


def _bwd(problem: Problem, grad_out: Tensor, out: Tensor, lse: Tensor, like: Any) -> Any:
    """Gradients in the shapes of ``like``; keys that a causal mask cut off get zeros."""
    q, k, v, p = problem
    dout, out = (x.transpose(1, 2) for x in (grad_out, out))
    grads = _flash_ops.flash_bwd(
        dout, None, q, k, v, out, lse, out.new_empty(0), *p[:11], list(p.mods), *p[12:], 0, None
    )
    return tuple(
        torch.nn.functional.pad(d.transpose(1, 2), (0, 0, 0, x.shape[2] - d.shape[1]))
        if x.shape[2] > d.shape[1]
        else d.transpose(1, 2)
        for d, x in zip(grads[:3], like, strict=True)
    )


def cpu_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    attn_mask: Tensor | None = None,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """aten's forward for CPU tensors."""
    return _fwd(_problem(query, key, value, dropout_p, is_causal, attn_mask, scale))


def cpu_backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    dropout_p: float,
    is_causal: bool,
    *,
    attn_mask: Tensor | None = None,
    scale: float | None = None,
) -> Any:
    """aten's backward for CPU tensors."""
    problem = _problem(query, key, value, dropout_p, is_causal, attn_mask, scale)
    return _bwd(problem, grad_out, out, logsumexp, (query, key, value))


def cuda_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    return_debug_mask: bool = False,
    *,
    scale: float | None = None,
) -> Any:
    """aten's forward for CUDA tensors, whose state of a generator is empty here."""
    if return_debug_mask:
        fail("flash_attention", "return_debug_mask is True; want False: weights are never made")
    out, lse = _fwd(_problem(query, key, value, dropout_p, is_causal, None, scale))
    rng, unused = (torch.zeros(n, dtype=torch.uint64, device=query.device) for n in ((2,), ()))
    return out, lse, None, None, query.shape[2], key.shape[2], rng, unused, query.new_empty(0)


def cuda_backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    cum_seq_q: Tensor | None,
    cum_seq_k: Tensor | None,
    max_q: int,
    max_k: int,
    dropout_p: float,
    is_causal: bool,
    philox_seed: Tensor,
    philox_offset: Tensor,
    *,
    scale: float | None = None,
) -> Any:
    """aten's backward for CUDA tensors."""
    problem = _problem(query, key, value, dropout_p, is_causal, None, scale)
    return _bwd(problem, grad_out, out, logsumexp, (query, key, value))


class _Handle:
    """Holds the registrations; torch's own kernels are back once it is removed."""

    def __init__(self) -> None:
        library: Any = torch.library.Library
        self.library: Any = library("aten", "IMPL")
        with warnings.catch_warnings():  # torch warns of what this is for: a kernel is replaced
            warnings.simplefilter("ignore", UserWarning)
            for name, key, forward, backward in (
                (_CPU, "CPU", cpu_forward, cpu_backward),
                (_CUDA, "CUDA", cuda_forward, cuda_backward),
            ):
                self.library.impl(name, forward, key)
                self.library.impl(f"{name}_backward", backward, key)

    def remove(self) -> None:
        if self.library is not None:
            self.library._destroy()
            self.library = None


def register() -> None:
    """Offer ``"attnforge"`` to ``torch.nn.attention.activate_flash_attention_impl``.

    Nothing changes until it is activated. Needs torch 2.13: ImportError before.
    """
    try:
        from torch.nn.attention import register_flash_attention_impl
    except ImportError as error:
        raise ImportError(
            f"attnforge.integrations.torch.register needs torch 2.13 or newer; got "
            f"{torch.__version__}; use attnforge.integrations.torch.sdpa() there"
        ) from error
    register_flash_attention_impl(NAME, register_fn=_Handle)
