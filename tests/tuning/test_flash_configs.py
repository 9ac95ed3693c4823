"""Run-time tiles of the CPU kernels: every config is right, on every ISA level and thread count."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import attnforge
from attnforge.registry import Config, KernelSpec, Request, list_kernels
from attnforge.testing.cases import Target
from attnforge.testing.compare import same_bits
from attnforge.testing.tune_flash import FlashWorkload, problems, workload
from attnforge.tuning.race import differs

OPS = ("flash_fwd", "flash_bwd", "flash_decode")
DTYPES = (torch.float32, torch.bfloat16)


def cpu_spec(op: str) -> KernelSpec:
    (spec,) = (s for s in list_kernels(op) if s.backend == "cpu")
    assert spec.space is not None
    return spec


def request(op: str, features: str, dtype: torch.dtype, **sizes: int) -> Request:
    """Lengths that no tile divides, several of the largest tile where that is affordable."""
    rows, keys = (2, 2100) if op == "flash_decode" else (235, 301)
    full = {"batch": 2, "seqlen_q": rows, "seqlen_k": keys, "heads": 4, "window": 0, **sizes}
    dims = (("head_dim", 40), ("v_head_dim", 24), ("group", 2))
    return Request(
        op, "cpu", "", dtype, dims, frozenset(features.split()), sizes=tuple(full.items())
    )


def answer(work: FlashWorkload, spec: KernelSpec, config: Config) -> dict[str, Tensor]:
    for x in work.outputs.values():
        x.fill_(math.nan)
    work.run(spec.resolve(config))
    return {name: x.clone() for name, x in work.outputs.items()}


PROBLEMS = {
    "plain": "",
    "causal": "window_right",
    "window": "window_left window_right alibi sinks softcap",
    "varlen": "varlen seqused_k window_right",
}


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("name", PROBLEMS)
def test_every_config_is_within_the_bound(level: Target, op: str, name: str) -> None:
    if op == "flash_decode" and name == "varlen":
        name = "plain"
    dtype = DTYPES[sorted(PROBLEMS).index(name) % 2]
    features = PROBLEMS[name] + (" seqused_k" if op == "flash_decode" else "")
    asked = request(op, features, dtype, window=70 if name == "window" else 0)
    spec = cpu_spec(op)
    assert spec.space is not None
    work = workload(asked).proof
    default = answer(work, spec, spec.space.default(asked))
    configs = spec.space.configs(asked)
    assert len(configs) > 10
    for config in configs:
        got = answer(work, spec, config)
        assert work.wrong() is None, f"{config}: {work.wrong()}"
        assert differs(got, default) is None, config


@pytest.mark.parametrize("op", OPS)
@pytest.mark.usefixtures("cpu")
def test_a_config_gives_the_same_bits_for_any_number_of_threads(op: str) -> None:
    asked = request(op, "window_right", torch.float32)
    spec, work = cpu_spec(op), workload(asked)
    assert spec.space is not None
    for config in spec.space.configs(asked)[::5]:
        torch.set_num_threads(1)
        want = answer(work, spec, config)
        for threads in (2, 3):
            torch.set_num_threads(threads)
            got = answer(work, spec, config)
            assert all(same_bits(got[name], want[name]) for name in want), (config, threads)


def test_waves_change_no_bit(level: Target) -> None:
    """How many heads are packed at a time; a byte is one head, as far as threads allow."""
    del level
    for features in PROBLEMS.values():
        asked = request("flash_fwd", features, torch.float32, batch=3, heads=8, window=70)
        spec, work = cpu_spec("flash_fwd"), workload(asked)
        assert spec.space is not None
        default = spec.space.default(asked)
        want = answer(work, spec, default)
        for value in (1, 1 << 20, 32 << 20):
            got = answer(work, spec, spec.space.config({**default, "wave_bytes": value}))
            assert all(same_bits(got[name], want[name]) for name in want), (features, value)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("value", [1, 7, 13, 1 << 39])
def test_no_tile_size_is_unsafe(cpu: str, op: str, value: int) -> None:
    """What no space offers is clamped to what the kernel has room for, and right."""
    spec, work = cpu_spec(op), workload(request(op, "window_right", torch.float32)).proof
    assert spec.space is not None
    for name in spec.space.parameters:
        answer(
            work, spec, spec.space.config({**dict.fromkeys(spec.space.parameters, 0), name: value})
        )
        assert work.wrong() is None, name
    answer(work, spec, spec.space.config(dict.fromkeys(spec.space.parameters, value)))
    assert work.wrong() is None


@pytest.mark.usefixtures("cpu")
@pytest.mark.parametrize(
    ("tiles", "text"),
    [({"block_m": -1, "block_n": 0, "wave_bytes": 0}, "not be negative"), ({"x": 1}, "3 entries")],
)
def test_a_list_that_is_no_config_is_refused(tiles: dict[str, Any], text: str) -> None:
    spec, work = cpu_spec("flash_fwd"), workload(request("flash_fwd", "", torch.float32)).proof
    with pytest.raises(RuntimeError, match=text):
        work.run(spec.resolve(Config(tiles)))


@pytest.mark.usefixtures("cpu")
def test_number_of_splits_beats_the_tuned_length() -> None:
    q, k = torch.randn(1, 1, 4, 16), torch.randn(1, 3000, 2, 16)
    launch = cpu_spec("flash_decode")
    results = []
    for split in (0, 512):
        bound = launch.resolve(Config({"split_keys": split, "chunk_keys": 0}))
        out, lse = torch.empty(1, 1, 4, 16), torch.empty(1, 4, 1)
        p = workload(request("flash_decode", "", torch.float32)).p
        bound(q, k, k, p._replace(softmax_scale=0.25), out, lse, 3)
        results.append(out)
    assert same_bits(*results)


@pytest.mark.parametrize("op", OPS)
def test_usual_problems_are_served(op: str) -> None:
    found = problems(op)
    assert len({(r.dtype, r.sizes) for r in found}) == len(found) > 1
    assert all(cpu_spec(op).reasons(replace(r, device="cpu", arch="")) == () for r in found)


@pytest.mark.usefixtures("cpu", "cache")
def test_tuning_run_end_to_end() -> None:
    """A real run on small problems: outcomes are written, used and shown; answers stay right."""
    shapes = [((1, 96, 2, 16),) * 3]
    report = attnforge.tune(attnforge.flash_attention, shapes, budget=60.0, causal=True)
    assert [o.spec for o in report.outcomes] == ["cpu.flash.fwd", "cpu.flash.bwd"]
    assert {o.status for o in report.outcomes} <= {"tuned", "default"}
    assert all(o.tried > 10 and o.wrong == () for o in report.outcomes)
    text = str(attnforge.explain(attnforge.flash_attention, *shapes[0], causal=True))
    assert text.count("(tuned: user cache, bucket seqlen_q=128") == 2
    q = torch.randn(1, 96, 2, 16, dtype=torch.float64, requires_grad=True)
    x = q.detach().float().requires_grad_()
    for t in (q, x):
        attnforge.flash_attention(t, t, t, causal=True).square().sum().backward()
    torch.testing.assert_close(x.grad.double(), q.grad, rtol=1e-5, atol=1e-5)
    again = attnforge.tune(attnforge.flash_attention, shapes, budget=60.0, causal=True)
    assert {o.status for o in again.outcomes} == {"kept"}
