"""Comparison with the float64 truth by per-element bounds: a fraction of the bound above 1 fails.

    report = compare(inputs.run("cpu"), inputs.truth())
    report.check()

RMS and bias are reports beside the rule. ``signed_bias`` is a rule of its own for big samples:
rounding that leans to one side passes every bound and still spoils long sums.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from attnforge.testing.oracle import Truth, unit_roundoff

__all__ = ["ErrorStat", "Report", "assert_same", "compare", "same_bits", "signed_bias"]


@dataclass(frozen=True)
class ErrorStat:
    """Errors of one result.

    used: the largest |error| / bound; above 1 is wrong. rms: of the errors, relative to the rms
    of the truth. bias: the mean signed error in its standard errors. worst: where ``used`` is.
    """

    name: str
    used: float
    rms: float
    bias: float
    worst: tuple[int, ...]
    got: float
    want: float

    def __str__(self) -> str:
        return (
            f"{self.name}: {self.used:.3g} of the bound at {self.worst} (got {self.got:.9g}, want "
            f"{self.want:.9g}), rms {self.rms:.2g}, bias {self.bias:+.1f} s.e."
        )


@dataclass(frozen=True)
class Report:
    """Errors of every result of one call."""

    stats: tuple[ErrorStat, ...]
    context: str = ""

    @property
    def used(self) -> float:
        """The largest fraction of a bound over all results."""
        return max((stat.used for stat in self.stats), default=0.0)

    def check(self, limit: float = 1.0) -> Report:
        """AssertionError with a line per wrong result if one is past ``limit`` of its bound."""
        wrong = [str(stat) for stat in self.stats if not stat.used <= limit]
        if wrong:
            raise AssertionError("\n".join([self.context, *wrong] if self.context else wrong))
        return self


def _stat(name: str, got: Tensor, want: Tensor, bound: Tensor) -> ErrorStat:
    if got.shape != want.shape:
        raise AssertionError(f"{name}: shape {tuple(got.shape)}, want {tuple(want.shape)}")
    if want.numel() == 0:
        return ErrorStat(name, 0.0, 0.0, 0.0, (), 0.0, 0.0)
    got = got.detach().double()
    same = (got == want) | (got.isnan() & want.isnan())
    error = torch.where(same, 0.0, got - want)
    fraction = torch.where(same, 0.0, error.abs() / bound)
    # A NaN or infinity on one side alone is as wrong as can be.
    fraction = torch.where(fraction.isnan(), float("inf"), fraction)
    flat = int(fraction.argmax())
    worst = tuple(int(x) for x in torch.unravel_index(torch.tensor(flat), fraction.shape))
    known = want.isfinite() & got.isfinite()
    error, size = error[known], want[known]
    rms = float(error.square().mean().sqrt() / size.square().mean().sqrt().clamp_min(1e-300))
    return ErrorStat(
        name, float(fraction.reshape(-1)[flat]), rms if error.numel() else 0.0, signed_bias(error),
        worst, float(got.reshape(-1)[flat]), float(want.reshape(-1)[flat]),
    )  # fmt: skip


def signed_bias(error: Tensor) -> float:
    """The mean of ``error`` in its own standard errors; 0 for fewer than 2 or equal errors."""
    count = error.numel()
    if count < 2:
        return 0.0
    spread = float(error.std())
    return float(error.mean()) / (spread / count**0.5) if spread > 0 else 0.0


def compare(got: Mapping[str, Tensor], want: Truth, context: str = "") -> Report:
    """Compare results by name with the truth. A result that the truth lacks is a KeyError."""
    stats = [_stat(name, x, want.values[name], want.bounds[name]) for name, x in got.items()]
    return Report(tuple(stats), context)


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors have one shape, dtype and content, NaN payloads and -0 included."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    width = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[a.dtype.itemsize]
    return torch.equal(a.detach().contiguous().view(width), b.detach().contiguous().view(width))


def assert_same(
    got: Mapping[str, Tensor], want: Mapping[str, Tensor], context: str = "", exact: bool = True
) -> None:
    """AssertionError unless both hold the same names with bitwise equal tensors (any NaN is NaN).

    exact=False is for code on top of a BLAS, whose order of adding depends on shape and layout:
    NaN and infinities in the same places, and values that differ by rounding alone.
    """
    if got.keys() != want.keys():
        raise AssertionError(f"{context}: {sorted(got)} against {sorted(want)}")
    for name in got:
        if same_bits(got[name], want[name]):
            continue
        a, b = got[name].detach().double(), want[name].detach().double()
        if a.shape != b.shape or got[name].dtype != want[name].dtype:
            raise AssertionError(f"{context} {name}: {a.shape} {got[name].dtype} != {b.shape}")
        same_sign = torch.signbit(a) == torch.signbit(b)
        differ = ~((a == b) & same_sign | (a.isnan() & b.isnan()))
        if not exact:
            size = b[b.isfinite()].abs().max() if bool(b.isfinite().any()) else b.new_zeros(())
            slack = 2 * unit_roundoff(got[name].dtype) * b.abs() + 1e-5 * size
            differ &= ~((a - b).abs() <= slack)
        if bool(differ.any()):
            where = differ.nonzero()[:3].tolist()
            gap = float((a - b).abs().nan_to_num(float("inf")).max())
            raise AssertionError(
                f"{context} {name}: {int(differ.sum())} of {a.numel()} elements differ in value, "
                f"by {gap:.3g} at most, first at {where}"
            )
