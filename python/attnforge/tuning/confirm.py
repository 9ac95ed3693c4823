"""A winner meets the default again in a fresh process: what differs between processes is noise too.

Memory lies elsewhere, threads start anew, and a config that won by the luck of one process loses
its lead. The process is ``python -m attnforge.tuning.confirm``: it reads one JSON object, duels as
``race`` does, and prints the gain as another.
"""

from __future__ import annotations

import dataclasses
import json
import math
import subprocess
import sys
import time
from typing import Any

import torch

from attnforge.registry import tuned
from attnforge.registry.space import Config
from attnforge.registry.spec import KernelSpec, Request, list_kernels, named
from attnforge.tuning.measure import Gain
from attnforge.tuning.race import rivals
from attnforge.tuning.trace import request_of, row_of

__all__ = ["elsewhere"]

_START_S = 30.0  # on top of what the duel may take: imports, inputs, the proof


def elsewhere(spec: KernelSpec, config: Config, request: Request, deadline: float) -> Gain:
    """The gain of ``config`` over the default in a fresh process, until the monotonic deadline.

    RuntimeError if that process fails, for instance because it does not know the kernel: only
    kernels that a package brings can be confirmed.
    """
    left = max(deadline - time.monotonic(), 0.0)
    job = {
        "request": row_of(request),
        "spec": spec.id,
        "config": dict(config),
        "threads": torch.get_num_threads(),
        "seconds": left,
    }
    command = [sys.executable, "-m", "attnforge.tuning.confirm"]
    try:
        done = subprocess.run(
            command, input=json.dumps(job), capture_output=True, text=True, timeout=left + _START_S
        )
    except subprocess.TimeoutExpired:
        return Gain(1.0, 0.0, math.inf, math.nan, math.nan, 0)
    if done.returncode != 0:
        reason = (done.stderr.strip() or "no message").splitlines()[-1]
        raise RuntimeError(f"attnforge.tune: {spec.id} cannot be confirmed in a process: {reason}")
    return Gain(**json.loads(done.stdout.splitlines()[-1]))


def measured(job: Any) -> Gain:
    """The duel that a job asks for, in this process."""
    torch.set_num_threads(int(job["threads"]))
    deadline = time.monotonic() + float(job["seconds"])
    request = request_of(job["request"])
    spec = next((spec for spec in list_kernels(request.op) if spec.id == job["spec"]), None)
    if spec is None or spec.space is None:
        raise LookupError(f"no kernel {job['spec']} with a search space is registered here")
    if reasons := spec.reasons(request):
        raise LookupError(f"{spec.id} does not serve here: {'; '.join(reasons)}")
    how = tuned.operator(request.op)
    assert how is not None
    default = spec.space.config(spec.space.default(request))
    pair = (spec, default), (spec, spec.space.config(job["config"]))
    gain = rivals(named(how.workload)(request), *pair, request, deadline)
    if gain is None:
        raise ArithmeticError(f"{spec.id} is wrong with {dict(job['config'])} in this process")
    return gain


if __name__ == "__main__":
    print(json.dumps(dataclasses.asdict(measured(json.load(sys.stdin)))))
