"""Same-run hardware peaks: the two lines of the roofline, measured, never taken from a data sheet.

`compute`: fp32 multiply-adds per second on all threads, in GFLOP/s (one FMA is two flops).
`read`: sequential fp32 read bandwidth over a buffer far larger than the last-level cache, in GB/s.

Each peak is the better of a native probe loop (where the native library has one) and torch's own
best routine (`torch.mm`, `torch.sum`), and says which one it was. A shared machine slows down
under everyone alike, so the benchmark takes a probe burst *between* the bursts that it times and
compares those two; the best rate seen over a whole run is the line drawn in the plots.

Bytes and flops of an operator come from the cost formula beside it (`attnforge.ops.flash.cost`).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from attnforge import _native
from attnforge.tuning.measure import seconds_per_call

__all__ = ["UNIT", "Peaks", "Probe", "Resource", "Unit", "measure_peaks", "seconds_per_call"]

Resource = Literal["compute", "read"]
Unit = Literal["GFLOP/s", "GB/s"]

UNIT: dict[Resource, Unit] = {"compute": "GFLOP/s", "read": "GB/s"}

# 1024^3: 12 MiB of operands, inside the last-level cache of any current server core pair, and
# 2.1 GFLOP, about 10 ms on two cores: long enough to amortise the start of the thread pool.
_MM_SIZE = 1024
# 256 MiB: eight times a 32 MiB last-level cache, so what the caches keep is below 1/8.
_READ_BYTES = 256 * 2**20
# Rounds of the FMA loop, each a register tile over 256 steps (50 to 200 kFLOP per thread by ISA):
# milliseconds, so that starting the threads is noise.
_FMA_ROUNDS = 1 << 13
# Fills 132 multiprocessors many times over; twenty times an L2 of 50 MB.
_GPU_MM = 8192
_GPU_COPY_BYTES = 1 << 30
# One probe burst. The protocol caps every burst at 100 ms.
_BURST_S = 0.04


@dataclass(slots=True)
class Probe:
    """One way to measure one peak; `best` is the highest rate that it has seen."""

    resource: Resource
    source: str
    rate_once: Callable[[], float]
    best: float = 0.0

    def burst(self, seconds: float = _BURST_S) -> float:
        """The mean rate over one burst, in GFLOP/s or GB/s; updates `best`."""
        rates: list[float] = []
        stop = time.perf_counter() + seconds
        while True:
            rates.append(self.rate_once())
            if time.perf_counter() >= stop:
                break
        # Equal work per call: the burst's rate is the harmonic mean of the calls' rates.
        rate = len(rates) / sum(1.0 / r for r in rates)
        self.best = max(self.best, rate)
        return rate


@dataclass(slots=True)
class Peaks:
    """The chosen probe of each resource, and every probe that was compared to choose it."""

    compute: Probe
    read: Probe
    candidates: list[Probe] = field(default_factory=list)

    def of(self, resource: Resource) -> Probe:
        """The probe of one resource."""
        return self.compute if resource == "compute" else self.read

    def as_dict(self) -> dict[str, dict[str, float | str]]:
        """Peak, unit and source of both resources, plus what the losing probes reached."""
        out: dict[str, dict[str, float | str]] = {}
        for probe in (self.compute, self.read):
            entry: dict[str, float | str] = {
                "peak": probe.best,
                "unit": UNIT[probe.resource],
                "source": probe.source,
            }
            for other in self.candidates:
                if other.resource == probe.resource and other is not probe:
                    entry[f"also: {other.source}"] = other.best
            out[probe.resource] = entry
        return out


def _probe_op(name: str) -> Callable[..., Any] | None:
    """A probe op of the native library, or None where the library or the op is absent."""
    if _native.unavailable() is not None:
        return None
    try:
        op: Callable[..., Any] = _native.operator(name)
    except AttributeError:  # a library built before the probes
        return None
    return op


def _timed(run: Callable[[], object], work: float, device: str = "cpu") -> Callable[[], float]:
    """A probe that does `work` flops (or bytes) per call; its rate in G per second."""
    return lambda: work / seconds_per_call(run, 1, device) * 1e-9


def _gpu_probes() -> list[Probe]:
    """bf16 matrix product on random data (zeros run faster), and a copy: bytes read and written."""
    a, b = (torch.randn(_GPU_MM, _GPU_MM, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    c = torch.empty_like(a)
    product = _timed(lambda: torch.mm(a, b, out=c), 2.0 * _GPU_MM**3, "cuda")
    source = torch.randn(_GPU_COPY_BYTES // 4, device="cuda")
    target = torch.empty_like(source)
    copy = _timed(lambda: target.copy_(source), 2.0 * _GPU_COPY_BYTES, "cuda")
    return [
        Probe("compute", f"torch.mm bf16 {_GPU_MM}^3", product),
        Probe("read", "device copy, both ways", copy),
    ]


def _compute_probes() -> list[Probe]:
    a = torch.ones(_MM_SIZE, _MM_SIZE)
    b = torch.ones(_MM_SIZE, _MM_SIZE)
    c = torch.empty(_MM_SIZE, _MM_SIZE)
    mm = _timed(lambda: torch.mm(a, b, out=c), 2.0 * _MM_SIZE**3)
    probes = [Probe("compute", "torch.mm fp32", mm)]
    fma = _probe_op("probe_fma")
    if fma is not None:
        probes.append(Probe("compute", "native FMA loop", lambda: float(fma(_FMA_ROUNDS))))
    return probes


def _read_probes() -> list[Probe]:
    # Written once, so that every page is backed by memory and not by the shared zero page.
    buf = torch.ones(_READ_BYTES // 4)
    probes = [Probe("read", "torch.sum fp32", _timed(lambda: torch.sum(buf), float(_READ_BYTES)))]
    read = _probe_op("probe_read")
    if read is not None:
        probes.append(Probe("read", "native read loop", lambda: float(read(buf))))
    return probes


def measure_peaks(device: str = "cpu", bursts: int = 5, rest_s: float = 0.05) -> Peaks:
    """Measure both peaks and keep the faster probe of each.

    Args:
        device: "cpu", or "cuda" for the current GPU: bf16 products and device copies.
        bursts: bursts of about 40 ms per probe.
        rest_s: idle seconds before each burst, so that a burstable machine recovers its credit.

    Returns:
        `Peaks`; call `peaks.of(resource).burst()` later for a peak at that moment.
    """
    candidates = _gpu_probes() if device == "cuda" else _compute_probes() + _read_probes()
    for probe in candidates:
        probe.rate_once()  # first touch, thread pool start
    for _ in range(bursts):
        for probe in candidates:
            time.sleep(rest_s)
            probe.burst()

    def best(resource: Resource) -> Probe:
        return max((p for p in candidates if p.resource == resource), key=lambda p: p.best)

    return Peaks(compute=best("compute"), read=best("read"), candidates=candidates)
