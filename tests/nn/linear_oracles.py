"""Every linear layer as its paper's recurrence, token by token, from the layer's parameters.

One sequence x [T, hidden] in float64 -> y [T, hidden]. Plain loops; of the layer only parameters
and sizes are used.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import silu, softplus

from attnforge import nn as anf

Oracle = Callable[[Any, Tensor], Tensor]


def split(x: Tensor, heads: int) -> Tensor:
    return x.unflatten(-1, (heads, -1))


def projected(layer: Any, x: Tensor, *names: str) -> list[Tensor]:
    return [split(x @ getattr(layer, f"{n}_proj").weight.T, layer.num_heads) for n in names]


def linear(module: Any, x: Tensor) -> Tensor:
    """An nn.Linear, or several in turn."""
    for one in module if isinstance(module, torch.nn.Sequential) else [module]:
        x = x @ one.weight.T + (0 if one.bias is None else one.bias)
    return x


def rms(x: Tensor, weight: Tensor | None) -> Tensor:
    y = x / torch.sqrt(x.square().mean(-1, keepdim=True) + 1e-5)
    return y if weight is None else y * weight


def out(layer: Any, rows: list[Tensor], x: Tensor) -> Tensor:
    """The last projection of outputs [H, V] per token."""
    if not rows:
        return x * 0
    return torch.stack([r.flatten() for r in rows]) @ layer.o_proj.weight.T


def conv(layer: Any, x: Tensor) -> Tensor:
    rows = []
    for t in range(x.shape[0]):
        y = torch.zeros_like(x[t]) if layer.bias is None else layer.bias
        for i in range(layer.kernel_size):
            at = t - layer.kernel_size + 1 + i
            if at >= 0:
                y = y + layer.weight[:, i] * x[at]
        rows.append(silu(y) if layer.activation else y)
    return torch.stack(rows) if rows else x * 0


# (queries [H, D], keys [J, H, D], their ages in tokens [J]) -> weights [J, H]
Weights = Callable[[Tensor, Tensor, Tensor], Tensor]


def weighed(layer: Any, x: Tensor, weights: Weights, eps: float = 0.0) -> Tensor:
    """sum_j w_tj v_j / (sum_j w_tj + eps) over j <= t."""
    q, k, v = projected(layer, x, "q", "k", "v")
    rows = []
    for t in range(x.shape[0]):
        w = weights(q[t], k[: t + 1], t - torch.arange(t + 1))
        rows.append((w[..., None] * v[: t + 1]).sum(0) / (w.sum(0) + eps)[:, None])
    return out(layer, rows, x)


def hedgehog(layer: Any, x: Tensor) -> Tensor:
    def features(module: Any, y: Tensor) -> Tensor:
        z = torch.einsum("hed,...hd->...he", module.weight, y)
        return torch.softmax(torch.cat([z, -z], -1), -1)

    def weights(q: Tensor, k: Tensor, age: Tensor) -> Tensor:
        far = (features(layer.q_map, q) * features(layer.k_map, k)).sum(-1)
        if not layer.window:
            return far
        near = torch.exp((q * k).sum(-1) / math.sqrt(layer.head_dim))
        return torch.where(age[:, None] < layer.window, near, far * torch.exp(layer.log_factor))

    return weighed(layer, x, weights, 0.0 if layer.window else 1e-10)


def based(layer: Any, x: Tensor) -> Tensor:
    def weights(q: Tensor, k: Tensor, age: Tensor) -> Tensor:
        s = (q * k).sum(-1) / math.sqrt(layer.head_dim)
        return torch.where(age[:, None] < layer.window, torch.exp(s), 1 + s + s * s / 2)

    return weighed(layer, x, weights)


def fast(layer: Any, x: Tensor) -> Tensor:
    def standard(y: Tensor) -> Tensor:
        mean, var = y.mean(-1, keepdim=True), y.var(-1, correction=0, keepdim=True)
        return (y - mean) / torch.sqrt(var + 1e-5)

    def weights(q: Tensor, k: Tensor, age: Tensor) -> Tensor:
        s = layer.scale * (standard(q) * standard(k)).sum(-1)
        return 1 + s + (s * s / 2 if layer.order == 2 else 0)

    return weighed(layer, x, weights, 1e-10)


def log_normal(layer: Any, x: Tensor) -> Tensor:
    sq, sk = layer.q_std[:, None], layer.k_std[:, None]
    s = torch.sqrt((sq**2 * sk**2 + 0.35487039130661086) / (2 * 0.14855178144710912))

    def weights(q: Tensor, k: Tensor, age: Tensor) -> Tensor:
        return (torch.exp(s / sq * q) * torch.exp(s / sk * k)).sum(-1)

    return weighed(layer, x, weights)


def cottention(layer: Any, x: Tensor) -> Tensor:
    q, k, v = projected(layer, x, "q", "k", "v")
    q, k = q / q.norm(dim=-1, keepdim=True), k / k.norm(dim=-1, keepdim=True)
    rows, s = [], x.new_zeros(layer.num_heads, layer.head_dim, layer.v_head_dim)
    for t in range(x.shape[0]):
        power = torch.sigmoid(layer.m)[:, None]
        s = s + torch.einsum("hk,hv->hkv", k[t], v[t] / (t + 1) ** power)
        rows.append(torch.einsum("hk,hkv->hv", q[t], s))
    return out(layer, rows, x)


def flowformer(layer: Any, x: Tensor) -> Tensor:
    q, k, v = projected(layer, x, "q", "k", "v")
    q, k, e = torch.sigmoid(q), torch.sigmoid(k), 1e-6
    rows = []
    sk = sq = sok = siq = torch.zeros_like(q[0]) if x.shape[0] else x
    total, s = 0, x.new_zeros(layer.num_heads, layer.head_dim, layer.v_head_dim)
    for t in range(x.shape[0]):
        n = t + 1
        sk, sq = sk + k[t], sq + q[t]
        incoming = n / ((q[t] + e) * (sk + e)).sum(-1)
        outgoing = n / ((k[t] + e) * (sq + e)).sum(-1)
        sok, siq = sok + k[t] * outgoing[:, None], siq + q[t] * incoming[:, None]
        sink = ((q[t] + e) * (sok + e)).sum(-1) / n
        source = (((k[t] + e) * (siq + e)).sum(-1) / n).clamp(-1, 1).exp()
        total = total + source
        s = s + torch.einsum("hk,hv->hkv", k[t], v[t] * (source / total * n)[:, None])
        y = torch.einsum("hk,hkv->hv", q[t] * (incoming / n)[:, None], s)
        rows.append(y * torch.sigmoid(sink)[:, None])
    return out(layer, rows, x)


def gated(
    layer: Any, x: Tensor, q: Tensor, k: Tensor, v: Tensor, decay: Tensor, scale: float
) -> list[Tensor]:
    """Outputs of S_t = diag(decay_t) S_{t-1} + k v^T; decay [T, H, D] or [T, H, 1]."""
    rows, s = [], x.new_zeros(layer.num_heads, layer.head_dim, layer.v_head_dim)
    for t in range(x.shape[0]):
        s = decay[t][..., None] * s + torch.einsum("hk,hv->hkv", k[t], v[t])
        rows.append(scale * torch.einsum("hk,hkv->hv", q[t], s))
    return rows


def regla(layer: Any, x: Tensor) -> Tensor:
    q, k, v = projected(layer, x, "q", "k", "v")
    q, k = (layer.head_dim / math.sqrt(math.e - 1) * torch.softmax(y, -1) for y in (q, k))
    f, r = (torch.sigmoid(linear(p, x)) for p in (layer.f_proj, layer.r_proj))
    decay = split((1 - r) * f**2 + r * (1 - (1 - f) ** 2), layer.num_heads)
    rows = gated(layer, x, q, k, v, decay, layer.head_dim**-0.5)
    return out(layer, [rms(y, layer.norm.weight) for y in rows], x)


def hgrn2(layer: Any, x: Tensor) -> Tensor:
    q, v = projected(layer, x, "q", "v")
    low = layer.lower_bound
    f = low + (1 - low) * torch.sigmoid(split(linear(layer.f_proj, x), layer.num_heads))
    rows = gated(layer, x, silu(q), 1 - f, v, f, layer.head_dim**-0.5)
    return out(layer, [rms(y, layer.norm.weight) for y in rows], x)


def gated_linear(layer: Any, x: Tensor) -> Tensor:
    q, k, v = projected(layer, x, "q", "k", "v")
    a = torch.sigmoid(linear(layer.gate, x)) ** (1 / layer.temperature)
    rows = gated(layer, x, q, k, v, split(a, layer.num_heads), layer.head_dim**-0.5)
    gate = split(silu(linear(layer.r_proj, x)), layer.num_heads)
    return out(layer, [rms(y, layer.norm.weight) * g for y, g in zip(rows, gate, strict=True)], x)


def lightning(layer: Any, x: Tensor) -> Tensor:
    q, k, v = projected(layer, x, "q", "k", "v")
    h = torch.arange(1, layer.num_heads + 1, dtype=torch.float64)
    slope = (2 ** (-8 * h / layer.num_heads) * (1 - layer.layer_idx / layer.num_layers)).float()
    decay = torch.exp(-slope.double())[None, :, None].expand(x.shape[0], -1, 1)
    rows = gated(layer, x, silu(q), silu(k), v, decay, layer.head_dim**-0.5)
    gate = linear(layer.u_proj, x)
    return out(layer, [rms(y.flatten(), None) * g for y, g in zip(rows, gate, strict=True)], x)


def gated_slots(layer: Any, x: Tensor) -> Tensor:
    q, k, v = projected(layer, x, "q", "k", "v")
    f = torch.sigmoid(split(linear(layer.f_proj, x), layer.num_heads)) ** (1 / layer.temperature)
    slots = f.shape[-1]
    keys = x.new_zeros(layer.num_heads, layer.head_dim, slots)
    values = x.new_zeros(layer.num_heads, slots, layer.v_head_dim)
    rows = []
    for t in range(x.shape[0]):
        keys = keys * f[t][:, None, :] + torch.einsum("hk,hm->hkm", silu(k[t]), 1 - f[t])
        values = values * f[t][:, :, None] + torch.einsum("hm,hv->hmv", 1 - f[t], v[t])
        logits = torch.einsum("hk,hkm->hm", silu(q[t]), keys) / math.sqrt(layer.head_dim)
        y = torch.einsum("hm,hmv->hv", torch.softmax(logits, -1), values)
        rows.append(rms(silu(y), layer.norm.weight))
    return out(layer, rows, x)


def delta(layer: Any, x: Tensor, decay: Tensor) -> list[Tensor]:
    """Outputs of the delta rule; decay [T, H, D] or [T, H, 1]."""
    mixed = conv(layer.conv, linear(layer.qkv_proj, x))
    parts = mixed.split([layer.key_width, layer.key_width, layer.value_width], -1)
    q, k, v = (split(y, layer.num_heads) for y in parts)
    q, k = (y / torch.sqrt(y.square().sum(-1, keepdim=True) + 1e-6) for y in (q, k))
    beta = layer.most * torch.sigmoid(linear(layer.b_proj, x))
    rows, s = [], x.new_zeros(layer.num_heads, layer.head_dim, layer.v_head_dim)
    for t in range(x.shape[0]):
        s = decay[t][..., None] * s
        error = v[t] - torch.einsum("hk,hkv->hv", k[t], s)
        s = s + torch.einsum("hk,hv->hkv", k[t], beta[t][:, None] * error)
        rows.append(torch.einsum("hk,hkv->hv", q[t], s) / math.sqrt(layer.head_dim))
    return [rms(y, layer.norm.weight) for y in rows]


def delta_net(layer: Any, x: Tensor) -> Tensor:
    return out(layer, delta(layer, x, x.new_ones(x.shape[0], layer.num_heads, 1)), x)


def gated_delta_net(layer: Any, x: Tensor) -> Tensor:
    steps = softplus(linear(layer.a_proj, x) + layer.dt_bias)
    rows = delta(layer, x, torch.exp(-torch.exp(layer.A_log) * steps)[..., None])
    gate = split(silu(linear(layer.g_proj, x)), layer.num_heads)
    return out(layer, [y * g for y, g in zip(rows, gate, strict=True)], x)


def kimi_delta(layer: Any, x: Tensor) -> Tensor:
    steps = split(softplus(linear(layer.f_proj, x) + layer.dt_bias), layer.num_heads)
    rows = delta(layer, x, torch.exp(-torch.exp(layer.A_log)[:, None] * steps))
    gate = split(torch.sigmoid(linear(layer.g_proj, x)), layer.num_heads)
    return out(layer, [y * g for y, g in zip(rows, gate, strict=True)], x)


def mamba2(layer: Any, x: Tensor) -> Tensor:
    inner, width, heads = layer.value_width, layer.state_width, layer.num_heads
    z, xbc, dt = linear(layer.in_proj, x).split([inner, inner + 2 * width, heads], -1)
    u, b, c = conv(layer.conv, xbc).split([inner, width, width], -1)
    u, repeat = split(u, heads), heads // layer.num_groups
    b, c = (split(y, layer.num_groups).repeat_interleave(repeat, 1) for y in (b, c))
    dt = softplus(dt + layer.dt_bias)
    decay = torch.exp(-torch.exp(layer.A_log) * dt)[..., None]
    rows = gated(layer, x, c, b, dt[..., None] * u, decay, 1.0)
    rows = [(y + layer.D[:, None] * u[t]).flatten() * silu(z[t]) for t, y in enumerate(rows)]
    return out(layer, [rms(y, layer.norm.weight) for y in rows], x)


HIDDEN, HEADS = 12, 2

# Name -> (a new layer, its oracle). Windows are shorter than the sequences tested.
LAYERS: dict[str, tuple[Callable[[], Any], Oracle]] = {
    "hedgehog": (lambda: anf.Hedgehog(HIDDEN, HEADS), hedgehog),
    "hedgehog-window": (lambda: anf.Hedgehog(HIDDEN, HEADS, window=3), hedgehog),
    "based": (lambda: anf.Based(HIDDEN, HEADS, head_dim=4, window=3), based),
    "based-window-1": (lambda: anf.Based(HIDDEN, HEADS, head_dim=3, window=1), based),
    "regla": (lambda: anf.ReGLA(HIDDEN, HEADS, v_head_dim=5), regla),
    "lln": (lambda: anf.LinearLogNormal(HIDDEN, HEADS), log_normal),
    "fast-1": (lambda: anf.FAST(HIDDEN, HEADS, order=1), fast),
    "fast-2": (lambda: anf.FAST(HIDDEN, HEADS, head_dim=4, v_head_dim=5), fast),
    "cottention": (lambda: anf.Cottention(HIDDEN, HEADS), cottention),
    "flowformer": (lambda: anf.Flowformer(HIDDEN, HEADS, v_head_dim=5), flowformer),
    "hgrn2": (lambda: anf.HGRN2(HIDDEN, HEADS), hgrn2),
    "hgrn2-bound": (lambda: anf.HGRN2(HIDDEN, HEADS, lower_bound=0.4), hgrn2),
    "gsa": (lambda: anf.GatedSlotAttention(HIDDEN, HEADS, num_slots=5), gated_slots),
    "gla": (lambda: anf.GatedLinearAttention(HIDDEN, HEADS, v_head_dim=5), gated_linear),
    "lightning": (lambda: anf.LightningAttention(HIDDEN, HEADS, layer_idx=1, num_layers=3),
                  lightning),
    "delta": (lambda: anf.DeltaNet(HIDDEN, HEADS), delta_net),
    "delta-negative": (lambda: anf.DeltaNet(HIDDEN, HEADS, negative_eigenvalues=True), delta_net),
    "gated-delta": (lambda: anf.GatedDeltaNet(HIDDEN, HEADS, v_head_dim=5), gated_delta_net),
    "kda": (lambda: anf.KimiDeltaAttention(HIDDEN, HEADS, conv_size=2), kimi_delta),
    "mamba2": (lambda: anf.Mamba2(HIDDEN, HEADS, head_dim=5), mamba2),
    "mamba2-groups": (lambda: anf.Mamba2(HIDDEN, 4, head_dim=3, num_groups=2), mamba2),
}  # fmt: skip
