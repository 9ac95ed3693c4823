"""Features of single scores under autograd: gradcheck of the definition, compile, vmap, errors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import attnforge

B, S, H, HK, D = 2, 9, 4, 2, 6
DOUBLE = torch.float64


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=DOUBLE)


def learned(*shape: int) -> Tensor:
    return normal(*shape).requires_grad_()


def ids(*shape: int) -> Tensor:
    return torch.randint(0, 3, shape, dtype=torch.int32)


def angles() -> tuple[Tensor, Tensor]:
    at = torch.rand(HK, 20, 2, dtype=DOUBLE) * 6
    return at.cos(), at.sin()


WINDOWS = torch.tensor([[3, 2], [-1, 0], [5, -1], [0, 0]], dtype=torch.int32)
FEATURES: dict[str, Callable[[], dict[str, Any]]] = {
    "windows": lambda: {"window_size": WINDOWS},
    "causal_windows": lambda: {"window_size": WINDOWS, "causal": True},
    "prefix": lambda: {"causal": True, "prefix_lens": torch.tensor([3, 0], dtype=torch.int32)},
    "segments": lambda: {"segment_ids_q": ids(B, S), "segment_ids_k": ids(B, S)},
    "tree_mask": lambda: {"mask": torch.rand(B, 1, S, 7) > 0.4, "causal": True},
    "key_bias": lambda: {"key_bias": learned(1, H, S), "causal": True},
    "bias_heads": lambda: {"bias": learned(1, H, S, S), "softcap": 4.0},
    "bias_batch": lambda: {"bias": learned(B, 1, S, S), "causal": True},
    "rel_bias": lambda: {"rel_bias": learned(H, 9)},
    "forget": lambda: {"log_forget": (-torch.rand(B, S, H, dtype=DOUBLE)).requires_grad_(),
                       "causal": True},
    "row_scale": lambda: {"row_scale": learned(B, H, S), "softcap": 3.0, "causal": True},
    "rope": lambda: {"rope": angles(), "causal": True},
    "rope_positions": lambda: {"rope": angles(), "rope_interleaved": True,
                               "positions_q": torch.randint(0, 20, (B, S), dtype=torch.int32),
                               "positions_k": torch.randint(0, 20, (1, S), dtype=torch.int32)},
    "dropout": lambda: {"dropout_p": 0.3, "dropout_seed": 5, "causal": True},
    "head_scale": lambda: {"head_scale": learned(H)},
    "sigmoid": lambda: {"score_fn": "sigmoid", "causal": True, "key_bias": learned(B, 1, S)},
    "relu": lambda: {"score_fn": "relu", "causal": True},
    "softplus": lambda: {"score_fn": "softplus", "causal": True, "window_size": (3, 0)},
    "signed_softmax": lambda: {"score_fn": "signed_softmax", "causal": True},
    "together": lambda: {"rel_bias": learned(1, 5), "key_bias": learned(B, H, S), "causal": True,
                         "row_scale": learned(1, 1, S), "segment_ids_q": ids(B, S).clamp_max(1),
                         "segment_ids_k": ids(B, S).clamp_max(1), "dropout_p": 0.2,
                         "dropout_seed": 1, "rope": angles()},
}  # fmt: skip


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    return learned(B, S, H, D), learned(B, S, HK, D), learned(B, S, HK, D)


@pytest.mark.parametrize("name", FEATURES)
def test_gradcheck(name: str) -> None:
    # check 7: the definition's own gradients, learned features included
    options = FEATURES[name]()
    keys = [n for n, x in options.items() if isinstance(x, Tensor) and x.requires_grad]
    unnormalised = options.get("score_fn") in ("sigmoid", "relu")

    def call(q: Tensor, k: Tensor, v: Tensor, *extra: Tensor) -> Any:
        given = {**options, **dict(zip(keys, extra, strict=True))}
        out, lse = attnforge.flash_attention(q, k, v, return_lse=True, backend="reference", **given)
        return out if unnormalised else (out, lse.masked_fill(lse == -torch.inf, 0.0))

    tensors = (*inputs(), *(options[n] for n in keys))
    assert torch.autograd.gradcheck(call, tensors, fast_mode=True)


def test_gradcheck_of_learned_sinks_with_values() -> None:
    def call(q: Tensor, k: Tensor, v: Tensor, sink_k: Tensor, sink_v: Tensor) -> Any:
        return attnforge.flash_attention(
            q, k, v, causal=True, sink_kv=(sink_k, sink_v), return_lse=True, backend="reference"
        )

    tensors = (*inputs(), learned(2, HK, D), learned(2, HK, D))
    assert torch.autograd.gradcheck(call, tensors, fast_mode=True)


def test_learned_sinks_are_keys_that_every_row_sees() -> None:
    q, k, v = (x.detach() for x in inputs())
    sink_k, sink_v = normal(3, HK, D), normal(3, HK, D)
    got = attnforge.flash_attention(q, k, v, causal=True, sink_kv=(sink_k, sink_v))
    wide_k, wide_v = (
        torch.cat((s.expand(B, -1, -1, -1), x), 1) for s, x in ((sink_k, k), (sink_v, v))
    )
    want = attnforge.flash_attention(q, wide_k, wide_v, causal=True)
    seen = torch.ones(1, 1, S, S + 3, dtype=torch.bool).tril(3)
    assert torch.allclose(want, attnforge.flash_attention(q, wide_k, wide_v, mask=seen))
    assert torch.allclose(got, want, atol=1e-12)


@pytest.mark.parametrize("bidirectional", [True, False])
def test_t5_bias_equals_its_buckets_one_by_one(bidirectional: bool) -> None:
    transformers = pytest.importorskip("transformers.models.t5.modeling_t5")
    sq, sk, buckets, far = 40, 55, 16, 20
    table = torch.randn(buckets, H)
    bucket = transformers.T5Attention._relative_position_bucket(
        torch.arange(sk).view(1, -1) - torch.arange(sk - sq, sk).view(-1, 1),
        bidirectional=bidirectional, num_buckets=buckets, max_distance=far,
    )  # fmt: skip
    full = table[bucket].permute(2, 0, 1).unsqueeze(0)
    q, k, v = torch.randn(1, sq, H, 8), torch.randn(1, sk, H, 8), torch.randn(1, sk, H, 8)
    rel = attnforge.t5_rel_bias(table, bidirectional=bidirectional, max_distance=far)
    got = attnforge.flash_attention(q, k, v, rel_bias=rel, softmax_scale=1.0)
    want = attnforge.flash_attention(q, k, v, bias=full, softmax_scale=1.0)
    assert torch.allclose(got, want, atol=1e-5)


def test_rope_tables_rotate_like_the_formula() -> None:
    base = torch.tensor([100.0, 1e4])
    cos, sin = attnforge.rope_tables(12, 4, base=base)
    assert cos.shape == sin.shape == (2, 12, 2)
    assert float(cos[0, 7, 1]) == pytest.approx(torch.tensor(7 * 100**-0.5).cos().item(), abs=1e-6)
    q, k, v = torch.randn(1, 5, 4, 8), torch.randn(1, 12, 2, 8), torch.randn(1, 12, 2, 8)

    def turn(x: Tensor, start: int, group: int) -> Tensor:
        c, s = (t[:, start : start + x.shape[1]].repeat_interleave(group, 0).transpose(0, 1)
                for t in (cos, sin))  # fmt: skip
        a, b, rest = x[..., :2], x[..., 2:4], x[..., 4:]
        return torch.cat((a * c - b * s, b * c + a * s, rest), -1)

    got = attnforge.flash_attention(q, k, v, causal=True, rope=(cos, sin))
    want = attnforge.flash_attention(turn(q, 7, 2), turn(k, 0, 1), v, causal=True)
    assert torch.allclose(got, want, atol=1e-5)


def test_compiled_whole() -> None:
    # checks 78, 80: no graph break, gradients of the features too
    q, k, v = torch.randn(1, 8, 2, 8), torch.randn(1, 8, 2, 8), torch.randn(1, 8, 2, 8)
    shared = ids(1, 8)

    def call(q: Tensor, key_bias: Tensor) -> Tensor:
        out: Tensor = attnforge.flash_attention(
            q, k, v, causal=True, key_bias=key_bias, segment_ids_q=shared, segment_ids_k=shared
        )
        return out

    bias = torch.randn(1, 2, 8)
    grads = []
    for fn in (call, torch.compile(call, fullgraph=True, backend="aot_eager")):
        leaves = [x.clone().requires_grad_() for x in (q, bias)]
        grads.append(torch.autograd.grad(fn(*leaves).square().sum(), leaves))
    for got, want in zip(*grads, strict=True):
        assert torch.equal(got, want)


def test_vmap_runs_slice_by_slice() -> None:
    q, k, v = torch.randn(3, 2, 5, 2, 8), torch.randn(2, 5, 2, 8), torch.randn(2, 5, 2, 8)
    mask = torch.rand(2, 1, 5, 5) > 0.3

    def call(x: Tensor) -> Tensor:
        out: Tensor = attnforge.flash_attention(x, k, v, mask=mask)
        return out

    assert torch.allclose(torch.vmap(call)(q), torch.stack([call(x) for x in q]), atol=1e-6)


GOOD = (torch.randn(2, 5, 4, 8), torch.randn(2, 7, 2, 8), torch.randn(2, 7, 2, 8))
ERRORS: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "unknown": ({"key_bais": torch.ones(2)}, TypeError, "unexpected keyword argument 'key_bais'"),
    "windows_shape": ({"window_size": torch.ones(3, 2, dtype=torch.int32)}, ValueError,
                      r"window_size has shape \(3, 2\); want \[4, 2\]"),
    "one_segment": ({"segment_ids_q": torch.zeros(2, 5, dtype=torch.int32)}, ValueError,
                    "segment_ids_q comes without segment_ids_k"),
    "segment_dtype": ({"segment_ids_q": torch.zeros(2, 5), "segment_ids_k": torch.zeros(2, 7)},
                      TypeError, "segment_ids_q has dtype float32; want int32"),
    "mask_long": ({"mask": torch.ones(1, 1, 5, 8, dtype=torch.bool)}, ValueError,
                  "mask covers 8 keys; got 7"),
    "mask_dtype": ({"mask": torch.ones(1, 1, 5, 7)}, TypeError, "want bool"),
    "bias_shape": ({"bias": torch.ones(3, 1, 5, 7)}, ValueError, r"want \[2\|1, 4\|1, 5, 7\]"),
    "bias_dtype": ({"bias": torch.ones(1, 1, 5, 7, dtype=torch.float64)}, TypeError, "bias has"),
    "rel_even": ({"rel_bias": torch.ones(4, 6)}, ValueError, r"want \[heads_q\|1, 2 R \+ 1\]"),
    "forget_full": ({"log_forget": torch.ones(2, 7, 4)}, ValueError, "want causal=True"),
    "prefix_window": ({"prefix_lens": torch.ones(2, dtype=torch.int32), "window_size": (3, 0)},
                      ValueError, "prefix_lens comes with a left or per-head window"),
    "score_fn": ({"score_fn": "hardmax"}, ValueError, "want one of softmax, sigmoid"),
    "score_fn_sinks": ({"score_fn": "relu", "sinks": torch.ones(4)}, ValueError, "drop one"),
    "rate": ({"dropout_p": 1.0, "dropout_seed": 1}, ValueError, "0 <= p < 1"),
    "no_seed": ({"dropout_p": 0.1}, ValueError, "without dropout_seed"),
    "negative_seed": ({"dropout_p": 0.1, "dropout_seed": -1}, ValueError, "0 <= n < 2"),
    "positions": ({"positions_q": torch.zeros(2, 5, dtype=torch.int32)}, ValueError,
                  "given without rope"),
    "rope_wide": ({"rope": (torch.ones(1, 9, 5), torch.ones(1, 9, 5))}, ValueError, "<= 4"),
    "rope_pair": ({"rope": torch.ones(1, 9, 4)}, TypeError, "want a pair"),
    "sink_kv": ({"sink_kv": (torch.ones(1, 2, 8), torch.ones(1, 2, 4))}, ValueError, "sink_kv v"),
    "head_scale": ({"head_scale": torch.ones(3)}, ValueError, r"want \[4\]"),
}  # fmt: skip


@pytest.mark.parametrize("name", ERRORS)
def test_bad_features_get_a_sentence(name: str) -> None:
    options, kind, text = ERRORS[name]
    with pytest.raises(kind, match=text) as caught:
        attnforge.flash_attention(*GOOD, **options)
    assert str(caught.value).startswith("attnforge.flash_attention: ")


def test_packed_calls_refuse_square_tensors() -> None:
    cu = torch.tensor([0, 5], dtype=torch.int32)
    x = torch.randn(5, 2, 8)
    with pytest.raises(ValueError, match="bias is given with packed sequences"):
        attnforge.flash_attention_varlen(
            x, x, x, cu_seqlens_q=cu, cu_seqlens_k=cu, bias=torch.ones(1, 1, 5, 5)
        )


def test_explain_names_the_feature() -> None:
    found = attnforge.explain(
        attnforge.flash_attention, *GOOD, causal=True, key_bias=torch.zeros(1, 1, 7)
    )
    assert found.chosen is not None
    assert any("key_bias" in d.request.features for d in found.decisions)


@pytest.mark.parametrize("backend", ["reference", None])
def test_a_shut_gate_forgets_all_before_it(backend: str | None) -> None:
    q, k, v = (torch.randn(1, 12, 2, 8) for _ in range(3))
    gates = torch.zeros(1, 12, 2)
    gates[:, 5] = -torch.inf
    got = attnforge.flash_attention(q, k, v, causal=True, log_forget=gates, backend=backend)
    after = attnforge.flash_attention(q[:, 5:], k[:, 5:], v[:, 5:], causal=True)
    before = attnforge.flash_attention(q[:, :5], k[:, :5], v[:, :5], causal=True)
    assert torch.allclose(got, torch.cat((before, after), 1), atol=1e-5)


@pytest.mark.parametrize("backend", ["reference", None])
def test_a_bias_of_minus_infinity_hides_under_signed_weights(backend: str | None) -> None:
    q, k, v = (torch.randn(1, 6, 2, 8, requires_grad=True) for _ in range(3))
    bias = torch.zeros(1, 2, 6)
    bias[..., 2] = -torch.inf
    seen = torch.ones(1, 1, 6, 6, dtype=torch.bool)
    seen[..., 2] = False
    options: dict[str, Any] = {"score_fn": "signed_softmax", "backend": backend}
    results = []
    for more in ({"key_bias": bias}, {"mask": seen}):
        out = attnforge.flash_attention(q, k, v, **options, **more)
        results.append((out, *torch.autograd.grad(out.sum(), (q, k, v))))
    for got, want in zip(*results, strict=True):
        assert torch.allclose(got, want, atol=1e-6)


def test_dropout_is_replayed_by_seed_and_offset() -> None:
    q, k, v = (torch.randn(1, 64, 2, 8) for _ in range(3))

    def run(seed: int, offset: int) -> Tensor:
        out: Tensor = attnforge.flash_attention(
            q, k, v, dropout_p=0.5, dropout_seed=seed, dropout_offset=offset
        )
        return out

    assert torch.equal(run(1, 0), run(1, 0))
    assert not torch.equal(run(1, 0), run(2, 0))
    assert not torch.equal(run(1, 0), run(1, 1))
    assert not torch.equal(run(1, 0), run(1, 1 << 40))
