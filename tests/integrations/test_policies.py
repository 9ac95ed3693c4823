"""Policies in transformers' `generate`: a whole budget is dense, batches are their sequences."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

os.environ.setdefault("HF_HUB_OFFLINE", "1")
pytest.importorskip("transformers", reason="transformers is not installed (extra: transformers)")

import itertools

import transformers

import attnforge
import attnforge.integrations.policies as sparse
from attnforge import policies
from attnforge.integrations import transformers as hf
from attnforge.testing import smollm2

pytestmark = [pytest.mark.integration, pytest.mark.filterwarnings("ignore::DeprecationWarning")]

# Settings with a small budget; PyramidKV's is a mean over layers.
SMALL: dict[str, dict[str, Any]] = {
    **{name: {"budget": 16} for name in policies.POLICIES},
    "lsh": {"num_bits": 2, "num_tables": 8, "window": 8},
    "lserve": {"budget": 16, "page_size": 8, "part": 4},
    "pyramidkv": {"budget": 16, "layers": 3, "observed": 4},
    "quest": {"budget": 16, "page_size": 4},
    "snapkv": {"budget": 16, "observed": 4},
    "tidal": {"budget": 16, "dense": (0,), "chooses": (1,)},
}


@pytest.fixture(scope="module")
def model() -> Iterator[Any]:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=1024,
        pad_token_id=0, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    with hf.enable():
        yield transformers.LlamaForCausalLM(config).eval()


@pytest.fixture(autouse=True)
def sparse_from_the_budget_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """Contexts here are far shorter than where a sparse step pays."""
    monkeypatch.setattr(policies.Policy, "crossover", 0)


@pytest.fixture
def prompt() -> Tensor:
    return torch.randint(1, 50, (2, 60), generator=torch.Generator().manual_seed(0))


def generate(model: Any, name: str, ids: Tensor, steps: int = 12, **more: Any) -> tuple[Any, Any]:
    """Tokens [B, steps] and logits [B, steps, V] of a greedy run."""
    model.set_attn_implementation(name)
    out = model.generate(
        ids, max_new_tokens=steps, do_sample=False, output_logits=True,
        return_dict_in_generate=True, **more,
    )  # fmt: skip
    return out.sequences[:, ids.shape[1] :], torch.stack(out.logits, 1)


WHOLE = {
    **{name: {**own, "budget": 1000} for name, own in SMALL.items()},
    "lsh": {"num_bits": 0, "window": 8},
}


@pytest.mark.parametrize("name", policies.POLICIES)
def test_a_budget_of_everything_is_dense(model: Any, prompt: Tensor, name: str) -> None:
    want = generate(model, "attnforge", prompt)
    with sparse.enable(name, **WHOLE[name]):
        got = generate(model, f"attnforge:{name}", prompt)
    assert torch.equal(got[0], want[0])
    torch.testing.assert_close(got[1], want[1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", policies.POLICIES)
def test_a_small_budget_generates(model: Any, prompt: Tensor, name: str) -> None:
    """Every policy runs in generate and is not dense; a second run is the first again."""
    if name == "lsh":  # sinks, window and 256 keys that wait are exact
        prompt = prompt.repeat(1, 6)
    _, dense = generate(model, "attnforge", prompt)
    with sparse.enable(name, **SMALL[name]):
        runs = [generate(model, f"attnforge:{name}", prompt)[1] for _ in range(2)]
    assert torch.equal(runs[0], runs[1])
    assert torch.equal(runs[0][:, 0], dense[:, 0])  # the prompt is dense
    assert not torch.allclose(runs[0][:, 1:], dense[:, 1:], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", ["quest", "snapkv", "h2o", "streaming", "razor"])
@pytest.mark.parametrize("side", ["left", "none"])
def test_sequences_of_a_batch_are_as_if_alone(
    model: Any, prompt: Tensor, name: str, side: str
) -> None:
    mask = torch.ones_like(prompt)
    if side == "left":
        mask[1, :13] = 0
    with sparse.enable(name, **SMALL[name]):
        _, both = generate(model, f"attnforge:{name}", prompt, attention_mask=mask)
        for b, ids in ((0, prompt[:1]), (1, prompt[1:, 13:] if side == "left" else prompt[1:])):
            _, alone = generate(
                model, f"attnforge:{name}", ids, attention_mask=torch.ones_like(ids)
            )
            torch.testing.assert_close(both[b : b + 1], alone, rtol=1e-4, atol=1e-5)


def test_dense_layers(model: Any, prompt: Tensor) -> None:
    """All layers dense is dense; with one of them the others still choose."""
    want = generate(model, "attnforge", prompt)
    with sparse.enable("streaming", budget=8, dense=range(3)):
        assert torch.equal(generate(model, "attnforge:streaming", prompt)[1], want[1])
    calls: list[int] = []

    class Watched(policies.StreamingLLM):
        def select(self, *args: Any, layer: int = 0) -> policies.Lists:
            calls.append(layer)
            return super().select(*args, layer=layer)

    with sparse.enable(lambda: Watched(8), name="attnforge:watched", dense=(1,)):
        generate(model, "attnforge:watched", prompt, steps=3)
    assert set(calls) == {0, 2}


def test_a_prompt_in_chunks(model: Any, prompt: Tensor) -> None:
    """A chunked prompt of a whole budget is dense; with a small one only the first rows are."""
    model.set_attn_implementation("attnforge")
    with torch.no_grad():
        want = model(prompt).logits
        for budget in (1000, 16):
            with sparse.enable("quest", budget=budget, page_size=4, prefill="chunks", chunk=8):
                model.set_attn_implementation("attnforge:quest")
                got = model(prompt).logits
            rows = 60 if budget == 1000 else 24
            torch.testing.assert_close(got[:, :rows], want[:, :rows], rtol=1e-4, atol=1e-5)
            assert budget == 1000 or not torch.allclose(got[:, 24:], want[:, 24:], atol=1e-3)


def test_a_prompt_in_pieces_is_observed_as_one(model: Any, prompt: Tensor) -> None:
    found = []
    for cuts in ((0, 60), (0, 25, 60)):
        with sparse.enable("h2o", budget=16), torch.no_grad():
            model.set_attn_implementation("attnforge:h2o")
            cache = transformers.DynamicCache()
            for a, b in itertools.pairwise(cuts):
                model(prompt[:, a:b], past_key_values=cache)
            found.append(model(prompt[:, :1], past_key_values=cache).logits)
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-5)


def test_smollm2_under_a_whole_budget_says_what_dense_says() -> None:
    """Greedy tokens of the real model; the whole budget of MagicPIG is a sample of everything."""
    if missing := smollm2.missing_packages():
        pytest.skip(f"{', '.join(missing)}: not installed (extra: demo)")
    tokenizer, model = smollm2.load()
    ids = tokenizer(smollm2.TEXT.read_text(encoding="utf-8")[:1400], return_tensors="pt")[
        "input_ids"
    ]
    assert 300 < ids.shape[1] < 400
    more = {"pad_token_id": 2, "eos_token_id": None, "attention_mask": torch.ones_like(ids)}
    want = generate(model, "attnforge", ids, 6, **more)
    for name in ("quest", "lsh"):
        with sparse.enable(name, **WHOLE[name]):
            got = generate(model, f"attnforge:{name}", ids, 6, **more)
        assert torch.equal(got[0], want[0])
        torch.testing.assert_close(got[1], want[1], rtol=1e-3, atol=1e-3)


class Layer(torch.nn.Module):
    layer_idx, is_causal = 0, True


def test_a_scale_of_its_own() -> None:
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, h, s, 8, generator=g) for h, s in ((4, 1), (2, 50), (2, 50)))
    function = sparse.PolicyAttention(lambda: policies.StreamingLLM(12))
    got, _ = function(Layer(), q, k, v, None, scaling=0.9)
    seen = [*range(4), *range(42, 50)]
    want = attnforge.flash_attention(
        q.transpose(1, 2), *(x[:, :, seen].transpose(1, 2) for x in (k, v)), softmax_scale=0.9
    )
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dropout": 0.1}, "attention dropout 0.1"),
        ({"softcap": 3.0}, "do not serve softcap"),
        ({"s_aux": torch.zeros(4)}, "do not serve sinks"),
        ({"sliding_window": 5}, "not plain causal"),
        ({"is_causal": False}, "not plain causal"),
    ],
)
def test_what_is_refused(arguments: dict[str, Any], message: str) -> None:
    q, k = torch.randn(1, 4, 22, 8), torch.randn(1, 2, 22, 8)
    function = sparse.PolicyAttention(lambda: policies.StreamingLLM(12))
    with pytest.raises(ValueError, match=message):
        function(Layer(), q, k, k, None, **arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"policy": "nothing"}, "no policy 'nothing'; there are"),
        ({"policy": "quest", "budget": 8, "name": "sdpa"}, "name is 'sdpa'"),
        ({"policy": "quest", "budget": 8, "prefill": "sparse"}, "prefill is 'sparse'"),
        ({"policy": "snapkv", "budget": 8, "prefill": "chunks"}, "want prefill='dense'"),
        ({"policy": "quest", "budget": 0}, "budget is 0"),
    ],
)
def test_arguments_that_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sparse.enable(**arguments)
