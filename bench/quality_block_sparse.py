"""Perplexity of a language model whose attention reads a part of the blocks of keys.

    python bench/quality_block_sparse.py                 # SmolLM2-135M, the text in examples/data
    python bench/quality_block_sparse.py --quick         # does it run: short, one setting
    python bench/quality_block_sparse.py --out docs/measurements/training/block_sparse.json

The last tokens of the text are one window, the others train SeerAttention's gates. Each method
takes the same number of blocks per row, so that lines of a table have the same density; beside the
perplexity stands the share of the dense attention's probability that the chosen blocks hold, and
the mean change of a token's loss with its standard error, paired by token.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import attnforge
import attnforge.integrations.block_sparse as sparse
from attnforge.integrations import seer
from attnforge.integrations import transformers as hf
from attnforge.nn import distil_seer_gate
from attnforge.testing.smollm2 import TEXT, load


class Shares:
    """Of the layers of a pass: density, and the dense probability in the listed blocks, which is
    exp(LSE of the keys seen - LSE of all)."""

    def __init__(self) -> None:
        self.density: list[float] = []
        self.mass: list[float] = []

    def __call__(
        self, module: Any, q: Tensor, k: Tensor, lists: attnforge.BlockSelection, lse: Tensor
    ) -> None:
        self.density.append(lists.density(q.shape[1], k.shape[1]))
        _, whole = attnforge.flash_attention(
            q, k, k, causal=True, softmax_scale=module.scaling, return_lse=True
        )
        self.mass.append(float((lse - whole).exp().mean()))


@torch.no_grad()
def losses(model: Any, window: Tensor) -> Tensor:
    """Negative log-likelihood of a window's tokens behind its first quarter, which is context."""
    first = len(window) // 4
    hidden = model.base_model(window[None], use_cache=False).last_hidden_state[0, first - 1 : -1]
    return torch.nn.functional.cross_entropy(
        model.lm_head(hidden), window[first:], reduction="none"
    ).double()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--text", type=Path, default=TEXT)
    parser.add_argument("--model", help="folder of a causal language model; default SmolLM2-135M")
    parser.add_argument("--window", type=int, default=2048, help="tokens of context")
    parser.add_argument("--block", type=int, default=32)
    parser.add_argument("--top-k", type=int, nargs="+", default=[3, 4, 8], metavar="K")
    parser.add_argument("--steps", type=int, default=200, help="of training, per gate")
    parser.add_argument("--rows", type=int, default=4, help="windows of text that gates train on")
    parser.add_argument("--seeds", type=int, default=1, help="so many sets of gates are trained")
    parser.add_argument("--quick", action="store_true", help="a short window, one density, 4 steps")
    parser.add_argument("--out", type=Path, help="write the numbers as JSON")
    args = parser.parse_args()
    if args.quick:
        args.window, args.block, args.top_k, args.steps, args.rows = 256, 16, [4], 4, 1

    hf.enable()
    tokenizer, model = load(args.model)
    ids = tokenizer(args.text.read_text(encoding="utf-8"), return_tensors="pt")["input_ids"][0]
    test, rest = ids[-args.window :], ids[: -args.window]
    # Windows of the rest that overlap evenly, from its beginning to its end.
    starts = torch.linspace(0, len(rest) - args.window, args.rows).long().tolist()
    rows = [rest[at : at + args.window] for at in starts]

    exact = losses(model, test)
    said = {name: getattr(args, name) for name in ("window", "block", "steps", "rows", "seeds")}
    said |= {"tokens": len(exact), "perplexity": math.exp(exact.mean()), "kl": []}
    print(f"dense: perplexity {said['perplexity']:.3f} of {len(exact)} tokens")
    print("method              blocks  density    mass  perplexity  change of the loss +- s.e.")
    lines: list[dict[str, Any]] = []

    def measure(kinds: dict[str, Callable[..., sparse.Select]]) -> None:
        for top_k in args.top_k:
            for name, kind in kinds.items():
                line = {"method": name, "top_k": top_k}
                line |= compare(model, test, exact, kind(block_size=args.block, top_k=top_k))
                lines.append(line)
                print(f"{name:20}{top_k:6} {line['density']:8.1%} {line['mass']:7.1%} "
                      f"{line['perplexity']:11.3f}  {line['loss_change']:+.4f} +- "
                      f"{line['standard_error']:.4f}", flush=True)  # fmt: skip
                if args.out:
                    args.out.write_text(json.dumps({**said, "lines": lines}, indent=1) + "\n")

    by_row = {"q_block": args.block}
    measure({
        "mean-pooled": partial(sparse.MeanPooled, **by_row),
        "oracle": partial(sparse.Oracle, **by_row),
        "MoBA": sparse.MoBA,
        "oracle, per token": partial(sparse.Oracle, q_block=1),
        "sink and recent": partial(sparse.Recent, **by_row),
    })  # fmt: skip
    gates = trained(model, rows, args, said["kl"]) if args.seeds else []
    base = seer.rope_base(model)
    measure({
        f"Seer gate, seed {seed}": partial(sparse.Seer, **by_row, gates=own, rope_base=base)
        for seed, own in enumerate(gates)
    })  # fmt: skip


def compare(model: Any, test: Tensor, exact: Tensor, select: sparse.Select) -> dict[str, Any]:
    """Of one method: what it reads, finds and costs; exact: the losses of dense attention."""
    shares = Shares()
    with sparse.enable(select, name="attnforge:measured", watch=shares):
        model.set_attn_implementation("attnforge:measured")
        loss = losses(model, test)
    change = loss - exact
    return {
        "density": mean(shares.density), "mass": mean(shares.mass),
        "perplexity": math.exp(loss.mean()), "loss_change": float(change.mean()),
        "standard_error": float(change.std() / len(change) ** 0.5),
    }  # fmt: skip


def trained(model: Any, rows: list[Tensor], args: Any, kl: list[list[float]]) -> list[Any]:
    """Gates of all layers, one list per seed; kl: gets the mean loss before and after."""
    model.set_attn_implementation("attnforge")
    found: list[Any] = []
    for seed in range(args.seeds):
        torch.manual_seed(seed)
        found.append(seer.make_gates(model, block_size=args.block))
    start = time.perf_counter()
    seen = seer.samples(model, found[0], rows)
    print(f"samples of {args.rows} windows, {time.perf_counter() - start:.0f} s", flush=True)
    for seed, gates in enumerate(found):
        start = time.perf_counter()
        runs = [distil_seer_gate(gate, own, steps=args.steps)
                for gate, own in zip(gates, seen, strict=True)]  # fmt: skip
        kl.append([mean([run[at] for run in runs]) for at in (0, -1)])
        print(f"gates, seed {seed}: KL {kl[-1][0]:.3f} -> {kl[-1][1]:.3f}, "
              f"{time.perf_counter() - start:.0f} s", flush=True)  # fmt: skip
    return found


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


if __name__ == "__main__":
    main()
