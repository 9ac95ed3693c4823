"""Short causal convolution: each channel's last few values, weighted."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from attnforge.nn._sequences import last, sequences, shifted
from attnforge.ops import _linear_checks
from attnforge.ops._checks import _shape, fail

__all__ = ["ShortConvolution"]


class ShortConvolution(nn.Module):
    """y_t = silu(b + sum_{i < W} w_i (.) x_{t - W + 1 + i}), channel by channel, x_t = 0 for t < 0.

    x [B, T, C] -> (y [B, T, C], state or None). The state [N, W - 1, C] holds the last inputs of
    every sequence: with it, a call goes on where the last one ended, for any number of tokens.
    ``cu_seqlens`` [N + 1] packs sequences into a batch of one; none reads another's tokens.
    activation: "silu" or None. W products per value, added in fp32. Differentiable in everything,
    state too. Source: the convolution of H3, Mamba and the delta nets (Fu et al., 2023).
    """

    def __init__(
        self,
        channels: int,
        kernel_size: int = 4,
        *,
        bias: bool = False,
        activation: str | None = "silu",
    ) -> None:
        super().__init__()
        if kernel_size < 1:
            fail("nn.ShortConvolution", f"kernel_size is {kernel_size}; want at least 1")
        if activation not in ("silu", None):
            fail("nn.ShortConvolution", f"activation is {activation!r}; want 'silu' or None")
        self.channels, self.kernel_size, self.activation = channels, kernel_size, activation
        self.weight = nn.Parameter(torch.empty(channels, kernel_size))
        self.bias = nn.Parameter(torch.zeros(channels)) if bias else None
        nn.init.uniform_(self.weight, -(kernel_size**-0.5), kernel_size**-0.5)

    def forward(
        self,
        x: Tensor,
        *,
        cu_seqlens: Tensor | None = None,
        state: Tensor | None = None,
        output_final_state: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        op, w = "nn.ShortConvolution", self.kernel_size
        if x.dim() != 3 or x.shape[2] != self.channels:
            fail(op, f"x is {_shape(x)}; want [batch, time, {self.channels}]")
        s = sequences(op, x, cu_seqlens)
        if state is not None and state.shape != (s.number, w - 1, self.channels):
            fail(
                op,
                f"state is {_shape(state)}; want [{s.number}, {w - 1}, {self.channels}], the last "
                "inputs of each sequence as output_final_state=True returned them",
            )
        rows, wide = x.flatten(0, 1), _linear_checks.accumulator(x.dtype)
        weight = self.weight.to(wide)
        y = rows.to(wide) * weight[:, -1]
        for steps in range(1, w):
            y = y + shifted(rows, state, steps, s).to(wide) * weight[:, -1 - steps]
        if self.bias is not None:
            y = y + self.bias.to(wide)
        if self.activation is not None:
            y = nn.functional.silu(y)
        return y.to(x.dtype).view_as(x), (
            last(rows, state, w - 1, s) if output_final_state else None
        )
