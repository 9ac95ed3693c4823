"""Mamba-2: a state space with a scalar decay per head."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import silu, softplus

from attnforge.nn._layer import (
    Call,
    LinearLayer,
    OutputNorm,
    State,
    heads,
    inverse_softplus_steps,
    wide,
)
from attnforge.nn.short_conv import ShortConvolution
from attnforge.ops._checks import fail
from attnforge.ops.linear_models import mamba2_ssd

__all__ = ["Mamba2"]


class Mamba2(LinearLayer):
    """h_t = e^{A dt_t} h_{t-1} + B_t (dt_t x_t)^T    y_t = norm((C_t^T h_t + D x_t) (.) silu(z_t))

    [z, x, B, C, dt] = W u; x, B and C pass one short convolution and silu; dt = softplus(. + b),
    A = -e^{A_h}. Heads of x have v_head_dim channels, B and C are head_dim = 128 states wide and
    shared by the heads of each of ``num_groups`` groups.

    State: (inputs of the convolution [N, conv_size - 1, H V + 2 G D], h [N, H, D, V]). Source: Dao
    and Gu, Mamba-2 (2024), section 7. Options: ``LinearLayer``.
    """

    parts = 2

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        *,
        head_dim: int = 128,
        v_head_dim: int | None = None,
        num_groups: int = 1,
        conv_size: int = 4,
    ) -> None:
        if v_head_dim is None:
            v_head_dim = 2 * hidden_size // num_heads
        super().__init__(hidden_size, num_heads, head_dim=head_dim, v_head_dim=v_head_dim)
        if num_groups < 1 or num_heads % num_groups:
            fail(self._op, f"num_groups is {num_groups}; want a divisor of {num_heads} heads")
        self.num_groups, self.state_width = num_groups, num_groups * head_dim
        channels = self.value_width + 2 * self.state_width
        self.in_proj = nn.Linear(hidden_size, self.value_width + channels + num_heads, bias=False)
        self.conv = ShortConvolution(channels, conv_size, bias=True)
        self.A_log = nn.Parameter(torch.empty(num_heads).uniform_(1, 16).log())
        self.dt_bias = nn.Parameter(inverse_softplus_steps(num_heads))
        self.D = nn.Parameter(torch.ones(num_heads))
        self.norm = OutputNorm(self.value_width)

    def mix(self, x: Tensor, state: State | None, call: Call) -> tuple[Tensor, State]:
        conv, past = (None, None) if state is None else state
        widths = [self.value_width, self.conv.channels, self.num_heads]
        z, xbc, dt = self.in_proj(x).split(widths, -1)
        xbc, conv = self.conv(xbc, state=conv, **call.conv())
        u, b, c = xbc.split([self.value_width, self.state_width, self.state_width], -1)
        u, b, c = heads(u, self.num_heads), heads(b, self.num_groups), heads(c, self.num_groups)
        steps = softplus(wide(dt) + wide(self.dt_bias))
        y, new = mamba2_ssd(
            u, steps, -wide(self.A_log).exp(), b, c, d=self.D, initial_state=past, **call.options()
        )
        return self.norm(y.flatten(2) * silu(z)).view_as(y), (conv, new)  # type: ignore[return-value]
