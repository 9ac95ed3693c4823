"""Makes the tables of tuned configs that come with the package, by measuring on this machine.

    python tools/tuning_tables.py flash_bwd --budget 600    # measure and write
    python tools/tuning_tables.py flash --only fp32         # some rows of a table
    python tools/tuning_tables.py flash --check             # rows of other source: exit code 1

A row of a table holds for every length, batch and layout of its kind of call, and for any number of
threads (``attnforge.tuning.lookup`` says why). So a config is measured on several problems of a
kind, batches and threads among them. It is kept if, in each of two fresh processes, it wins the
first problem by the margin and the noise and is not slower by the margin in any; the gain that the
row states is the smallest of the first problem, ``least`` the smallest of all. Candidates differ
from the default in one number: what needs two to win is luck more often than not.

Rows hold for the kernels' source as it is: run this last before a release, on a quiet machine. A
kind without a winner gets no row, and loses the one it had.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import math
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from attnforge.registry import Config, KernelSpec, Request, tuned
from attnforge.registry.predicates import dtype_name
from attnforge.registry.spec import named, specs_for
from attnforge.tuning import confirm, device, lookup, measure, race, store
from attnforge.tuning.entry import Entry, Problem
from attnforge.tuning.measure import Gain
from attnforge.tuning.trace import row_of

PROCESSES = 2
DUEL_S = 20.0  # at most, for one problem in one process


@dataclass(frozen=True)
class Kind:
    """Calls that share a row: problems, the first of which a winner must win, with threads."""

    name: str
    problems: tuple[tuple[Request, int], ...]

    @property
    def first(self) -> Request:
        return self.problems[0][0]


def kinds() -> Iterator[Kind]:
    """What is tuned for the package: prefill and training of usual heads."""
    most = device.processors()
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        for dim in (64, 128):
            for mask in ("causal", "full"):
                features = frozenset({"window_right"} if mask == "causal" else ())

                def problem(
                    op: str, threads: int, length: int, heads: int, batch: int = 1,
                    dtype: torch.dtype = dtype, dim: int = dim, features: Any = features,
                ) -> tuple[Request, int]:  # fmt: skip
                    dims = (("head_dim", dim), ("v_head_dim", dim), ("group", 1))
                    sizes = {"batch": batch, "seqlen_q": length, "seqlen_k": length}
                    full = (*sizes.items(), ("heads", heads), ("window", 0))
                    return Request(op, "cpu", "", dtype, dims, features, sizes=full), threads

                fwd, bwd = partial(problem, "flash_fwd"), partial(problem, "flash_bwd")
                yield Kind(f"flash_fwd {name} d{dim} {mask}", (
                    fwd(most, 2048, 8), fwd(most, 512, 8), fwd(most, 2048, 8, batch=3),
                    fwd(most, 4096, 4), fwd(most, 2048, 1), fwd(1, 2048, 8), fwd(most, 300, 32),
                ))  # fmt: skip
                # Heads are part of a row of the backward: 5 to 8 of them.
                yield Kind(f"flash_bwd {name} d{dim} {mask} heads 8", (
                    bwd(most, 512, 8), bwd(most, 512, 8, batch=3), bwd(most, 2048, 8),
                    bwd(1, 512, 8), bwd(most, 1000, 5), bwd(most, 160, 8),
                ))  # fmt: skip


def best_spec(request: Request) -> KernelSpec | None:
    """The kernel of the best score, if it has something to tune."""
    serving = [spec for spec in specs_for(request.op) if not spec.reasons(request)]
    return serving[0] if serving and serving[0].space is not None else None


def candidates(spec: KernelSpec, request: Request) -> list[Config]:
    """Configs that differ from the default in one parameter."""
    assert spec.space is not None
    default, *others = spec.space.configs(request)
    return [c for c in others if sum(c[name] != default[name] for name in default) == 1]


def promising(spec: KernelSpec, kind: Kind) -> Config | None:
    """The candidate whose smallest gain over the problems is the largest, by short bursts."""
    assert spec.space is not None
    found = dict.fromkeys(candidates(spec, kind.first), math.inf)
    for request, threads in kind.problems:
        torch.set_num_threads(threads)
        work = named(tuned.operator(request.op).workload)(request)  # type: ignore[union-attr]
        configs = [spec.space.config(spec.space.default(request)), *found]
        runs = [partial(work.run, spec.resolve(config)) for config in configs]
        for run in runs:  # first touches
            run()
        calls = measure.calls_per_burst(runs[0], race.SCREEN_S, request.device)
        best = [math.inf] * len(runs)
        for _ in range(race.SCREEN_ROUNDS):
            for n, run in enumerate(runs):
                best[n] = min(best[n], measure.seconds_per_call(run, calls, request.device))
        for config, seconds in zip(found, best[1:], strict=True):
            found[config] = min(found[config], best[0] / seconds)
    return max(found, key=found.__getitem__) if found else None


def duels(spec: KernelSpec, config: Config, kind: Kind) -> list[Gain]:
    """The gains over the default in a fresh process, problem by problem."""
    jobs = [
        {"request": row_of(request), "spec": spec.id, "config": dict(config),
         "threads": threads, "seconds": DUEL_S}
        for request, threads in kind.problems
    ]  # fmt: skip
    command = [sys.executable, __file__, "--process"]
    done = subprocess.run(command, input=json.dumps(jobs), capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{kind.name}: {config}: {done.stderr.strip().splitlines()[-1]}")
    return [Gain(**row) for row in json.loads(done.stdout.splitlines()[-1])]


def entry(spec: KernelSpec, config: Config, kind: Kind, runs: list[list[Gain]]) -> Entry | None:
    """The row of a table, or None if the config does not stand in every run."""
    firsts = [gains[0] for gains in runs]
    least = min(gain.middle for gains in runs for gain in gains)
    if not (min(gain.low for gain in firsts) > race.MARGIN and least > 1 / race.MARGIN):
        return None
    worst = min(firsts, key=lambda gain: gain.middle)
    measured = {
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d"),
        "gain": round(worst.middle, 4),
        "gain_low": round(min(gain.low for gain in firsts), 4),
        "least": round(least, 4),
        "median_s": worst.candidate_s,
        "default_s": worst.default_s,
        "repeats": worst.repeats,
        "processes": len(runs),
        "problems": len(kind.problems),
        "sizes": dict(kind.first.sizes),
    }
    problem, environment = Problem.alone(kind.first), device.shipped_environment(spec)
    return Entry(spec.id, problem, environment, dict(config), {}, measured)


def write(kind: Kind, spec: KernelSpec, row: Entry | None) -> None:
    """Put the row in the place of what the table has for this kind; rows of other source go."""
    name = device.device_name(kind.first)
    assert name is not None
    path = store.file_of(store.tables_directory(), kind.first.op, name)
    here = Entry(spec.id, Problem.alone(kind.first), device.shipped_environment(spec), {}).key
    there = store.read(path, shipped=True)
    kept = [old for old in there if old.key != here and not lookup.stale(old)]
    kept += [] if row is None else [row]
    if kept:
        path.parent.mkdir(exist_ok=True)
        rows = {other.key: other.to_json() for other in sorted(kept, key=lambda e: str(e.problem))}
        data = {"op": kind.first.op, "device": name, "entries": rows}
        store.write_text(path, json.dumps(data, indent=1) + "\n")
    elif path.exists():
        path.unlink()


def tell(kind: Kind, gains: list[Gain]) -> None:
    for (request, threads), gain in zip(kind.problems, gains, strict=True):
        sizes = " ".join(f"{k}={v}" for k, v in request.sizes if k != "window")
        print(f"  {dtype_name(request.dtype)} {sizes} threads={threads}: x{gain.middle:.3f} "
              f"({gain.low:.3f}..{gain.high:.3f}), default {gain.default_s * 1e3:.3f} ms",
              flush=True)  # fmt: skip


def tune(kind: Kind, parts: dict[str, int]) -> bool:
    """Measure a kind and write its row; whether it has one. ``parts``: the config, if known."""
    spec = best_spec(kind.first)
    if spec is None or spec.space is None:
        return False
    default = spec.space.default(kind.first)
    if parts and not parts.keys() <= default.keys():
        return False
    config = spec.space.config({**default, **parts}) if parts else promising(spec, kind)
    runs: list[list[Gain]] = []
    row = None
    for _ in range(PROCESSES if config is not None else 0):
        assert config is not None
        runs.append(duels(spec, config, kind))
        print(f"{kind.name}: {config}, process {len(runs)}")
        tell(kind, runs[-1])
        row = entry(spec, config, kind, runs)
        if row is None:
            break
    write(kind, spec, row)
    print(f"{kind.name}: {'no row' if row is None else 'a row'}", flush=True)
    return row is not None


def check() -> int:
    """1 if a table of this machine has rows that are not used, which are named."""
    rows = lookup.shipped()
    for row, why in rows:
        print(f"{row.spec} {row.problem.dtype} {dict(row.problem.dims)}: {why or 'in use'}")
    return int(any(why for _, why in rows))


def main() -> int:
    parser = argparse.ArgumentParser(description="Tuned configs that come with the package.")
    parser.add_argument("what", nargs="?", default="", help="an operator, or how its name begins")
    parser.add_argument("--only", default="", help="words that a kind's name must have")
    parser.add_argument("--config", default="", help="name=number,...: try this one alone")
    parser.add_argument("--budget", type=float, default=600.0, help="no kind begins after seconds")
    parser.add_argument("--check", action="store_true", help="list rows and whether they are used")
    parser.add_argument("--process", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.check:
        return check()
    if options.process:
        jobs = json.load(sys.stdin)
        print(json.dumps([dataclasses.asdict(confirm.measured(job)) for job in jobs]))
        return 0
    parts = dict(part.split("=") for part in options.config.split(",") if part)
    end = time.monotonic() + options.budget
    for kind in kinds():
        words = set(kind.name.split())
        if not kind.first.op.startswith(options.what) or not set(options.only.split()) <= words:
            continue
        if time.monotonic() > end:
            print(f"{kind.name}: no time left")
            continue
        tune(kind, {name: int(value) for name, value in parts.items()})
    return 0


if __name__ == "__main__":
    sys.exit(main())
