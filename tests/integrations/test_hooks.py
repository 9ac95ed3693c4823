"""Hooks into servers and image pipelines, against fakes that have the shape of their interfaces.

The fakes hold what the real ones call and give, no more: names, argument order, layouts of caches.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import sys
import types
from collections.abc import Callable, Iterator
from enum import Enum
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import attnforge.integrations.comfyui as af_comfyui
import attnforge.integrations.diffusers as af_diffusers
import attnforge.integrations.sglang as af_sglang
import attnforge.integrations.vllm as af_vllm

HQ, HK, D = 4, 2, 16
ROWS, LENGTHS = (5, 1, 3), (7, 12, 3)  # a chunk of a prompt, a decode, a whole prompt


def install(monkeypatch: pytest.MonkeyPatch, modules: dict[str, dict[str, Any]]) -> None:
    """Fake modules with these attributes, their packages included."""
    for name, attributes in modules.items():
        parts = name.split(".")
        for i in range(1, len(parts) + 1):
            path = ".".join(parts[:i])
            if path not in sys.modules or i == len(parts):
                monkeypatch.setitem(sys.modules, path, types.ModuleType(path))
        vars(sys.modules[name]).update(attributes)


@pytest.fixture(autouse=True)
def forget() -> Iterator[None]:
    """Modules that were imported over fakes do not stay."""
    yield
    for name in ("_vllm_backend", "_sglang_backend"):
        sys.modules.pop(f"attnforge.integrations.{name}", None)


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    left: int = -1,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    scale: float = D**-0.5,
) -> Tensor:
    """Causal attention of q [S, Hq, D] to k, v [L, Hk, D] in float64, aligned to the end."""
    k, v = (x.double().repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    s = torch.einsum("ihd,jhd->hij", q.double(), k) * scale
    s = softcap * torch.tanh(s / softcap) if softcap else s
    own = torch.arange(q.shape[0])[:, None] + k.shape[0] - q.shape[0]
    key = torch.arange(k.shape[0])
    hidden = (key > own) | ((key < own - left) if left >= 0 else False)
    s = s.masked_fill(hidden, -torch.inf)
    if sinks is not None:
        s = torch.cat([s, sinks.double()[:, None, None].expand(-1, s.shape[1], 1)], -1)
    p = s.softmax(-1)[..., : k.shape[0]]
    return torch.einsum("hij,jhd->ihd", p, v)


@dataclasses.dataclass
class Batch:
    """Requests with a history: all keys and values, and the new queries of each."""

    q: list[Tensor]
    k: list[Tensor]
    v: list[Tensor]

    def new(self, which: str) -> Tensor:
        """The rows that come with this step, packed."""
        parts = zip(getattr(self, which), ROWS, strict=True)
        return torch.cat([x[-n:] for x, n in parts])

    def want(self, **options: Any) -> Tensor:
        parts = zip(self.q, self.k, self.v, strict=True)
        return torch.cat([attend(*qkv, **options) for qkv in parts]).flatten(1)


def requests() -> Batch:
    torch.manual_seed(5)
    return Batch(
        [torch.randn(n, HQ, D) for n in ROWS],
        [torch.randn(n, HK, D) for n in LENGTHS],
        [torch.randn(n, HK, D) for n in LENGTHS],
    )


def close(found: Tensor, want: Tensor) -> None:
    torch.testing.assert_close(found.double(), want, atol=2e-6, rtol=2e-5)


# vLLM


class Custom(Enum):
    FLASH_ATTN = "theirs"
    CUSTOM = None

    def is_overridden(self) -> bool:
        return self in OVERRIDES

    def get_path(self) -> str:
        return OVERRIDES[self]


OVERRIDES: dict[Custom, str] = {}


class VllmBuilder:
    def __init__(self, spec: Any, layers: list[str], config: Any, device: Any) -> None:
        self.kv_cache_spec = spec


@pytest.fixture
def vllm(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    kinds = Enum("AttentionType", {"DECODER": "decoder", "ENCODER": "encoder"}, type=str)
    install(
        monkeypatch,
        {
            "vllm.v1.attention.backend": {
                "AttentionBackend": type("AttentionBackend", (), {}),
                "AttentionImpl": type("AttentionImpl", (), {}),
                "AttentionMetadataBuilder": VllmBuilder,
                "AttentionType": kinds,
            },
            "vllm.v1.attention.backends.registry": {
                "AttentionBackendEnum": Custom,
                "register_backend": OVERRIDES.__setitem__,
            },
        },
    )
    yield
    OVERRIDES.clear()


def vllm_backend() -> Any:
    module, name = OVERRIDES[Custom.CUSTOM].rsplit(".", 1)
    return getattr(importlib.import_module(module), name)


def vllm_step(batch: Batch, backend: Any, block_size: int = 4) -> tuple[Tensor, Any, Tensor]:
    """A cache that holds the histories, the metadata of the step, and the cache as it must be."""
    table = torch.tensor([[3, 7, 90], [1, 5, 2], [9, 90, 90]], dtype=torch.int32)
    shape = backend.get_kv_cache_shape(10, block_size, HK, D)
    cache = torch.full(shape, float("nan"))
    slots, full = [], cache.clone()
    for i, (k, v) in enumerate(zip(batch.k, batch.v, strict=True)):
        at = torch.arange(LENGTHS[i])
        block, offset = table[i, at // block_size].long(), at % block_size
        old = slice(0, LENGTHS[i] - ROWS[i])
        for side, x in enumerate((k, v)):
            cache[block[old], side, offset[old]] = x[old]
            full[block, side, offset] = x
        slots.append((block * block_size + offset)[-ROWS[i] :])
    common = SimpleNamespace(
        causal=True,
        num_actual_tokens=sum(ROWS),
        query_start_loc=torch.tensor([0, 5, 6, 9], dtype=torch.int32),
        max_query_len=5,
        seq_lens=torch.tensor(LENGTHS, dtype=torch.int32),
        block_table_tensor=table.clamp_max(9),
        slot_mapping=torch.cat([*slots, torch.tensor([-1, -1])]),
    )
    builder = backend.get_builder_cls()(None, ["layer"], None, "cpu")
    return cache, builder.build(0, common), full


@pytest.mark.parametrize("case", ["plain", "window", "softcap", "sinks"])
def test_vllm_serves_a_mixed_batch(vllm: None, case: str) -> None:
    af_vllm.register()
    af_vllm.register()
    backend = vllm_backend()
    assert backend.get_name() == "CUSTOM"
    assert backend.supports_sink()
    sinks = torch.randn(HQ)
    given: dict[str, Any] = {
        "plain": {},
        "window": {"sliding_window": 4},
        "softcap": {"logits_soft_cap": 1.5},
        "sinks": {"sinks": sinks},
    }[case]
    options: dict[str, Any] = {
        "plain": {},
        "window": {"left": 3},
        "softcap": {"softcap": 1.5},
        "sinks": {"sinks": sinks},
    }[case]
    batch = requests()
    cache, metadata, full = vllm_step(batch, backend)
    layer = backend.get_impl_cls()(HQ, D, 0.2, HK, None, **given)
    q, k, v = (torch.nn.functional.pad(batch.new(x), (0, 0, 0, 0, 0, 2)) for x in "qkv")
    output = torch.full((sum(ROWS) + 2, HQ * D), 7.0)
    found = layer.forward(None, q, k, v, cache, metadata, output)
    assert found is output
    close(output[:-2], batch.want(scale=0.2, **options))
    assert bool((output[-2:] == 7.0).all()), "padding stays as it was"
    assert torch.equal(cache.nan_to_num(9.0), full.nan_to_num(9.0))


def test_vllm_padding_among_the_slots_hurts_nobody(vllm: None) -> None:
    af_vllm.register()
    backend, batch = vllm_backend(), requests()
    cache, metadata, full = vllm_step(batch, backend)
    metadata.slots[-3:] = -1  # the last request is not real
    layer = backend.get_impl_cls()(HQ, D, 0.25, HK)
    output = torch.zeros(sum(ROWS), HQ * D)
    layer.forward(None, *map(batch.new, "qkv"), cache, metadata, output)
    close(output[:6], batch.want()[:6])
    assert torch.equal(cache[1:9].nan_to_num(9.0), full[1:9].nan_to_num(9.0))


def test_vllm_shared_layers_write_nothing(vllm: None) -> None:
    af_vllm.register()
    backend, batch = vllm_backend(), requests()
    _, metadata, full = vllm_step(batch, backend)
    layer = backend.get_impl_cls()(HQ, D, 0.25, HK, kv_sharing_target_layer_name="other")
    output = torch.zeros(sum(ROWS), HQ * D)
    junk = torch.full_like(batch.new("k"), float("nan"))
    layer.forward(None, batch.new("q"), junk, junk, full, metadata, output)
    close(output, batch.want())


def test_vllm_refuses_with_a_reason(vllm: None) -> None:
    af_vllm.register()
    backend = vllm_backend()
    implementation = backend.get_impl_cls()
    assert not backend.supports_head_size(20)
    assert torch.float8_e4m3fn not in backend.supported_dtypes
    with pytest.raises(NotImplementedError, match="want a decoder's"):
        implementation(HQ, D, 0.25, HK, attn_type="encoder")
    layer = implementation(HQ, D, 0.25, HK)
    out = torch.ones(3, HQ * D)
    with pytest.raises(NotImplementedError, match="output_scale=None"):
        layer.forward(None, out, out, out, out, None, out, output_scale=out)
    assert not layer.forward(None, out, out, out, out, None, out).any(), "a run without a batch"
    with pytest.raises(NotImplementedError, match="want True"):
        backend.get_builder_cls()(None, [], None, "cpu").build(0, SimpleNamespace(causal=False))


def test_vllm_plugin_never_stops_vllm(vllm: None, monkeypatch: pytest.MonkeyPatch) -> None:
    OVERRIDES[Custom.CUSTOM] = "somebody.Else"
    with pytest.raises(ValueError, match=r"somebody\.Else already"):
        af_vllm.register()
    with pytest.warns(UserWarning, match=r"somebody\.Else already"):
        af_vllm.plugin()
    install(monkeypatch, {"vllm.v1.attention.backends.registry": {}})  # an older one
    with pytest.raises(ImportError, match="install a vllm that has it"):
        af_vllm.register()
    with pytest.warns(UserWarning, match="install a vllm that has it"):
        af_vllm.plugin()


# SGLang


class Pool:
    """Tokens of one layer; NaN where nothing was written."""

    def __init__(self) -> None:
        self.k, self.v = (torch.full((64, HK, D), float("nan")) for _ in range(2))

    def set_kv_buffer(self, layer: Any, loc: Tensor, k: Tensor, v: Tensor) -> None:
        self.k[loc], self.v[loc] = k.view(-1, HK, D), v.view(-1, HK, D)

    def get_key_buffer(self, layer: int) -> Tensor:
        return self.k

    def get_value_buffer(self, layer: int) -> Tensor:
        return self.v


@pytest.fixture
def sglang(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    known: dict[str, Any] = {"triton": object()}
    choices: list[str] = ["triton"]

    def add(name: str) -> Callable[[Any], Any]:
        return lambda create: known.setdefault(name, create)

    base = "sglang.srt.layers.attention"
    install(
        monkeypatch,
        {
            f"{base}.attention_registry": {
                "ATTENTION_BACKENDS": known,
                "register_attention_backend": add,
            },
            f"{base}.base_attn_backend": {"AttentionBackend": type("AttentionBackend", (), {})},
            "sglang.srt.server_args": {
                "ATTENTION_BACKEND_CHOICES": choices,
                "add_attention_backend_choices": choices.extend,
            },
        },
    )
    return {"known": known, "choices": choices}


def sglang_layer(**changes: Any) -> SimpleNamespace:
    plain = {
        "layer_id": 0, "tp_q_head_num": HQ, "qk_head_dim": D, "v_head_dim": D, "scaling": 0.25,
        "logit_cap": 0.0, "sliding_window_size": -1, "is_cross_attention": False,
        "attn_type": SimpleNamespace(value="decoder"),
    }  # fmt: skip
    return SimpleNamespace(**{**plain, **changes})


def sglang_batch(batch: Batch, decode: bool) -> SimpleNamespace:
    pool, order = Pool(), torch.randperm(64, generator=torch.Generator().manual_seed(1))
    table = torch.full((4, 16), 63, dtype=torch.int32)
    fresh, start = [], 0
    for i, n in enumerate(LENGTHS):
        slots = order[start : start + n]
        start += n
        table[i + 1, :n] = slots.int()
        rows = 1 if decode else ROWS[i]
        pool.k[slots[:-rows]], pool.v[slots[:-rows]] = batch.k[i][:-rows], batch.v[i][:-rows]
        fresh.append(slots[-rows:])
    return SimpleNamespace(
        forward_mode=SimpleNamespace(is_decode_or_idle=lambda: decode),
        seq_lens=torch.tensor(LENGTHS),
        seq_lens_cpu=torch.tensor(LENGTHS),
        extend_seq_lens=torch.tensor(ROWS, dtype=torch.int32),
        extend_seq_lens_cpu=list(ROWS),
        req_pool_indices=torch.tensor([1, 2, 3]),
        req_to_token_pool=SimpleNamespace(req_to_token=table),
        token_to_kv_pool=pool,
        out_cache_loc=torch.cat(fresh),
    )


@pytest.mark.parametrize("decode", [False, True])
@pytest.mark.parametrize("case", ["plain", "window", "softcap", "sinks"])
def test_sglang(sglang: dict[str, Any], decode: bool, case: str) -> None:
    af_sglang.register()
    af_sglang.register()
    assert sglang["choices"] == ["triton", "attnforge"]
    backend = sglang["known"]["attnforge"](SimpleNamespace(use_mla_backend=False))
    batch = requests()
    if decode:
        batch.q = [x[-1:] for x in batch.q]
    forward = sglang_batch(batch, decode)
    sinks = torch.randn(HQ) if case == "sinks" else None
    layer = sglang_layer(
        sliding_window_size=3 if case == "window" else -1,
        logit_cap=1.5 if case == "softcap" else 0.0,
    )
    backend.init_forward_metadata(forward)
    rows = [len(x) for x in batch.q]
    q = torch.cat(batch.q).flatten(1)
    k, v = (
        torch.cat([x[-n:] for x, n in zip(side, rows, strict=True)]) for side in (batch.k, batch.v)
    )
    run = backend.forward_decode if decode else backend.forward_extend
    found = run(q, k, v, layer, forward, **({} if sinks is None else {"sinks": sinks}))
    close(
        found,
        batch.want(left=layer.sliding_window_size, softcap=layer.logit_cap, sinks=sinks),
    )


def test_sglang_refuses_with_a_reason(
    sglang: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError, match="'triton' is another"):
        af_sglang.register("triton")
    af_sglang.register()
    create = sglang["known"]["attnforge"]
    with pytest.raises(NotImplementedError, match="MLA"):
        create(SimpleNamespace(use_mla_backend=True))
    backend, forward = create(SimpleNamespace()), sglang_batch(requests(), False)
    q = torch.zeros(9, HQ * D)
    with pytest.raises(RuntimeError, match="before init_forward_metadata"):
        backend.forward_extend(q, None, None, sglang_layer(), forward)
    backend.init_forward_metadata(forward)
    for layer, extra in (
        (sglang_layer(is_cross_attention=True), {}),
        (sglang_layer(attn_type="encoder_only"), {}),
        (sglang_layer(), {"q_rope": q}),
    ):
        with pytest.raises(NotImplementedError, match="self-attention of a decoder"):
            backend.forward_extend(q, None, None, layer, forward, **extra)
    monkeypatch.delattr(sys.modules["sglang.srt.server_args"], "add_attention_backend_choices")
    with pytest.raises(ImportError, match="install a sglang"):
        af_sglang.register()


# diffusers


def native(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    return_lse: bool = False,
    _parallel_config: Any = None,
) -> Any:
    if _parallel_config is not None:
        return "context parallel"
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    if attn_mask is not None and attn_mask.ndim == 2:
        attn_mask = attn_mask[:, None, None]
    return torch.nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
    ).transpose(1, 2)


@pytest.fixture
def diffusers(monkeypatch: pytest.MonkeyPatch) -> dict[Any, Any]:
    names = Enum("AttentionBackendName", {"NATIVE": "native"}, type=str)
    registry = SimpleNamespace(
        _backends={names.NATIVE: native},
        _supported_arg_names={names.NATIVE: set(inspect.signature(native).parameters)},
    )
    install(
        monkeypatch,
        {
            "diffusers.models.attention_dispatch": {
                "_AttentionBackendRegistry": registry,
                "AttentionBackendName": names,
            }
        },
    )
    return registry._backends


@pytest.mark.parametrize("case", ["plain", "causal", "keys", "added", "grouped"])
def test_diffusers(diffusers: dict[Any, Any], case: str) -> None:
    torch.manual_seed(2)
    q, k, v = torch.randn(2, 9, 4, 16), torch.randn(2, 9, 4, 16), torch.randn(2, 9, 4, 16)
    options: dict[str, Any] = {
        "plain": {"scale": 0.3},
        "causal": {"is_causal": True},
        "keys": {"attn_mask": torch.arange(9) < torch.tensor([[9], [4]])},
        "added": {"attn_mask": torch.randn(2, 4, 9, 9)},
        "grouped": {"enable_gqa": True},
    }[case]
    if case == "grouped":
        k, v = k[:, :, :2], v[:, :, :2]
    want = native(q, k, v, **options)
    (name,) = diffusers
    with af_diffusers.enable() as handle:
        assert handle.active
        found = diffusers[name](query=q, key=k, value=v, **options, _parallel_config=None)
        assert diffusers[name](q, k, v, _parallel_config=object()) == "context parallel"
    torch.testing.assert_close(found, want, atol=2e-6, rtol=2e-5)
    assert diffusers[name] is native
    assert not handle.active


def test_diffusers_of_another_form(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, {"diffusers.models.attention_dispatch": {}})
    with pytest.raises(ImportError, match=r"diffusers 0\.36 or newer"):
        af_diffusers.enable()


# ComfyUI


class Patcher:
    def __init__(self, options: dict[str, Any]) -> None:
        self.model_options = options

    def clone(self) -> Patcher:
        return Patcher(self.model_options)


def comfy(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """[B, H, S, D]."""
    if mask is not None and mask.ndim == 3:
        mask = mask[:, None]
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, mask)


@pytest.mark.parametrize("mask", [None, "rows", "batch", "heads"])
@pytest.mark.parametrize("heads_first", [False, True])
def test_comfyui(mask: str | None, heads_first: bool) -> None:
    torch.manual_seed(4)
    q, k, v = torch.randn(2, 3, 7, 16), torch.randn(2, 3, 11, 16), torch.randn(2, 3, 11, 16)
    shapes = {"rows": (7, 11), "batch": (2, 7, 11), "heads": (2, 3, 7, 11)}
    given = None if mask is None else torch.randn(shapes[mask])
    model = Patcher({"transformer_options": {"kept": 1}, "other": 2})
    patched = af_comfyui.patch(model)
    assert "optimized_attention_override" not in model.model_options["transformer_options"]
    assert patched.model_options["transformer_options"]["kept"] == 1
    override = patched.model_options["transformer_options"]["optimized_attention_override"]
    want = comfy(q, k, v, given)
    flat = [x.transpose(1, 2).flatten(2) for x in (q, k, v)]
    found = override(
        None, *((q, k, v) if heads_first else flat), 3, mask=given, skip_reshape=heads_first,
        skip_output_reshape=heads_first, transformer_options={}, _inside_attn_wrapper=True,
    )  # fmt: skip
    expected = want if heads_first else want.transpose(1, 2).flatten(2)
    torch.testing.assert_close(found, expected, atol=2e-6, rtol=2e-5)


def test_comfyui_takes_no_ones_place() -> None:
    model = Patcher({"transformer_options": {"optimized_attention_override": print}})
    with pytest.raises(ValueError, match="already"):
        af_comfyui.patch(model)
    again = af_comfyui.patch(af_comfyui.patch(Patcher({})))
    assert again.model_options["transformer_options"]
