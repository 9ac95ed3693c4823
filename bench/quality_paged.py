"""Perplexity of a language model under codes of its KV cache.

    python bench/quality_paged.py                                # the text in examples/data
    python bench/quality_paged.py --text my.txt --tokens 8192 --json out.json

The text is cut into windows. A window runs through the model in one pass over a `PagedCache`: keys
and values are written into pages first and read back from there, so that every token attends to
its whole window as the pages hold it. Each dtype of the pages is compared with fp32 pages token by
token: the standard error of the paired difference is far below that of a perplexity.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import attnforge.integrations.transformers as hf
from attnforge.testing.smollm2 import TEXT, load


@torch.no_grad()
def losses(model: Any, windows: Tensor, dtype: str) -> tuple[Tensor, float]:
    """Negative log-likelihood of each token but a window's first [n], and bytes per token."""
    parts, width = [], windows.shape[1]
    for window in windows:
        cache = hf.PagedCache(model.config, num_pages=-(-width // 16), dtype=dtype)
        logits = model(window[None], past_key_values=cache).logits[0, :-1]
        parts.append(torch.nn.functional.cross_entropy(logits, window[1:], reduction="none"))
        size = cache.memory_bytes() / (cache.kv.stats().used_pages * 16)
    return torch.cat(parts).double(), size


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--text", type=Path, default=TEXT)
    parser.add_argument("--model", help="folder of a causal language model; default SmolLM2-135M")
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--dtypes", nargs="+", default=["fp8", "int8", "int4"])
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()

    hf.enable()
    tokenizer, model = load(args.model)
    ids = tokenizer(args.text.read_text(encoding="utf-8"), return_tensors="pt")["input_ids"][0]
    windows = ids[: min(args.tokens, ids.numel()) // args.window * args.window]
    windows = windows.view(-1, args.window)
    print(f"{args.text.name}: {windows.numel()} tokens in windows of {args.window}")
    print("pages  bytes/token  perplexity  change     mean loss +- s.e. of the difference")
    exact, size = losses(model, windows, "fp32")
    rows = [{"pages": "fp32", "bytes": size, "perplexity": math.exp(exact.mean())}]
    print(f"fp32   {size:11.0f}  {rows[0]['perplexity']:10.4f}")
    for dtype in args.dtypes:
        loss, size = losses(model, windows, dtype)
        difference = loss - exact
        mean, error = float(difference.mean()), float(difference.std() / len(loss) ** 0.5)
        rows.append({"pages": dtype, "bytes": size, "perplexity": math.exp(loss.mean()),
                     "loss_change": mean, "standard_error": error})  # fmt: skip
        print(f"{dtype:6} {size:11.0f}  {rows[-1]['perplexity']:10.4f}  {math.expm1(mean):+8.3%}"
              f"  {mean:+.5f} +- {error:.5f}", flush=True)  # fmt: skip
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
