"""`attnforge quality` on a tiny random model: what it measures, what it writes."""

from __future__ import annotations

import json
import math
import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

os.environ.setdefault("HF_HUB_OFFLINE", "1")
pytest.importorskip("transformers", reason="transformers is not installed (extra: transformers)")
pytest.importorskip("typer")

import transformers
from typer.testing import CliRunner

from attnforge import policies
from attnforge.cli.app import build
from attnforge.integrations import transformers as hf
from attnforge.testing import quality, quality_report, smollm2

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

STORY = "It was a bright cold day in April, and the clocks were striking thirteen. " * 40


def tokenizer(words: str, **_: Any) -> dict[str, Tensor]:
    """A token per character."""
    return {"input_ids": torch.tensor([[ord(c) % 128 for c in words]])}


def tiny() -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=128, hidden_size=32, intermediate_size=48, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=2048,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


def setup(**more: Any) -> quality.Setup:
    return quality.Setup(context=600, tokens=10, needles=3, dense=(0,), **more)


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny()


def test_context_has_its_needles_and_what_follows() -> None:
    whole, rest, needles = quality.context(tokenizer, STORY, setup(), seed=3)
    text = "".join(chr(c) for c in whole.tolist())
    assert len(whole) == 600
    assert len(rest) == 10
    for question, digits in needles:
        said = "".join(chr(c) for c in torch.cat([question, digits]).tolist())
        assert said in text
    plain = text
    for question, digits in needles:
        said = "".join(chr(c) for c in torch.cat([question, digits]).tolist())
        plain = plain.replace(said + ".\n\n", "")
    assert plain + "".join(chr(c) for c in rest.tolist()) in STORY
    with pytest.raises(ValueError, match="the text has 20 tokens; want at least"):
        quality.context(tokenizer, STORY[:20], setup(), seed=0)


def test_a_whole_budget_loses_nothing(model: Any) -> None:
    """Dense losses are those of one plain pass; policies that may read everything have them too."""
    with hf.enable():
        data = quality.measure(model, tokenizer, STORY, setup(budgets=(700,)))
        whole, rest, _ = quality.context(tokenizer, STORY, setup(), seed=0)
        ids = torch.cat([whole, rest])
        model.set_attn_implementation("attnforge")
        with torch.no_grad():
            logits = model(ids[None]).logits[0, 599:-1]
    want = torch.nn.functional.cross_entropy(logits, rest)
    dense, *lines = data["lines"]
    assert math.log(dense["perplexity"]) == pytest.approx(float(want), rel=1e-4)
    assert dense["loss_change"] == 0.0
    assert {line["policy"] for line in lines} == set(policies.POLICIES)
    for line in lines:
        if line["policy"] != "lsh":  # a sample, at any setting
            assert abs(line["loss_change"]) < 1e-4, line
            assert line["found"] == dense["found"]


def test_a_small_budget_reads_little(model: Any) -> None:
    with hf.enable():
        data = quality.measure(model, tokenizer, STORY, setup(budgets=(64, 128), only="quest"))
    _, small, large = data["lines"]
    assert small["read"] == pytest.approx(64 / 605, rel=0.1)
    assert large["read"] == pytest.approx(128 / 605, rel=0.1)
    assert abs(small["loss_change"]) > 1e-5
    assert small["needles"] == 3
    assert small["milliseconds"] > 0


def test_command(model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(smollm2, "load", lambda folder: (tokenizer, tiny()))
    text = tmp_path / "text.txt"
    text.write_text(STORY)
    run = CliRunner(env={"NO_COLOR": "1", "COLUMNS": "200"}).invoke
    words = ["--context", "600", "--tokens", "6", "--needles", "1", "--budgets", "128,160",
             "--policy", "s", "--text", str(text)]  # fmt: skip
    out, plot = tmp_path / "new" / "out.json", tmp_path / "out.svg"
    done = run(build(), ["quality", *words, "--json", str(out), "--plot", str(plot)])
    assert done.exit_code == 0, done.output
    assert re.search(r"^streaming +128 keys", done.output, re.MULTILINE)
    assert plot.read_text().startswith("<?xml")
    data = json.loads(out.read_text())
    assert data["setup"]["budgets"] == [128, 160]
    assert data["environment"]["threads"] == torch.get_num_threads()
    root = tmp_path / "tree"
    (root / "docs/measurements/quality").mkdir(parents=True)
    (root / "docs/measurements/quality/smollm2.json").write_text(out.read_text())
    table = quality_report.policies_table(root)
    assert table.count("\n") == 2 + 2 + len(data["lines"])
    short = run(build(), ["quality", "--text", str(text), "--context", "9000"])
    assert short.exit_code == 1
    assert "the text has" in short.output
    assert run(build(), ["quality", "--text", str(tmp_path / "none")]).exit_code == 2
    assert run(build(), ["quality", "--text", str(text), "--budgets", "x"]).exit_code == 2
