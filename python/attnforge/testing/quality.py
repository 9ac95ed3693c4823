"""What sparse decode costs a language model: perplexity, needles and time under every policy.

One context serves all measurements: tokens of a text with needles ("The secret number of Oslo is
40213.") between its lines. It is prefilled densely once; each policy at each budget then observes
the same queries, keys and values and decodes from its own copy of the cache,

- the text that follows, token by token: the loss, paired by token with that of dense attention;
- the numbers of the needles: the question is part of the prompt, its last token and the digits are
  steps. A needle is found if all digits are the model's first choice.

A step's attention is timed in the layers that are not dense, in turn with dense attention over the
same cache. The model is too small for its quality to mean much by itself; differences between
policies at the same budget are what is measured.
"""

from __future__ import annotations

import copy
import gc
import math
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from attnforge import policies
from attnforge.integrations import policies as sparse
from attnforge.policies import Lists, Policy

__all__ = ["CITIES", "Line", "Setup", "candidates", "context", "measure"]

CITIES = ("Oslo", "Lima", "Cairo", "Delhi", "Rome", "Seoul", "Quito", "Paris", "Tunis", "Berlin",
          "Dublin", "Madrid", "Lisbon", "Havana", "Athens", "Vienna")  # fmt: skip

Progress = Callable[[str, int, int], None]
_NAME = "attnforge:measured"
_PAIRED = 8  # steps that are also run densely, for the times
_SHARED = frozenset(("h2o",))  # looks long at a prompt, and the same for every budget


@dataclass(frozen=True)
class Setup:
    """What is run. budgets: keys per head. dense: layers that see all keys under every policy."""

    context: int = 8192
    tokens: int = 64
    needles: int = 8
    budgets: tuple[int, ...] = (256, 512, 1024)
    seeds: int = 1
    dense: tuple[int, ...] = (0, 1)
    only: str = ""  # part of the policies' names


QUICK = Setup(context=768, tokens=8, needles=2, budgets=(128,))


@dataclass
class Line:
    """One policy at one setting, over all seeds."""

    policy: str
    setting: str
    budget: int
    losses: list[float] = field(default_factory=list)  # of the following tokens
    found: list[bool] = field(default_factory=list)
    read: list[float] = field(default_factory=list)  # share of keys per head, per call
    seconds: list[float] = field(default_factory=list)  # attention of one step
    dense_seconds: list[float] = field(default_factory=list)  # of dense attention, paired

    def summary(self, dense: Line) -> dict[str, Any]:
        """Numbers of the table and the plot."""
        change = torch.tensor(self.losses, dtype=torch.float64)
        change -= torch.tensor(dense.losses, dtype=torch.float64)
        pairs = zip(self.dense_seconds, self.seconds, strict=False)
        return {
            "policy": self.policy, "setting": self.setting, "budget": self.budget,
            "read": statistics.fmean(self.read) if self.read else 1.0,
            "perplexity": math.exp(statistics.fmean(self.losses)),
            "loss_change": float(change.mean()),
            "standard_error": float(change.std() / len(change) ** 0.5),
            "found": sum(self.found), "needles": len(self.found),
            "milliseconds": 1e3 * statistics.median(self.seconds),
            "speedup": statistics.median(d / s for d, s in pairs),
        }  # fmt: skip


# ---- what is measured ----


def candidates(setup: Setup, layers: int, heads: Any = None) -> Iterator[tuple[str, str, int, Any]]:
    """(policy, setting, budget, how it is made); heads: the retrieval heads of RazorAttention."""
    own: dict[str, dict[str, Any]] = {
        "pyramidkv": {"layers": layers}, "razor": {"heads": heads or {}},
        "tidal": {"dense": setup.dense, "chooses": (len(setup.dense), layers // 2)},
    }  # fmt: skip
    presets = ((10, 150), (9, 120), (8, 75))  # MagicPIG has no budget: a preset for each one
    for at, budget in enumerate(setup.budgets):
        for name, kind in policies.POLICIES.items():
            if setup.only not in name:
                continue
            options: dict[str, Any] = {"budget": budget, **own.get(name, {})}
            setting = f"{budget} keys"
            if name == "lsh":
                bits, tables = presets[at % len(presets)]
                options, setting = {"num_bits": bits, "num_tables": tables}, f"({bits}, {tables})"
            yield name, setting, budget, partial(kind, **options)


def context(
    tokenizer: Any, text: str, setup: Setup, seed: int
) -> tuple[Tensor, Tensor, list[tuple[Tensor, Tensor]]]:
    """Token ids of the context with needles, of the text that follows, (question, digits) each.

    Raises:
        ValueError: the text is too short, or there are more needles than cities.
    """
    g = torch.Generator().manual_seed(seed)

    def ids(words: str) -> Tensor:
        found: Tensor = tokenizer(words, return_tensors="pt", add_special_tokens=False)["input_ids"]
        return found[0]

    if setup.needles > len(CITIES):
        raise ValueError(f"attnforge.quality: {setup.needles} needles; want {len(CITIES)} at most")
    order = torch.randperm(len(CITIES), generator=g)[: setup.needles].tolist()
    numbers = torch.randint(10000, 100000, (setup.needles,), generator=g).tolist()
    said = [
        (f"\n\nThe secret number of {CITIES[c]} is", f" {n}")
        for c, n in zip(order, numbers, strict=True)
    ]
    needles = [ids(f"{words}{number}.\n\n") for words, number in said]
    story = ids(text)
    length = setup.context - sum(len(n) for n in needles)
    spare = len(story) - length - setup.tokens
    if length <= 0 or spare < 0:
        raise ValueError(
            f"attnforge.quality: the text has {len(story)} tokens; want at least "
            f"{max(length, 0) + setup.tokens} for a context of {setup.context}"
        )
    start = int(torch.randint(0, spare + 1, (), generator=g))
    hay = story[start : start + length]
    parts: list[Tensor] = []
    cuts = [int((i + 0.5) * length / max(1, setup.needles)) for i in range(setup.needles)]
    for a, b, needle in zip([0, *cuts], cuts, needles, strict=False):
        parts += [hay[a:b], needle]
    whole = torch.cat([*parts, hay[cuts[-1] if cuts else 0 :]])
    rest = story[start + length : start + length + setup.tokens]
    return whole, rest, [(ids(words), ids(number)) for words, number in said]


# ---- running it ----


class _Prompt(Policy):
    """Dense attention that keeps what policies observe: queries, keys and values by layer."""

    def __init__(self) -> None:
        super().__init__(1 << 30)

    def observe(self, q: Tensor, k: Tensor, v: Tensor, *, layer: int = 0) -> None:
        """Remember the prompt."""
        self.state[layer] = (q, k, v)

    def shown_to(self, policy: Policy, dense: tuple[int, ...]) -> Policy:
        """policy, having observed all of it."""
        for layer, (q, k, v) in self.state.items():
            if layer not in dense:
                policy.observe(q, k, v, layer=layer)
        return policy

    def cache(self) -> Any:
        """A transformers cache that holds the prompt."""
        from transformers import DynamicCache

        cache = DynamicCache()
        for layer, (_, k, v) in self.state.items():
            cache.update(k.transpose(1, 2), v.transpose(1, 2), layer)
        return cache


class _Clocked(Policy):
    """A policy whose steps are timed, and the keys that it reads counted."""

    def __init__(self, policy: Policy) -> None:
        super().__init__(1 << 30)
        self.policy, self.keys, self.seconds = policy, 0, 0.0
        self.read: list[float] = []
        policy.watch = self._count

    def observe(self, q: Tensor, k: Tensor, v: Tensor, *, layer: int = 0) -> None:
        """As the policy does."""
        self.policy.observe(q, k, v, layer=layer)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Any:
        """As the policy does."""
        self.keys, start = k.shape[1], time.perf_counter()
        out = self.policy.attend(q, k, v, **options)
        self.seconds += time.perf_counter() - start
        return out

    def _count(self, lists: Lists) -> None:
        kept = (lists.ids >= 0) & (lists.ids < self.keys)
        if lists.lens is not None:
            kept &= torch.arange(lists.ids.shape[-1]) < lists.lens.unsqueeze(-1)
        self.read.append(float(kept.sum(-1).double().mean()) / self.keys)


def _always(policy: Policy) -> Callable[[], Policy]:
    return lambda: policy


def _logits(model: Any, cache: Any, policy: Policy, ids: Tensor, dense: tuple[int, ...]) -> Tensor:
    """Logits [V] behind ids, which are appended to the cache."""
    with sparse.enable(_always(policy), name=_NAME, dense=dense):
        model.set_attn_implementation(_NAME)
        found: Tensor = model(ids[None], past_key_values=cache, logits_to_keep=1).logits[0, -1]
    return found


def _steps(
    model: Any, cache: Any, clocked: _Clocked, ids: Tensor, dense: tuple[int, ...],
    line: Line | None = None,
) -> Tensor:  # fmt: skip
    """Logits [steps, V] behind each of ids. line: gets times; the first steps run densely too."""
    found = []
    for n, token in enumerate(ids):
        timed = line if n < _PAIRED else None
        if timed is not None:
            other = _Clocked(Policy(1 << 30))
            _logits(model, cache, other, token[None], dense)
            cache.crop(-1)
            timed.dense_seconds.append(other.seconds)
        clocked.seconds = 0.0
        found.append(_logits(model, cache, clocked, token[None], dense))
        if timed is not None:
            timed.seconds.append(clocked.seconds)
    return torch.stack(found)


def _run(
    model: Any, prompt: _Prompt, observed: Policy, data: Any, setup: Setup, line: Line
) -> None:
    """The following text and the needles under one policy that has observed the prompt."""
    last, rest, needles = data
    clocked = _Clocked(copy.deepcopy(observed))
    tokens = torch.cat([last, rest])
    logits = _steps(model, prompt.cache(), clocked, tokens[:-1], setup.dense, line)
    losses = torch.nn.functional.cross_entropy(logits, tokens[1:], reduction="none")
    line.losses += losses.tolist()
    line.read += clocked.read
    for question, digits in needles:
        clocked, cache = _Clocked(copy.deepcopy(observed)), prompt.cache()
        _logits(model, cache, clocked, torch.cat([last, question[:-1]]), setup.dense)
        tokens = torch.cat([question[-1:], digits[:-1]])
        best = _steps(model, cache, clocked, tokens, setup.dense).argmax(-1)
        line.found.append(bool((best == digits).all()))


def _retrieval_heads(model: Any, period: int = 256) -> dict[int, tuple[int, ...]]:
    """The heads that RazorAttention keeps whole, from random tokens said twice."""
    typing = policies.HeadTyping(period)
    g = torch.Generator().manual_seed(0)
    once = torch.randint(100, model.config.vocab_size, (period,), generator=g)
    with sparse.enable(_always(typing), name=_NAME):
        model.set_attn_implementation(_NAME)
        model.base_model(torch.cat([once, once])[None], use_cache=False)
    return typing.retrieval_heads()


@torch.no_grad()
def measure(
    model: Any, tokenizer: Any, text: str, setup: Setup, progress: Progress | None = None,
    save: Callable[[dict[str, Any]], None] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Run everything; {"setup": ..., "lines": [...]}, dense attention first.

    save: gets the result so far after every run. Needs memory for the queries of all layers and two
    or three copies of the cache.
    """
    say = progress or (lambda what, done, total: None)
    layers = model.config.num_hidden_layers
    plans = list(candidates(setup, layers, _retrieval_heads(model)))
    lines = [Line("dense", "all keys", setup.context), *(Line(*plan[:3]) for plan in plans)]
    makers: list[Callable[[], Policy]] = [partial(Policy, 1 << 30), *(p[3] for p in plans)]
    total, done = setup.seeds * len(lines), 0
    for seed in range(setup.seeds):
        say(f"prompt of seed {seed}", done, total)
        whole, rest, needles = context(tokenizer, text, setup, seed)
        prompt = _Prompt()
        with sparse.enable(_always(prompt), name=_NAME):
            model.set_attn_implementation(_NAME)
            model.base_model(whole[None, :-1], use_cache=False)
        data, shared = (whole[-1:], rest, needles), {}
        for line, make in zip(lines, makers, strict=True):
            say(f"{line.policy}, {line.setting}", done, total)
            if line.policy not in shared:
                policy = make()
                policy.crossover = 0  # the policy is measured, not what is chosen in its place
                observed = prompt.shown_to(policy, setup.dense)
                if line.policy in _SHARED:
                    shared[line.policy] = observed
            else:
                observed = shared[line.policy]
                observed.budget = line.budget
            _run(model, prompt, observed, data, setup, line)
            gc.collect()  # policies and what watches them are cycles that hold caches and indices
            done += 1
            if save is not None:
                save(_result(setup, lines))
    say("done", total, total)
    model.set_attn_implementation("attnforge")
    return _result(setup, lines)


def _result(setup: Setup, lines: list[Line]) -> dict[str, Any]:
    """Of the lines that have run as often as dense attention."""
    whole = [line for line in lines if len(line.losses) == len(lines[0].losses)]
    return {"setup": asdict(setup), "lines": [line.summary(lines[0]) for line in whole]}
