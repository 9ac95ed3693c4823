"""fla's names: what the layer adds (order, reversal, gates, layouts) against loops in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from attnforge.compat import fla

T, H, K, V = 9, 2, 8, 6
CU = torch.tensor([0, 4, 4, 9])


def drawn(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def qkv(batch: int = 2, value_heads: int = H) -> tuple[Tensor, Tensor, Tensor]:
    k = functional.normalize(drawn(batch, T, H, K, seed=1), dim=-1)
    return drawn(batch, T, H, K, seed=0), k, drawn(batch, T, value_heads, V, seed=2)


def loop(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gate: Tensor | None = None,
    beta: Tensor | None = None,
    state: Tensor | None = None,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """One sequence [T, H, ..] token by token; gate [T, H, K] of keys; beta: the delta rule."""
    q, k, v = (x.double() for x in (q, k, v))
    s = v.new_zeros(q.shape[1], q.shape[2], v.shape[2]) if state is None else state.double()
    out = []
    for t in range(q.shape[0]):
        if gate is not None:
            s = s * gate[t].double().exp().unsqueeze(-1)
        value = v[t]
        if beta is not None:
            value = beta[t].double().unsqueeze(-1) * (value - torch.einsum("hkv,hk->hv", s, k[t]))
        s = s + k[t].unsqueeze(-1) * value.unsqueeze(-2)
        out.append(torch.einsum("hkv,hk->hv", s, q[t]))
    factor = q.shape[2] ** -0.5 if scale is None else scale
    return torch.stack(out) * factor, s


def close(got: Tensor, want: Tensor) -> None:
    torch.testing.assert_close(got.double(), want.double(), rtol=2e-5, atol=5e-6)


def keys(gate: Tensor) -> Tensor:
    """[.., H] -> [.., H, K]"""
    return gate.unsqueeze(-1).expand(*gate.shape, K)


def log_gate(*shape: int, seed: int = 3) -> Tensor:
    return functional.logsigmoid(drawn(*shape, seed=seed))


FORMS = {
    "linear": (fla.chunk_linear_attn, fla.fused_chunk_linear_attn, fla.fused_recurrent_linear_attn),
    "simple": (fla.chunk_simple_gla, fla.fused_chunk_simple_gla, fla.fused_recurrent_simple_gla),
    "retention": (fla.chunk_retention, fla.fused_chunk_retention, fla.fused_recurrent_retention),
    "lightning": (fla.chunk_lightning_attn, fla.fused_recurrent_lightning_attn),
    "gla": (fla.chunk_gla, fla.fused_chunk_gla, fla.fused_recurrent_gla),
    "delta": (fla.chunk_delta_rule, fla.fused_chunk_delta_rule, fla.fused_recurrent_delta_rule),
    "gdn": (fla.chunk_gated_delta_rule, fla.chunk_gdn),
    "kda": (fla.chunk_kda, fla.fused_recurrent_kda),
}


def arguments(name: str) -> tuple[tuple[Any, ...], dict[str, Any], Tensor | None, Tensor | None]:
    """(positional after q k v, keywords, key gates, beta) of a family, for a batch of 2."""
    g, gk, beta = log_gate(2, T, H), log_gate(2, T, H, K), torch.sigmoid(drawn(2, T, H, seed=4))
    head = torch.arange(H)
    return {
        "linear": ((), {"normalize": False}, None, None),
        "simple": ((g,), {}, keys(g), None),
        "retention": ((), {}, keys(torch.log1p(-(2.0 ** (-5 - head))).expand(2, T, H)), None),
        "lightning": ((1, 4), {}, keys((-(8 / H) * (1 - 1 / 4) * head).expand(2, T, H)), None),
        "gla": ((gk,), {}, gk, None),
        "delta": ((beta,), {}, None, beta),
        "gdn": ((g, beta), {}, keys(g), beta),
        "kda": ((gk, beta), {}, gk, beta),
    }[name]


@pytest.mark.parametrize("name", list(FORMS))
def test_every_form_is_the_recurrence(name: str) -> None:
    q, k, v = qkv()
    more, options, gate, beta = arguments(name)
    first = drawn(2, H, K, V, seed=5)
    for form in FORMS[name]:
        out, state = form(
            q, k, v, *more, initial_state=first, output_final_state=True, scale=0.7, **options
        )
        for b in range(2):
            want, last = loop(
                q[b], k[b], v[b], None if gate is None else gate[b],
                None if beta is None else beta[b], first[b], 0.7,
            )  # fmt: skip
            close(out[b], want)
            close(state[b], last)
        assert form(q, k, v, *more, **options)[1] is None


REVERSED = {
    "linear": fla.fused_recurrent_linear_attn,
    "simple": fla.fused_recurrent_simple_gla,
    "retention": fla.fused_recurrent_retention,
    "lightning": fla.fused_recurrent_lightning_attn,
    "gla": fla.fused_recurrent_gla,
}


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", list(REVERSED))
def test_reverse_runs_from_the_end(name: str, packed: bool) -> None:
    q, k, v = qkv(1)
    more, options, gate, _ = arguments(name)
    more = tuple(x[:1] if isinstance(x, Tensor) else x for x in more)
    cu = CU if packed else None
    out, _ = REVERSED[name](q, k, v, *more, reverse=True, cu_seqlens=cu, **options)
    for a, b in ((0, 4), (4, 9)) if packed else ((0, 9),):
        back = slice(a, b)
        parts = (x[0, back].flip(0) for x in (q, k, v))
        want, _ = loop(*parts, None if gate is None else gate[0, back].flip(0))
        close(out[0, back], want.flip(0))


def test_gates_of_simple_gla_add_up() -> None:
    q, k, v = qkv()
    g, gamma = log_gate(2, T, H), torch.tensor([-0.5, -0.1])
    both = fla.chunk_simple_gla(q, k, v, g, gamma)[0]
    close(both[0], loop(q[0], k[0], v[0], keys(g + gamma)[0])[0])
    alone = fla.chunk_simple_gla(q, k, v, g_gamma=gamma)[0]
    close(alone[0], loop(q[0], k[0], v[0], keys(gamma.expand(T, H)))[0])
    neither = fla.parallel_simple_gla(q, k, v)[0]
    close(neither[0], loop(q[0], k[0], v[0])[0])
    assert torch.equal(fla.parallel_retention(q, k, v)[0], fla.chunk_retention(q, k, v)[0])


@pytest.mark.parametrize("name", ["simple", "gla", "gdn", "kda", "retention"])
def test_states_with_values_first(name: str) -> None:
    q, k, v = qkv()
    more, options, _, _ = arguments(name)
    first = drawn(2, H, K, V, seed=5)
    form = FORMS[name][0]
    out, state = form(q, k, v, *more, initial_state=first, output_final_state=True, **options)
    turned, last = form(
        q, k, v, *more, initial_state=first.mT.contiguous(), output_final_state=True,
        state_v_first=True, **options,
    )  # fmt: skip
    assert torch.equal(out, turned)
    assert torch.equal(state, last.mT)


def test_normaliser_and_its_state() -> None:
    q, k, v = (x.abs() for x in qkv())
    whole, (_, z) = fla.chunk_linear_attn(q, k, v, output_final_state=True)
    ones = torch.ones(T, H, 1)
    want = loop(q[0], k[0], v[0])[0] / loop(q[0], k[0], ones)[0]
    close(whole[0], want)
    assert z.shape == (2, 1, H, K)
    close(z[:, 0], k.sum(1))
    head, state = fla.chunk_linear_attn(q[:, :4], k[:, :4], v[:, :4], output_final_state=True)
    tail, _ = fla.chunk_linear_attn(q[:, 4:], k[:, 4:], v[:, 4:], initial_state=state)
    close(torch.cat((head, tail), 1), whole)


def test_raw_gates_and_logits() -> None:
    q, k, v = qkv()
    raw, logit = drawn(2, T, H, seed=6), drawn(2, T, H, seed=7)
    a_log, bias = torch.tensor([0.2, -0.3]), torch.tensor([0.1, 0.4])
    gate = -a_log.exp() * functional.softplus(raw + bias)
    options = {"use_gate_in_kernel": True, "use_beta_sigmoid_in_kernel": True}
    out, _ = fla.chunk_gated_delta_rule(
        q, k, v, raw, logit, allow_neg_eigval=True, A_log=a_log, dt_bias=bias, **options
    )
    close(out[1], loop(q[1], k[1], v[1], keys(gate)[1], 2 * torch.sigmoid(logit)[1])[0])
    raw, bias = drawn(2, T, H, K, seed=8), drawn(H * K, seed=9)
    shifted = raw + bias.view(H, K)
    gate = -a_log.exp().unsqueeze(-1) * functional.softplus(shifted)
    out, _ = fla.chunk_kda(q, k, v, raw, logit, A_log=a_log, dt_bias=bias, **options)
    close(out[1], loop(q[1], k[1], v[1], gate[1], torch.sigmoid(logit)[1])[0])
    gate = -5.0 * torch.sigmoid(a_log.exp().unsqueeze(-1) * shifted)
    out, _ = fla.fused_recurrent_kda(q, k, v, raw, logit, a_log, bias, lower_bound=-5.0, **options)
    close(out[1], loop(q[1], k[1], v[1], gate[1], torch.sigmoid(logit)[1])[0])


def test_gates_of_the_recurrent_delta_rule() -> None:
    q, k, v = qkv()
    g, gk, beta = log_gate(2, T, H), log_gate(2, T, H, K), torch.sigmoid(drawn(2, T, H, seed=4))
    out, _ = fla.fused_recurrent_gdn(q, k, v, g, gk, None, beta)
    close(out[0], loop(q[0], k[0], v[0], keys(g)[0] + gk[0], beta[0])[0])
    out, _ = fla.fused_recurrent_gdn(q, k, v)
    close(out[0], loop(q[0], k[0], v[0], None, torch.ones(T, H))[0])
    with pytest.raises(ValueError, match="gv"):
        fla.fused_recurrent_gdn(q, k, v, gv=v)


def slots(q: Tensor, k: Tensor, v: Tensor, s: Tensor, g: Tensor) -> Tensor:
    """Two passes over slots, one sequence."""
    widened = g.double().exp()
    kt = k.new_zeros(H, s.shape[2], K).double()
    vt = v.new_zeros(H, s.shape[2], V).double()
    out = []
    for t in range(q.shape[0]):
        kt = kt * widened[t].unsqueeze(-1) + s[t].double().unsqueeze(-1) * k[t].double().unsqueeze(
            1
        )
        vt = vt * widened[t].unsqueeze(-1) + s[t].double().unsqueeze(-1) * v[t].double().unsqueeze(
            1
        )
        p = torch.softmax(torch.einsum("hmk,hk->hm", kt, q[t].double()) * K**-0.5, -1)
        out.append(torch.einsum("hmv,hm->hv", vt, p))
    return torch.stack(out)


def test_slots() -> None:
    q, k, v = qkv()
    s, g = drawn(2, T, H, 5, seed=5), log_gate(2, T, H, 5)
    for form in (fla.chunk_gsa, fla.fused_recurrent_gsa):
        close(form(q, k, v, s, g)[0][1], slots(q[1], k[1], v[1], s[1], g[1]))
    back = fla.fused_recurrent_gsa(q, k, v, s, g, reverse=True)[0]
    close(back[1], slots(*(x[1].flip(0) for x in (q, k, v, s, g))).flip(0))
    z = s.double().logcumsumexp(1)
    gates = torch.cat((z[:, :1], z[:, :-1]), 1) - z
    close(fla.chunk_gsa(q, k, v, s)[0][0], slots(q[0], k[0], v[0], (s - z).exp()[0], gates[0]))


def test_hgrn() -> None:
    x, g, first = drawn(2, T, 5, seed=0), log_gate(2, T, 5), drawn(2, 5, seed=1)
    h, want = first.double(), []
    for t in range(T):
        h = g[:, t].double().exp() * h + x[:, t]
        want.append(h)
    for form in (fla.chunk_hgrn, fla.fused_recurrent_hgrn):
        out, state = form(x, g, first, True)
        close(out, torch.stack(want, 1))
        close(state, h)


@pytest.mark.parametrize("packed", [False, True])
def test_softmax_attention(packed: bool) -> None:
    q, k, v = drawn(1, T, 4, K, seed=0), drawn(1, T, 2, K, seed=1), drawn(1, T, 2, V, seed=2)
    g, sink = log_gate(1, T, 4), drawn(4, seed=5)
    cu = CU if packed else None
    out = fla.parallel_attn(q, k, v, g, 0.4, 3, cu, sink_bias=sink)
    for a, b in ((0, 4), (4, 9)) if packed else ((0, 9),):
        part = slice(a, b)
        wide = [x[0, part].double().transpose(0, 1) for x in (q, k, v)]
        keys_, values = (x.repeat_interleave(2, 0) for x in wide[1:])
        decay = g[0, part].double().T.cumsum(-1)
        scores = wide[0] @ keys_.mT * 0.4 + decay.unsqueeze(-1) - decay.unsqueeze(-2)
        row = torch.arange(b - a)
        apart = row.unsqueeze(1) - row
        scores = scores.masked_fill((apart < 0) | (apart >= 3), -torch.inf)
        full = torch.cat((scores, sink.double().view(4, 1, 1).expand(4, b - a, 1)), -1)
        want = (torch.softmax(full, -1)[..., :-1] @ values).transpose(0, 1)
        close(out[0, part], want)
    assert torch.equal(
        fla.parallel_forgetting_attn(q, k, v, g, cu_seqlens=cu),
        fla.parallel_attn(q, k, v, g, cu_seqlens=cu),
    )


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda x, b: fla.chunk_simple_gla(*x, cp_context=object()), "cp_context"),
        (lambda x, b: fla.parallel_retention(*x, output_attentions=True), "output_attentions"),
        (lambda x, b: fla.parallel_simple_gla(*x, output_attentions=True), "output_attentions"),
        (lambda x, b: fla.chunk_gsa(*x, x[0], cu_seqlens=CU), "g is None"),
        (lambda x, b: fla.chunk_gdn(*x, b, b, use_gate_in_kernel=True), "A_log"),
        (lambda x, b: fla.chunk_gdn(*x, b, b, allow_neg_eigval=True), "allow_neg_eigval"),
        (lambda x, b: fla.chunk_kda(*x, x[0], b, return_intermediate_states=True), "intermediate"),
    ],
)
def test_what_is_not_served_is_named(call: Any, name: str) -> None:
    with pytest.raises(ValueError, match=name):
        call(qkv(1), torch.sigmoid(drawn(1, T, H, seed=4)))
    tuned = fla.chunk_simple_gla(*qkv(1), chunk_size=32)[0]
    assert torch.equal(tuned, fla.chunk_simple_gla(*qkv(1))[0])


@pytest.mark.parametrize("cu_seqlens", [None, CU])
def test_window_of_no_keys(cu_seqlens: Tensor | None) -> None:
    q, k, v = (x.requires_grad_() for x in qkv(1))
    out = fla.parallel_attn(
        q, k, v, window_size=0, cu_seqlens=cu_seqlens, sink_bias=torch.zeros(H)
    )  # fmt: skip
    out.sum().backward()
    for x in (out, q.grad, k.grad, v.grad):
        assert x is not None
        assert not x.any()
    with pytest.raises(ValueError, match="window_size is -1"):
        fla.parallel_attn(q, k, v, window_size=-1)


def test_former_name_of_state_v_first() -> None:
    arguments = (*qkv(1), log_gate(1, T, H))
    with pytest.warns(DeprecationWarning, match="state_v_first"):
        _, state = fla.chunk_simple_gla(
            *arguments, output_final_state=True, transpose_state_layout=True
        )
    _, want = fla.chunk_simple_gla(*arguments, output_final_state=True)
    assert torch.equal(state, want.transpose(-1, -2))
    with pytest.raises(ValueError, match="beside state_v_first"):
        fla.chunk_simple_gla(*arguments, state_v_first=True, transpose_state_layout=True)
