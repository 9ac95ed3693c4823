"""fork, spawn, data-loader workers and many Python threads: the same results, and never a hang."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

import attnforge
from attnforge.testing.cases import FlashCase
from attnforge.testing.compare import assert_same

PRELUDE = """
import os, sys, signal, threading
import torch
import attnforge
from attnforge.testing.cases import FlashCase
from attnforge.testing.compare import assert_same

torch.set_num_threads(2)
# Several tasks for our threads, and below the 32768 elements from which torch's own operators
# use theirs: those hang in a forked child, which is not what is tested.
case = FlashCase(seqlen_q=80, seqlen_k=80, heads_q=8, heads_k=2, head_dim=16, causal=True)
decode = FlashCase(batch=1, seqlen_q=1, seqlen_k=4000, heads_q=4, heads_k=1, head_dim=8,
                   decode=True, causal=True)
"""

FORK = """
wants = [(i, i.run("cpu")) for i in (case.make(), decode.make())]  # OpenMP's pool exists now
x = torch.randn(4, 2, 9, 3, 16)
merged = attnforge.merge_states(list(x), list(x[..., 0].transpose(-1, -2)), backend="cpu")
pid = os.fork()
if pid == 0:
    signal.alarm(60)
    for inputs, want in wants:
        assert_same(inputs.run("cpu"), want)
        assert_same(inputs.forward("cpu"), {n: want[n] for n in ("out", "lse")}, exact=False)
    again = attnforge.merge_states(list(x), list(x[..., 0].transpose(-1, -2)), backend="cpu")
    assert all(torch.equal(a, b) for a, b in zip(merged, again))
    os._exit(7)
_, status = os.waitpid(pid, 0)
assert os.WIFEXITED(status) and os.WEXITSTATUS(status) == 7, status
for inputs, want in wants:  # the parent is not disturbed
    assert_same(inputs.run("cpu"), want)
print("fine")
"""

FORK_FIRST = """
pid = os.fork()  # nothing of attnforge was loaded in the parent
if pid == 0:
    signal.alarm(60)
    case.make().run("cpu")
    os._exit(7)
_, status = os.waitpid(pid, 0)
assert os.WIFEXITED(status) and os.WEXITSTATUS(status) == 7, status
print("fine")
"""

SPAWN = """
import torch.multiprocessing as mp

def work(rank, queue):
    torch.set_num_threads(1 + rank)
    queue.put({n: x.numpy() for n, x in case.make().run("cpu").items()})

if __name__ == "__main__":
    want = case.make().run("cpu")
    context = mp.get_context("spawn")
    queue = context.SimpleQueue()
    workers = [context.Process(target=work, args=(n, queue)) for n in range(2)]
    [w.start() for w in workers]
    results = [queue.get() for _ in workers]
    [w.join() for w in workers]
    for got in results:
        assert_same({n: torch.from_numpy(x) for n, x in got.items()}, want)
    print("fine")
"""

LOADER = """
class Set(torch.utils.data.Dataset):
    def __len__(self):
        return 8

    def __getitem__(self, n):
        g = torch.Generator().manual_seed(n)
        q = torch.randn(1, 40, 2, 16, generator=g)
        return attnforge.flash_attention(q, q, q, causal=True, backend="cpu")

want = [Set()[n] for n in range(8)]
loader = torch.utils.data.DataLoader(Set(), num_workers=2, timeout=60)
for a, b in zip(loader, want):
    assert torch.equal(a[0], b)
print("fine")
"""

FIRST_CALL_RACE = """
want = {}
results, gate = [None] * 8, threading.Barrier(8)

def work(n):
    gate.wait()  # all make the first call of the process: load, select, memoise
    results[n] = case.make().run("cpu")

threads = [threading.Thread(target=work, args=(n,)) for n in range(8)]
[t.start() for t in threads]
[t.join() for t in threads]
for got in results:
    assert_same(got, results[0])
assert_same(case.make().run("cpu"), results[0])
print("fine")
"""


def run_script(tmp_path: Path, body: str, **env: str) -> None:
    script = tmp_path / "script.py"
    script.write_text(PRELUDE + body, encoding="utf-8")
    source = str(Path(attnforge.__file__).parents[1])
    done = subprocess.run(
        [sys.executable, str(script)],
        env={**os.environ, "PYTHONPATH": source, **env},
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.endswith("fine\n")


@pytest.mark.usefixtures("cpu")
@pytest.mark.parametrize(
    "body", [FORK, FORK_FIRST, SPAWN, LOADER, FIRST_CALL_RACE],
    ids=["fork", "fork_first", "spawn", "data_loader", "first_call_race"],
)  # fmt: skip
def test_processes(tmp_path: Path, body: str) -> None:
    # checks 89, 90, each within a time limit
    run_script(tmp_path, body)


def test_python_threads(backend: str) -> None:
    # check 90: 8 threads at once, different problems, each repeated
    problems = [FlashCase(seqlen_q=10 + 7 * n, seqlen_k=60, heads_q=4, heads_k=1 + n % 2,
                          causal=bool(n % 3), seed=n).make() for n in range(8)]  # fmt: skip
    wants = [p.run(backend) for p in problems]
    failures: list[BaseException] = []

    def work(n: int) -> None:
        try:
            for _ in range(15):
                assert_same(problems[n].run(backend), wants[n], exact=backend == "cpu")
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(8)]
    for t in threads:
        t.start()
    for t in threads:
        t.join(timeout=120)
    assert not any(t.is_alive() for t in threads)
    assert not failures, failures[0]


def test_registration_while_calls_run() -> None:
    # a registration in one thread and calls in others: no stale memo, no torn table
    from attnforge.registry import register, unregister

    spec = next(s for s in attnforge.list_kernels("flash_fwd") if s.backend == "reference")
    from dataclasses import replace

    q = torch.randn(1, 4, 1, 8)
    want = attnforge.flash_attention(q, q, q, backend="reference")
    stop, failures = threading.Event(), []

    def call() -> None:
        while not stop.is_set():
            if not torch.equal(attnforge.flash_attention(q, q, q, backend="reference"), want):
                failures.append("result")

    thread = threading.Thread(target=call)
    thread.start()
    for _ in range(50):
        register(replace(spec, id="racing.flash.fwd", backend="racing"))
        assert torch.equal(attnforge.flash_attention(q, q, q, backend="racing"), want)
        unregister("racing.flash.fwd")
        with pytest.raises(ValueError, match="racing"):
            attnforge.flash_attention(q, q, q, backend="racing")
    stop.set()
    thread.join(timeout=60)
    assert not failures
