r"""Native sparse attention and dense attention learn to find needles, from scratch.

    python examples/nsa_needle.py                       # dense and NSA, 400 steps each
    python examples/nsa_needle.py --quick               # does it run: two steps
    python examples/nsa_needle.py --layers dense nsa nsa-fine --steps 1200 --seeds 3 \
        --out docs/measurements/training/nsa_needle.json

A sequence is noise in which a few needles lie, tokens of a key and a value; its last tokens ask
for the keys, in any order, and the answers are the values. Two blocks of attention and MLP,
everything the same but the attention. NSA's window, first and last blocks reach few of the needles:
the others it must find by compressed keys, and select their blocks.
"""

import argparse
import json
import time
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, silu

import attnforge
import attnforge.nn as anf

NOISE, KEYS, VALUES = 32, 8, 8
WIDTH, HEADS, KV_HEADS, BLOCKS, LENGTH, BATCH = 64, 4, 1, 2, 256, 16
# The paper's proportions, blocks of an eighth: a window of compressed tokens is half a
# selected block. Of the 32 blocks of 8 tokens a question reads 8, five of them its choice.
NSA = {"cmp_block": 4, "cmp_stride": 2, "slc_block": 8, "top_n": 8, "window": 16}
# With one projection of keys for all branches, and means of them, what finds a token also finds its
# block; means of 2 tokens lose none of them. The paper's layer has projections and an MLP of its
# own for compressed keys, which may stay idle: some seeds go round the choice.
LAYERS = {
    "nsa": {**NSA, "share_kv": True, "compression": "mean"},
    "nsa-fine": {**NSA, "share_kv": True, "compression": "mean", "cmp_block": 2, "cmp_stride": 1},
    "nsa-paper": {**NSA, "expansion": 4},
}
TESTS = 16  # batches: 2,048 needles


class Dense(nn.Module):
    """Causal attention with the projections of the NSA layer."""

    def __init__(self) -> None:
        super().__init__()
        self.q = nn.Linear(WIDTH, WIDTH, bias=False)
        self.kv = nn.Linear(WIDTH, 2 * KV_HEADS * WIDTH // HEADS, bias=False)
        self.out = nn.Linear(WIDTH, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        q = self.q(x).unflatten(-1, (HEADS, -1))
        k, v = self.kv(x).unflatten(-1, (2, KV_HEADS, -1)).unbind(2)
        return self.out(attnforge.flash_attention(q, k, v, causal=True).flatten(2))


class Block(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.mixer = Dense() if kind == "dense" else anf.NativeSparseAttention(
            WIDTH, HEADS, KV_HEADS, **LAYERS[kind], rope_base=None)  # fmt: skip
        self.norms = nn.ModuleList(nn.RMSNorm(WIDTH) for _ in range(2))
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.mixer(self.norms[0](x))
        return x + self.down(silu(self.up(self.norms[1](x))))


class Finder(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.keys = nn.Embedding(KEYS + NOISE, WIDTH)
        self.values = nn.Embedding(VALUES + 2, WIDTH)  # or none, or asked for
        self.blocks = nn.Sequential(*(Block(kind) for _ in range(BLOCKS)))
        self.norm, self.head = nn.RMSNorm(WIDTH), nn.Linear(WIDTH, VALUES)

    def forward(self, ids: Tensor) -> Tensor:
        """Logits of the values at the questions, [B, KEYS, VALUES]."""
        x = self.keys(ids[..., 0]) + self.values(ids[..., 1])
        return self.head(self.norm(self.blocks(x)[:, -KEYS:]))


def batch(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Tokens [BATCH, LENGTH, key and value], and the values that the last KEYS of them ask for."""
    keys = torch.randint(KEYS, KEYS + NOISE, (BATCH, LENGTH), generator=generator)
    values = torch.full((BATCH, LENGTH), VALUES)
    hidden = torch.randint(VALUES, (BATCH, KEYS), generator=generator)
    places = torch.rand(BATCH, LENGTH - KEYS, generator=generator).topk(KEYS).indices
    keys.scatter_(1, places, torch.arange(KEYS).expand(BATCH, -1))
    values.scatter_(1, places, hidden)
    order = torch.rand(BATCH, KEYS, generator=generator).argsort(1)
    keys[:, -KEYS:], values[:, -KEYS:] = order, VALUES + 1
    return torch.stack((keys, values), -1), hidden.gather(1, order)


def train(kind: str, steps: int, seed: int = 0) -> dict[str, object]:
    torch.manual_seed(seed)
    model = Finder(kind)
    known, held = (torch.Generator().manual_seed(s) for s in (seed + 1, 2000))
    tests = [batch(held) for _ in range(TESTS)]
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps + 1)
    curve, start = [], time.perf_counter()
    for step in range(steps + 1):
        if step % max(1, steps // 10) == 0 or step == steps:
            with torch.no_grad():
                logits = [(model(ids), want) for ids, want in tests]
            loss, right = (
                sum(float(f(y, want)) for y, want in logits) / len(logits)
                for f in (lambda y, w: cross_entropy(y.flatten(0, 1), w.flatten()),
                          lambda y, w: (y.argmax(-1) == w).float().mean())
            )  # fmt: skip
            curve.append((step, round(loss, 4), round(right, 4)))
        ids, want = batch(known)
        loss = cross_entropy(model(ids).flatten(0, 1), want.flatten())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        rate.step()
    parameters = sum(p.numel() for p in model.parameters())
    seconds = round(time.perf_counter() - start, 1)
    return {"layer": kind, "parameters": parameters, "seconds": seconds, "curve": curve}


def add(run: dict[str, object], path: Path) -> None:
    """Add a run to a file, in the place of an older one of its layer and seed."""
    runs = json.loads(path.read_text())["runs"] if path.exists() else []
    runs = [r for r in runs if (r["layer"], r["seed"]) != (run["layer"], run["seed"])] + [run]
    order = ["dense", *LAYERS]
    runs.sort(key=lambda r: (order.index(r["layer"]), r["seed"]))
    path.write_text(json.dumps({"runs": runs}, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--layers", nargs="+", choices=["dense", *LAYERS], default=["dense", "nsa"])
    parser.add_argument("--quick", action="store_true", help="2 steps: nothing is learned")
    parser.add_argument("--out", type=Path, help="write the curves as JSON, or add them to a file")
    args = parser.parse_args()
    steps = 2 if args.quick else args.steps
    for seed in range(args.seeds):
        for kind in args.layers:
            run = {"seed": seed, **train(kind, steps, seed)}
            _, loss, right = run["curve"][-1]
            print(f"{kind:9} seed {seed}, {steps} steps, {run['seconds']:5.1f} s: loss {loss:.3f}, "
                  f"{right:.2%} of the needles found", flush=True)  # fmt: skip
            if args.out is not None:
                add(run, args.out)


if __name__ == "__main__":
    main()
