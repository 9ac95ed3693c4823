"""Hooks into other libraries, each behind an explicit call and an optional import.

- `attnforge.integrations.transformers.enable()`: Hugging Face transformers models run their
  attention on attnforge with ``attn_implementation="attnforge"``.
"""
