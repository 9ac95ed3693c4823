"""A small language model of characters, its attention softmax or any layer of attnforge.nn.

    python examples/char_lm.py                            # softmax and Gated DeltaNet, 12 steps
    python examples/char_lm.py based kda --steps 240      # about a minute each on two cores
    python examples/char_lm.py all --steps 120 --out losses.json

All models have the same embedding, places, MLPs and width; they differ in the layer alone. Nine
tenths of one story are trained on; the loss is that of the last tenth, in bits per character.
"""

import argparse
import json
import math
import time
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, silu

import attnforge
import attnforge.nn as anf

TEXT = Path(__file__).parent / "data" / "a_scandal_in_bohemia.txt"
WIDTH, HEADS, BLOCKS, LENGTH, BATCH = 128, 4, 2, 256, 4


class Softmax(nn.Module):
    """Softmax attention with the call of the linear layers."""

    def __init__(self, hidden_size: int, num_heads: int) -> None:
        super().__init__()
        self.qkv = nn.Linear(hidden_size, 3 * hidden_size, bias=False)
        self.out = nn.Linear(hidden_size, hidden_size, bias=False)
        self.heads = num_heads

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).unbind(2)
        return self.out(attnforge.flash_attention(q, k, v, causal=True).flatten(2)), None


LAYERS = {
    "softmax": Softmax,
    "hedgehog": anf.Hedgehog,
    "based": anf.Based,
    "fast": lambda d, h: anf.FAST(d, h, head_dim=16, v_head_dim=d // h),
    "lln": anf.LinearLogNormal,
    "cottention": anf.Cottention,
    "flowformer": anf.Flowformer,
    "lightning": anf.LightningAttention,
    "mamba2": lambda d, h: anf.Mamba2(d, h, head_dim=32),
    "gla": anf.GatedLinearAttention,
    "hgrn2": anf.HGRN2,
    "regla": anf.ReGLA,
    "gsa": lambda d, h: anf.GatedSlotAttention(d, h, num_slots=32),
    "delta": anf.DeltaNet,
    "gated_delta": anf.GatedDeltaNet,
    "kda": anf.KimiDeltaAttention,
}


class Block(nn.Module):
    def __init__(self, layer: str) -> None:
        super().__init__()
        self.mixer = LAYERS[layer](WIDTH, HEADS)
        self.norms = nn.ModuleList(nn.RMSNorm(WIDTH) for _ in range(2))
        self.up = nn.Linear(WIDTH, 4 * WIDTH)
        self.down = nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.mixer(self.norms[0](x))[0]
        return x + self.down(silu(self.up(self.norms[1](x))))


class CharLM(nn.Module):
    def __init__(self, layer: str, vocabulary: int) -> None:
        super().__init__()
        self.chars = nn.Embedding(vocabulary, WIDTH)
        self.places = nn.Parameter(0.02 * torch.randn(LENGTH, WIDTH))
        self.blocks = nn.Sequential(*(Block(layer) for _ in range(BLOCKS)))
        self.norm, self.head = nn.RMSNorm(WIDTH), nn.Linear(WIDTH, vocabulary)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.norm(self.blocks(self.chars(ids) + self.places)))


def bits(model: nn.Module, ids: Tensor) -> Tensor:
    """Bits per character of rows [B, LENGTH + 1]."""
    logits = model(ids[:, :-1])
    return cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()) / math.log(2)


def train(layer: str, steps: int) -> dict[str, object]:
    torch.manual_seed(0)
    text = TEXT.read_text(encoding="utf-8")
    alphabet = {c: n for n, c in enumerate(sorted(set(text)))}
    ids = torch.tensor([alphabet[c] for c in text])
    known, held = ids[: len(ids) * 9 // 10], ids[len(ids) * 9 // 10 :]
    held = held[: len(held) // (LENGTH + 1) * (LENGTH + 1)].view(-1, LENGTH + 1)

    model = CharLM(layer, len(alphabet))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.1)
    rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps + 1)
    losses, spent = [], 0.0
    for step in range(steps + 1):
        if step % 20 == 0 or step == steps:
            model.eval()
            with torch.no_grad():
                losses.append((step, round(float(bits(model, held)), 4)))
            model.train()
        if step == steps:
            break
        start = time.perf_counter()
        at = torch.randint(len(known) - LENGTH - 1, (BATCH, 1)) + torch.arange(LENGTH + 1)
        loss = bits(model, known[at])
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        rate.step()
        spent += time.perf_counter() - start
    parameters = sum(p.numel() for p in model.parameters())
    return {"layer": layer, "parameters": parameters, "seconds": round(spent, 1), "losses": losses}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("layers", nargs="*", default=["softmax", "gated_delta"])
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--out", type=Path, help="write the losses as JSON")
    args = parser.parse_args()
    chosen = list(LAYERS) if args.layers == ["all"] else args.layers
    runs = []
    for layer in chosen:
        runs.append(train(layer, args.steps))
        _, loss = runs[-1]["losses"][-1]
        print(f"{layer:12} {args.steps} steps, {runs[-1]['seconds']:5.1f} s: {loss:.3f} bits per "
              f"held-out character", flush=True)  # fmt: skip
    if args.out is not None:
        args.out.write_text(json.dumps({"steps": args.steps, "runs": runs}, indent=1) + "\n")


if __name__ == "__main__":
    main()
