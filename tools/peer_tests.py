"""Runs another project's own tests against attnforge.compat, on the CPU.

    python tools/peer_tests.py ~/flash-attention --project flash_attn
    python tools/peer_tests.py ~/flash-linear-attention --project fla --most 2 -k "gla or kda"

PATH is a checkout that you have; nothing of it is changed, and nothing is kept here. pytest
collects its test files as they are. What they import of their project is attnforge.compat, except
for plain PyTorch references (``naive*`` and helpers), which come from the checkout; the device
"cuda" is the CPU. Of each test's matrix a few points are drawn, the same at each run. Prints what
became of every point, by reason; "refused" is an error of attnforge that names the argument.
Needs pytest and einops, fla also triton. Exit status 1 if something fails, or nothing runs.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.machinery
import importlib.util
import itertools
import random
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode

Values = dict[str, Any]


def cuda_as_cpu(x: Any) -> Any:
    if isinstance(x, str) and x.startswith("cuda"):
        return "cpu"
    if isinstance(x, torch.device) and x.type == "cuda":
        return torch.device("cpu")
    return x


class OnTheCpu(TorchFunctionMode):
    """torch calls with a CUDA device get the CPU."""

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Values | None = None
    ) -> Any:
        named = {n: cuda_as_cpu(x) for n, x in (kwargs or {}).items()}
        return func(*(cuda_as_cpu(x) for x in args), **named)


def pretend_cuda() -> None:
    """What test files ask of torch.cuda when they are imported, or around a call."""
    torch.cuda.get_device_capability = lambda *_: (9, 0)
    for name in ("synchronize", "empty_cache", "manual_seed_all"):
        setattr(torch.cuda, name, lambda *_: None)


class Peer(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Modules named like the project's: attnforge's functions, the checkout's references."""

    def __init__(self, project: str, root: Path) -> None:
        self.project, self.package = project, root / project
        self.ours = importlib.import_module(f"attnforge.compat.{project}")

    def from_checkout(self, parts: list[str]) -> bool:
        """Whether a module is taken as it is."""
        helpers = (["fla", "utils"], ["fla", "ops", "utils"], ["fla", "ops", "backends"])
        return parts[:2] in helpers or parts[:3] in helpers or parts[1:][-1:] == ["naive"]

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        parts = name.split(".")
        if parts[0] != self.project or self.from_checkout(parts):
            return None
        return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def exec_module(self, module: ModuleType) -> None:
        name = module.__name__
        inside = self.package.joinpath(*name.split(".")[1:])
        module.__path__ = [str(inside)]
        module.__getattr__ = lambda attribute: self.attribute(name, attribute)  # type: ignore

    def attribute(self, module: str, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        ours = self.ours
        with suppress(ModuleNotFoundError):  # a module of the same name, such as bert_padding
            ours = importlib.import_module(f"attnforge.compat.{module}")
        if hasattr(ours, name):
            return getattr(ours, name)
        helper = HELPERS.get(f"{module}.{name}")
        if helper is not None:
            return helper(self)
        if name.startswith("naive"):
            return getattr(self.reference(module), name)
        return Absent(f"{module}.{name}")

    def reference(self, module: str) -> ModuleType:
        """The file of the checkout in which a package or module keeps its plain references."""
        inside = self.package.joinpath(*module.split(".")[1:])
        path = inside / "naive.py" if inside.is_dir() else inside.with_suffix(".py")
        return load(path)


def load(path: Path) -> ModuleType:
    name = "_peer_" + "_".join(path.with_suffix("").parts[-3:])
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None
        assert spec.loader is not None
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


class Absent:
    """A name that compat does not have: the test that uses it is skipped."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __call__(self, *_: Any, **__: Any) -> Any:
        pytest.skip(f"uses {self.name}, which compat does not have")

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self


def rotary(peer: Peer) -> Callable[..., torch.Tensor]:
    """flash_attn.layers.rotary.apply_rotary_emb by the checkout's plain form of it."""
    plain = load(peer.package / "layers" / "rotary.py").apply_rotary_emb_torch

    def apply(x: Any, cos: Any, sin: Any, interleaved: Any = False, seqlen_offsets: Any = 0) -> Any:
        first = torch.as_tensor(seqlen_offsets).long().reshape(-1, 1)
        rows = first + torch.arange(x.shape[1])
        return plain(x, cos[rows], sin[rows], interleaved)

    return apply


HELPERS: dict[str, Callable[[Peer], Any]] = {
    "flash_attn.flash_attn_interface.USE_TRITON_ROCM": lambda _: False,
    "flash_attn.layers.rotary.apply_rotary_emb": rotary,
}


@dataclass
class Project:
    """Which files run, and which points of a test's matrix do not: reason -> predicate."""

    files: tuple[str, ...]
    left_out: dict[str, Callable[[str, Values], bool]]


def longest(values: Values) -> int:
    """The largest sequence length among a point's values."""
    sizes = [0]
    for name, value in values.items():
        if name in ("T", "seqlen") or name.startswith("seqlen_"):
            sizes.append(value if isinstance(value, int) else 0)
        if name == "cu_seqlens" and isinstance(value, list):
            sizes.append(value[-1])
    return max(sizes)


PROJECTS = {
    "flash_attn": Project(
        ("tests/test_flash_attn.py",),
        {
            "reads the dropout pattern from the returned weights": lambda _, v: (
                v.get("dropout_p", 0.0) > 0.0
            ),
            "repeats one call 250 times to find races on a GPU": lambda test, _: (
                test == "test_flash_attn_race_condition"
            ),
        },
    ),
    "fla": Project(
        tuple(
            f"tests/ops/test_{name}.py"
            for name in (
                *("attn", "attn_sink", "delta", "forgetting_attn", "gdn", "gla", "gsa", "hgrn"),
                *("kda", "lightning_attn", "linear_attn", "retention", "simple_gla"),
            )
        ),
        {
            "wants an error on a size of tiles, which changes nothing here": lambda test, _: (
                test == "test_chunk_invalid_chunk_size"
            ),
        },
    ),
}


@dataclass
class Tally:
    """A pytest plugin: draws points, runs them on the CPU, counts what became of them."""

    project: Project
    most: int
    limit: int
    counts: Counter[tuple[str, str]] = field(default_factory=Counter)
    per_test: dict[str, Counter[str]] = field(default_factory=dict)

    def pytest_generate_tests(self, metafunc: Any) -> None:
        marks = [m for m in metafunc.definition.own_markers if m.name == "parametrize"]
        own = metafunc.definition.own_markers
        own[:] = [m for m in own if m.name != "parametrize"]
        name = metafunc.function.__name__
        points = list(self.points(marks))
        wanted = []
        for point in points:
            reason = self.reason(name, point)
            if reason is None or not marks:
                wanted.append(point)
            else:
                self.counts["left out", reason] += 1
        drawn = random.Random(name).sample(wanted, min(self.most, len(wanted)))
        self.counts["not drawn", f"more than {self.most} of a test"] += len(wanted) - len(drawn)
        if marks:
            names = list(points[0]) if points else []
            ids = ["-".join(str(point[n]) for n in names) for point in drawn]
            values = [[point[n] for n in names] for point in drawn]
            metafunc.parametrize(names, values, ids=ids)

    @staticmethod
    def points(marks: Sequence[Any]) -> Any:
        """Every point of the matrix that the marks span."""
        axes = []
        for mark in marks:
            names, given = mark.args[:2]
            names = [n.strip() for n in names.split(",")] if isinstance(names, str) else names
            axis = []
            for value in given:
                values = getattr(value, "values", None) if hasattr(value, "marks") else None
                if values is None:
                    values = value if len(names) > 1 else (value,)
                axis.append(dict(zip(names, values, strict=True)))
            axes.append(axis)
        for parts in itertools.product(*axes):
            yield {n: x for part in parts for n, x in part.items()}

    def reason(self, test: str, point: Values) -> str | None:
        if longest(point) > self.limit:
            return f"sequences of more than {self.limit}"
        for reason, predicate in self.project.left_out.items():
            if predicate(test, point):
                return reason
        return None

    def pytest_collection_modifyitems(self, items: list[Any]) -> None:
        """Drop tests without a matrix that are left out."""
        for item in [x for x in items if not hasattr(x, "callspec")]:
            if (reason := self.reason(item.originalname, {})) is not None:
                self.counts["left out", reason] += 1
                items.remove(item)

    @pytest.hookimpl(hookwrapper=True)
    def pytest_runtest_call(self, item: Any) -> Any:
        with OnTheCpu():
            yield

    @pytest.hookimpl(hookwrapper=True)
    def pytest_runtest_makereport(self, item: Any, call: Any) -> Any:
        report = (yield).get_result()
        if report.when == "call" or (report.when == "setup" and not report.passed):
            kind, reason = report.outcome, ""
            error = call.excinfo.value if call.excinfo is not None else None
            if report.skipped:
                reason = str(getattr(error, "msg", report.longrepr[-1]))
            elif report.failed:
                text = str(error).strip().splitlines()
                reason = f"{type(error).__name__}: {text[0] if text else ''}"[:120]
                if str(error).startswith("attnforge."):
                    kind, reason = "refused", str(error).split(";")[0]
            if "empty parameter set" in reason:  # no point was left
                return
            self.counts[kind, reason] += 1
            name = f"{Path(item.location[0]).stem}::{item.originalname}"
            self.per_test.setdefault(name, Counter())[kind] += 1

    def show(self) -> None:
        for name, counts in self.per_test.items():
            print(f"  {name:62}", ", ".join(f"{n} {kind}" for kind, n in counts.items()))
        print()
        for (kind, reason), n in sorted(self.counts.items()):
            if n:
                print(f"{n:7} {kind}{': ' if reason else ''}{reason}")


def commit(root: Path) -> str:
    command = ["git", "-C", str(root), "rev-parse", "HEAD"]
    done = subprocess.run(command, capture_output=True, text=True)
    return done.stdout.strip() or "not a git checkout"


def main() -> int:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("path", type=Path, help="a checkout of the project")
    parser.add_argument("--project", choices=PROJECTS, required=True)
    parser.add_argument("--most", type=int, default=4, help="points of each test (default 4)")
    parser.add_argument("--limit", type=int, default=512, help="longest sequence (default 512)")
    parser.add_argument("-k", default="", help="pytest's expression of the tests to run")
    options = parser.parse_args()
    root = options.path.resolve()
    if not (root / options.project).is_dir():
        parser.error(f"{root} has no folder {options.project}: want a checkout of the project")
    project = PROJECTS[options.project]
    files = [str(root / name) for name in project.files]
    if missing := [name for name in files if not Path(name).is_file()]:
        parser.error(f"no such test file: {', '.join(missing)}")
    pretend_cuda()
    sys.meta_path.insert(0, Peer(options.project, root))
    tally = Tally(project, options.most, options.limit)
    arguments = [
        *("-q", "--tb=short", "--noconftest", "-p", "no:cacheprovider", "--import-mode=importlib"),
        *("-p", "no:xdist", "-c", "/dev/null", "--rootdir", str(root), "-k", options.k, *files),
    ]
    pytest.main(arguments, plugins=[tally])
    print(f"\n{options.project}, {commit(root)}")
    tally.show()
    return int(any(kind in ("failed", "error") for kind, _ in tally.counts) or not tally.per_test)


if __name__ == "__main__":
    raise SystemExit(main())
