"""Runs the project's checks as named stages and prints a counted list of them.

    python tools/stages.py                 # every stage (what `make test` runs)
    python tools/stages.py lint packaging  # some of them
    python tools/stages.py --all           # also tests marked `exhaustive` (`make test-all`)

A command stage counts its commands; a pytest stage counts its tests, from the JUnit report, so that
a crash of the whole process can never read as a pass. Standard library only.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
REPORTS = ROOT / "build" / "reports"
BIN = Path(sys.executable).parent
JOBS = os.environ.get("JOBS", "2")


@dataclass(frozen=True)
class Stage:
    """One pytest run over ``paths`` with extra environment variables, and commands after it."""

    name: str
    commands: tuple[tuple[str, ...], ...] = ()
    paths: tuple[str, ...] = ()
    pytest_args: tuple[str, ...] = ()
    env: tuple[tuple[str, str], ...] = ()


@dataclass
class Count:
    passed: int = 0
    failed: int = 0
    skipped: int = 0
    seconds: float = 0.0
    notes: list[str] = field(default_factory=list)


def native_sources() -> tuple[str, ...]:
    files = (ROOT / "csrc").rglob("*")
    suffixes = (".h", ".cpp", ".cu")
    return tuple(str(f.relative_to(ROOT)) for f in sorted(files) if f.suffix in suffixes)


def existing(*paths: str) -> tuple[str, ...]:
    return tuple(path for path in paths if (ROOT / path).exists())


def stages() -> list[Stage]:
    code = existing("python", "tests", "tools", "bench", "examples", "triton_kernels", "setup.py")
    isolated = ("tests/packaging", "tests/native", "tests/triton", "tests/cuda")
    suites = tuple(
        str(path.relative_to(ROOT))
        for path in sorted((ROOT / "tests").iterdir())
        if str(path.relative_to(ROOT)) not in isolated
        and (path.name.startswith("test_") or (path.is_dir() and any(path.rglob("test_*.py"))))
    )
    return [
        Stage(
            "lint",
            commands=(
                ("ruff", "check", *code),
                ("ruff", "format", "--check", *code),
                ("mypy",),
                ("mypy", "tools", "bench"),
                ("clang-format", "--dry-run", "-Werror", *native_sources()),
            ),
        ),
        Stage(
            "native build", commands=((sys.executable, "setup.py", "-q", "build_ext", "--inplace"),)
        ),
        Stage(
            "repository rules",
            paths=("tests/packaging/test_import_rules.py", "tests/packaging/test_repository.py"),
        ),
        Stage("object code", paths=("tests/native",)),
        Stage("suite", paths=suites, pytest_args=("-n", JOBS, "--dist", "worksteal")),
        # Triton looks at TRITON_INTERPRET when it is imported: values and compilation apart.
        Stage(
            "triton interpreter",
            paths=("tests/triton",),
            pytest_args=("-n", JOBS, "--dist", "worksteal"),
            env=(("TRITON_INTERPRET", "1"),),
        ),
        Stage(
            "triton compile",
            paths=("tests/triton",),
            pytest_args=("-n", JOBS, "--dist", "worksteal"),
            env=(("TRITON_INTERPRET", "0"),),
        ),
        # CUDA kernels on the host, and through nvcc and ptxas where those are installed.
        Stage(
            "cuda emulator",
            paths=("tests/cuda",),
            pytest_args=("-n", JOBS, "--dist", "worksteal"),
            commands=((sys.executable, "tools/cuda_budgets.py", "--launches"),),
        ),
        Stage(
            "packaging",
            paths=("tests/packaging",),
            pytest_args=(
                "--ignore=tests/packaging/test_import_rules.py",
                "--ignore=tests/packaging/test_repository.py",
            ),
        ),
    ]


def run_commands(stage: Stage, count: Count) -> None:
    for command in stage.commands:
        program = command[0] if "/" in command[0] else str(BIN / command[0])
        code = subprocess.run(
            [program, *command[1:]], cwd=ROOT, stdin=subprocess.DEVNULL
        ).returncode
        if code == 0:
            count.passed += 1
        else:
            count.failed += 1
            count.notes.append(f"{' '.join(command[:3])}: exit {code}")


def run_pytest(stage: Stage, count: Count, exhaustive: bool = False) -> None:
    report = REPORTS / f"{stage.name.replace(' ', '_')}.xml"
    report.unlink(missing_ok=True)
    command = [sys.executable, "-m", "pytest", "-q", f"--junitxml={report}", *stage.pytest_args]
    command += [] if exhaustive else ["-m", "not exhaustive"]
    code = subprocess.run(
        [*command, *stage.paths],
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        env={**os.environ, **dict(stage.env)},
    ).returncode
    if report.is_file():
        for suite in ElementTree.parse(report).getroot().iter("testsuite"):
            failed = int(suite.get("failures", 0)) + int(suite.get("errors", 0))
            skipped = int(suite.get("skipped", 0))
            count.failed += failed
            count.skipped += skipped
            count.passed += int(suite.get("tests", 0)) - failed - skipped
    if code and not count.failed:
        count.failed += 1
        count.notes.append(f"pytest: exit {code}")
    if not count.passed and not count.failed:
        count.failed += 1
        count.notes.append("no test ran")


def run(stage: Stage, exhaustive: bool = False) -> Count:
    print(f"\n=== {stage.name} ===", flush=True)
    count = Count()
    start = time.perf_counter()
    if stage.paths:
        run_pytest(stage, count, exhaustive)
    run_commands(stage, count)
    count.seconds = time.perf_counter() - start
    return count


def main(arguments: list[str]) -> int:
    exhaustive = "--all" in arguments
    names = [name for name in arguments if name != "--all"]
    REPORTS.mkdir(parents=True, exist_ok=True)
    chosen = [stage for stage in stages() if not names or stage.name in names]
    if unknown := set(names) - {stage.name for stage in chosen}:
        known = ", ".join(repr(stage.name) for stage in stages())
        raise SystemExit(f"stages: unknown stage {sorted(unknown)}; known: {known}")
    counts = [(stage.name, run(stage, exhaustive)) for stage in chosen]
    print("\n=== stages ===")
    for name, count in counts:
        result = "FAIL" if count.failed else "ok"
        print(
            f"{name:<18} {result:<5} {count.passed:>6} passed {count.failed:>4} failed "
            f"{count.skipped:>4} skipped {count.seconds:>7.1f} s"
        )
        for note in count.notes:
            print(f"{'':<18} {note}")
    passed = sum(count.passed for _, count in counts)
    failed = sum(count.failed for _, count in counts)
    skipped = sum(count.skipped for _, count in counts)
    print(f"{passed} passed, {failed} failed, {skipped} skipped", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
