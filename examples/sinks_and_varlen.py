"""Packed sequences of different lengths, learned sink logits, and merging partial results.

python examples/sinks_and_varlen.py
"""

import torch

import attnforge

torch.manual_seed(0)
HEADS, KV_HEADS, DIM = 8, 2, 64

# Three sequences packed without padding: boundaries instead of a mask. [T, H, D]
lengths = [5, 700, 43]
cu = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
q, k, v = (torch.randn(sum(lengths), h, DIM) for h in (HEADS, KV_HEADS, KV_HEADS))

# A sink is one more logit per head in the softmax that brings no value: a head can attend to
# nothing, and its output shrinks towards zero. It is a parameter and has a gradient.
sinks = torch.full((HEADS,), 2.0, requires_grad=True)
out, lse = attnforge.flash_attention_varlen(
    q, k, v, cu_seqlens_q=cu, cu_seqlens_k=cu, causal=True, sinks=sinks, return_lse=True
)
print(f"packed: out {tuple(out.shape)}, lse {tuple(lse.shape)}")

# The same, one sequence at a time.
for b, length in enumerate(lengths):
    rows = slice(int(cu[b]), int(cu[b + 1]))
    alone = attnforge.flash_attention(
        q[None, rows], k[None, rows], v[None, rows], causal=True, sinks=sinks
    )
    difference = (alone[0] - out[rows]).abs().max().item()
    print(f"  sequence of {length:3d}: max difference from the packed call {difference:.1e}")

out.square().mean().backward()
print("gradient of the sinks:", *(f"{g:+.1e}" for g in sinks.grad))

# Attention over one set of keys = the merge of attention over its parts, by their LSEs. The sink
# belongs to the set, so exactly one part gets it.
query, keys, values = q[None, -1:], k[None], v[None]
whole, _ = attnforge.flash_decode(query, keys, values, sinks=sinks.detach(), return_lse=True)
parts = [
    attnforge.flash_decode(
        query, keys[:, a:b], values[:, a:b], causal=False, return_lse=True,
        sinks=sinks.detach() if a == 0 else None,
    )
    for a, b in ((0, 300), (300, 748))
]  # fmt: skip
merged, _ = attnforge.merge_states([o for o, _ in parts], [lse for _, lse in parts])
print(f"merge of two parts: max difference {(merged - whole).abs().max():.1e}")
