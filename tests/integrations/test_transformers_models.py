"""Tiny random models of six families: forward, generation and a training step against torch's own.

What masks and caches do is in test_transformers.py; here a whole model is used the way its users
use it. T5 adds a learned bias to its scores, which transformers gives to SDPA as a mask: it runs on
attnforge through `integrations.torch.sdpa()`.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("transformers", reason="extra: transformers")

import transformers

import attnforge.integrations.torch as af
import attnforge.integrations.transformers as hf

pytestmark = [pytest.mark.integration, pytest.mark.filterwarnings("ignore::DeprecationWarning")]

VOCABULARY = 61
COMMON = {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2,
          "vocab_size": VOCABULARY, "intermediate_size": 48, "max_position_embeddings": 64,
          "attention_dropout": 0.0, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
          "num_key_value_heads": 2, "head_dim": 8}  # fmt: skip


@dataclass(frozen=True)
class Family:
    """A model class, its config, and the attention of transformers that is its definition."""

    model: str
    config: dict[str, Any]
    peer: str = "sdpa"

    @property
    def generates(self) -> bool:
        return self.model != "BertForMaskedLM"


FAMILIES = {
    "llama": Family("LlamaForCausalLM", COMMON),
    "mistral": Family("MistralForCausalLM", {**COMMON, "sliding_window": 5}),
    "gemma": Family(
        "Gemma2ForCausalLM",
        {**COMMON, "sliding_window": 5, "attn_logit_softcapping": 2.0, "query_pre_attn_scalar": 8},
        "eager",
    ),
    "gpt-oss": Family(
        "GptOssForCausalLM",
        {**COMMON, "sliding_window": 5, "num_local_experts": 2, "num_experts_per_tok": 1,
         "layer_types": ["sliding_attention", "full_attention"]},
        "eager",
    ),
    "bert": Family(
        "BertForMaskedLM",
        {**COMMON, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
    ),
    "t5": Family(
        "T5ForConditionalGeneration",
        {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "dropout_rate": 0.0,
         "vocab_size": VOCABULARY, "pad_token_id": 0, "eos_token_id": 2,
         "decoder_start_token_id": 0},
    ),
}  # fmt: skip


def pair(family: Family) -> tuple[Any, Any]:
    """The same random model twice: on attnforge, and as transformers runs it."""
    torch.manual_seed(7)
    kind = family.model.split("For")[0]
    config = getattr(transformers, f"{kind}Config")(**family.config)
    theirs = getattr(transformers, family.model)._from_config(
        config, attn_implementation=family.peer, experts_implementation="eager"
    )
    with torch.no_grad():
        for name, p in theirs.named_parameters():  # attention that is far from uniform
            p.copy_(torch.randn_like(p) * (0.2 if p.ndim > 1 else 0.5) + ("norm" in name))
    ours = copy.deepcopy(theirs)
    if family.model[:2] != "T5":
        ours.set_attn_implementation("attnforge")
    return ours.eval(), theirs.eval()


@pytest.fixture(scope="module", autouse=True)
def enabled() -> Iterator[None]:
    with hf.enable():
        yield


class Counted(TorchDispatchMode):
    """Counts operators of attnforge, so that no comparison is of torch with torch."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.calls += func.namespace == "attnforge"
        return func(*args, **(kwargs or {}))


def on_attnforge(name: str) -> contextlib.AbstractContextManager[None]:
    return af.sdpa(strict=True) if name == "t5" else contextlib.nullcontext()


def batch(name: str) -> dict[str, Tensor]:
    torch.manual_seed(11)
    ids = torch.randint(3, VOCABULARY, (2, 14))
    mask = torch.ones_like(ids)
    padded = (1, slice(9, None)) if name in ("bert", "t5") else (1, slice(0, 5))
    ids[padded], mask[padded] = 0, 0
    return {"input_ids": ids, "attention_mask": mask}


def outputs(model: Any, name: str) -> tuple[Tensor, Tensor]:
    """(logits of real tokens, loss)."""
    given = batch(name)
    real = given["attention_mask"].bool()
    # What comes after padding is not predicted: a row that sees no key is 0 here, arbitrary there.
    known = torch.nn.functional.pad(real[:, :-1], (1, 0), value=True)
    labels = given["input_ids"].masked_fill(~(real & known), -100)
    result = model(**given, labels=labels)
    return result.logits[real], result.loss


@pytest.mark.parametrize("name", FAMILIES)
def test_forward(name: str) -> None:
    ours, theirs = pair(FAMILIES[name])
    with torch.no_grad(), on_attnforge(name), Counted() as seen:
        got, loss = outputs(ours, name)
    assert seen.calls == (6 if name == "t5" else 2)  # T5: two layers, two with cross-attention
    with torch.no_grad():
        want, expected = outputs(theirs, name)
    scale = float(want.abs().max())
    torch.testing.assert_close(got / scale, want / scale, atol=2e-5, rtol=0)
    torch.testing.assert_close(loss, expected, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("name", [n for n, f in FAMILIES.items() if f.generates])
def test_generate(name: str) -> None:
    ours, theirs = pair(FAMILIES[name])
    options = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
    with on_attnforge(name):
        got = ours.generate(**batch(name), **options)
    want = theirs.generate(**batch(name), **options)
    assert got.shape[1] >= 9
    assert torch.equal(got, want)


@pytest.mark.parametrize("name", FAMILIES)
def test_training_step(name: str) -> None:
    ours, theirs = pair(FAMILIES[name])
    losses = []
    for model, mine in ((ours, on_attnforge(name)), (theirs, contextlib.nullcontext())):
        model.train()
        with mine:
            _, before = outputs(model, name)
            before.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        assert norm > 0
        torch.optim.SGD(model.parameters(), lr=0.05).step()
        with torch.no_grad():
            _, after = outputs(model.eval(), name)
        assert after < before
        losses.append((before.detach(), norm, after))
    torch.testing.assert_close(*map(torch.stack, losses), atol=1e-4, rtol=1e-4)
    gradients = [{n: p.grad for n, p in m.named_parameters() if p.grad is not None}
                 for m in (ours, theirs)]  # fmt: skip
    assert gradients[0].keys() == gradients[1].keys()
    for parameter, want in gradients[1].items():  # of a total norm of 1
        torch.testing.assert_close(gradients[0][parameter], want, atol=5e-5, rtol=0)
