"""Which config of one kernel wins one problem: right first, then faster by more than the noise.

1. *Proof.* Every candidate runs a small problem that the family checks in full (for attention:
   every element within the per-element bound of float64). Outputs are filled with NaN before.
   What fails is never timed.
2. *Screen.* A few short bursts of each, in turn. The fastest then runs the problem itself, where
   every row must keep half the digits of the default's answer; if it does not, the next one does.
3. *Duel.* The best of the screen against the default in fresh paired bursts. The screen picks the
   luckiest of many; only the duel's own numbers count. It wins if the lower end of the confidence
   interval of its gain is above ``MARGIN``. All pairs are of one process: what differs between
   processes is not in the interval.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from attnforge.registry.space import Config
from attnforge.registry.spec import KernelSpec, Request
from attnforge.tuning import measure
from attnforge.tuning.measure import Gain

__all__ = ["MARGIN", "Race", "Workload", "differs", "race", "rivals"]

MARGIN = 1.02  # a gain that no user notices is not worth another config
REPEATS = 15
SCREEN_S = 0.02
SCREEN_ROUNDS = 3
MODEL_LIMIT = 16  # configs measured where a model ranks them

Launch = Callable[..., Any]


class Workload(Protocol):
    """Inputs and outputs of one problem of an operator, made by its family."""

    @property
    def outputs(self) -> dict[str, Tensor]:
        """What ``run`` writes, by name."""

    @property
    def proof(self) -> Workload:
        """A small problem with the same metadata that ``wrong`` can check in full."""

    def run(self, launch: Launch) -> None:
        """One call of a launcher on the inputs."""

    def wrong(self) -> str | None:
        """Why the outputs are not the right answer, or None."""


@dataclass(frozen=True)
class Race:
    """The winning config; ``gain`` is None if the default won without a duel."""

    config: Config
    gain: Gain | None
    won: bool
    tried: int
    wrong: tuple[str, ...]
    finished: bool


def _poison(work: Workload) -> None:
    for x in work.outputs.values():
        x.fill_(math.nan)


def _answer(work: Workload, launch: Launch) -> dict[str, Tensor]:
    _poison(work)
    work.run(launch)
    return {name: x.clone() for name, x in work.outputs.items()}


def differs(got: dict[str, Tensor], want: dict[str, Tensor]) -> str | None:
    """Why ``got`` is another answer than ``want``, or None.

    Rows (the last dimension) may differ by half the digits of the dtype, relative to the row's norm
    and to the typical norm of all rows. Rounding stays far below that; a tile left out, an index
    past its end or an unwritten row does not.
    """
    for name, expected in want.items():
        wide, x = expected.double(), got[name].double()
        if wide.dim() == 0 or wide.numel() == 0:
            continue
        if not torch.equal(x.isfinite(), wide.isfinite()):
            return f"{name} is not finite where the default's is"
        known = wide.isfinite()
        wide, x = torch.where(known, wide, 0.0), torch.where(known, x, 0.0)
        norms = wide.norm(dim=-1)
        allowed = math.sqrt(torch.finfo(expected.dtype).eps) * (
            norms + norms.square().mean().sqrt()
        )
        excess = float(((x - wide).norm(dim=-1) - allowed).max())
        if not excess <= 0.0:
            return f"{name} differs from the default's answer by {excess:.2g} too much"
    return None


def _fault(work: Workload, launch: Launch) -> str | None:
    """Why a candidate must not be used, or None. A launch that fails is a reason like another."""
    try:
        _poison(work.proof)
        work.proof.run(launch)
        if (wrong := work.proof.wrong()) is not None:
            return wrong
        work.run(launch)  # whether it runs at this size at all; it warms up too
    except Exception as error:  # too much shared memory, no such instance, ...
        return f"{type(error).__name__}: {error}".split("\n", 1)[0]
    return None


def _calls(work: Workload, launches: Sequence[Launch]) -> list[measure.Call]:
    return [partial(work.run, launch) for launch in launches]


def race(work: Workload, spec: KernelSpec, request: Request, deadline: float) -> Race:
    """The winner among the configs of ``spec``, measured until the monotonic clock says deadline.

    RuntimeError if the default itself fails: then there is nothing to compare with.
    """
    if spec.space is None:
        return Race(Config({}), None, False, 0, (), True)
    default, *others = spec.space.configs(request, MODEL_LIMIT)
    base = spec.resolve(default)
    if (fault := _fault(work, base)) is not None:
        raise RuntimeError(
            f"attnforge.tune: {spec.id} is wrong or fails with its default {default}: {fault}"
        )
    want = _answer(work, base)
    right = [default]
    wrong: list[str] = []
    for config in others:
        if time.monotonic() > deadline:
            return Race(default, None, False, len(right) + len(wrong), tuple(wrong), False)
        if (fault := _fault(work, spec.resolve(config))) is None:
            right.append(config)
        else:
            wrong.append(f"{config}: {fault}")
    tried = len(right) + len(wrong) - 1

    runs = _calls(work, [spec.resolve(config) for config in right])
    best = measure.screen(runs, SCREEN_S, SCREEN_ROUNDS, deadline, request.device)
    for index in sorted(range(len(runs)), key=best.__getitem__):
        if index == 0:  # nothing that is right is ahead of the default
            return Race(default, None, False, tried, tuple(wrong), math.isfinite(max(best)))
        fault = differs(_answer(work, spec.resolve(right[index])), want)
        if fault is None:
            break
        wrong.append(f"{right[index]}: {fault}")
    gain = measure.duel((runs[0], runs[index]), REPEATS, deadline, request.device)
    won = gain.low > MARGIN
    # Cut short, a duel may say that the candidate wins, but not that it does not.
    finished = won or gain.repeats == REPEATS
    return Race(right[index] if won else default, gain, won, tried, tuple(wrong), finished)


def rivals(
    work: Workload, old: tuple[KernelSpec, Config], new: tuple[KernelSpec, Config],
    request: Request, deadline: float,
) -> Gain | None:  # fmt: skip
    """The gain of one kernel over another, both with their own config; None if it is wrong."""
    before, after = (_bound(spec, config) for spec, config in (old, new))
    want = _answer(work, before)
    if _fault(work, after) is not None or differs(_answer(work, after), want) is not None:
        return None
    first, second = _calls(work, (before, after))
    return measure.duel((first, second), REPEATS, deadline, request.device)


def _bound(spec: KernelSpec, config: Config) -> Launch:
    return spec.resolve(None if spec.space is None else spec.space.config(config))
