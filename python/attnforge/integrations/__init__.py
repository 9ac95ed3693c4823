"""Hooks into other libraries, each behind an explicit call and an optional import.

- `attnforge.integrations.transformers.enable()`: Hugging Face transformers models run their
  attention on attnforge with ``attn_implementation="attnforge"``.
- `attnforge.integrations.block_sparse.enable(method)`: the same on the blocks of keys that a method
  chooses (MoBA, an oracle, a learned gate, ...), ``attn_implementation="attnforge:moba"``.
- `attnforge.integrations.policies.enable(policy)`: the same, each step on the keys that a decode
  policy chooses (StreamingLLM, Quest, MagicPIG, ...), ``attn_implementation="attnforge:quest"``.
- `attnforge.integrations.vllm`, `sglang`, `diffusers`, `comfyui`: the hooks that these have.
- `attnforge.integrations.seer`: learns SeerAttention's gates for such a model.
"""
