"""A few training steps of a one-layer attention model, forward and backward on attnforge.

The task: sequences of random numbers; every position must recall the first token. One causal
attention layer with grouped KV heads can do that, by looking back.

    python examples/train_step.py
"""

import torch
from torch import Tensor, nn

import attnforge

torch.manual_seed(0)
VOCAB, WIDTH, HEADS, KV_HEADS, LENGTH, BATCH = 32, 64, 8, 2, 64, 16
DIM = WIDTH // HEADS


class Recall(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCAB, WIDTH)
        self.places = nn.Embedding(LENGTH, WIDTH)
        self.qkv = nn.Linear(WIDTH, (HEADS + 2 * KV_HEADS) * DIM)
        self.out = nn.Linear(WIDTH, VOCAB)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.tokens(ids) + self.places.weight
        # [B, S, heads, DIM]: views of one projection, read in place through their strides.
        q, k, v = self.qkv(x).unflatten(-1, (-1, DIM)).split([HEADS, KV_HEADS, KV_HEADS], dim=2)
        o = attnforge.flash_attention(q, k, v, causal=True)
        return self.out(x + o.flatten(2))


model = Recall()
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
for step in range(41):
    ids = torch.randint(VOCAB, (BATCH, LENGTH))
    logits = model(ids)
    loss = nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, :1].expand_as(ids).flatten())
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if step % 10 == 0:
        right = (logits.argmax(-1) == ids[:, :1]).float().mean()
        print(f"step {step:3d}  loss {loss.item():.3f}  recalled {right:.0%}")
