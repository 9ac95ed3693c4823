"""Builds what a release uploads, and says what is in it: `make wheel`.

    python tools/wheel.py                # dist/*.whl and dist/*.tar.gz, of what can be built here
    python tools/wheel.py --release      # an error unless all CPU levels and CUDA are in it
    python tools/wheel.py --python python3.12 --python python3.13    # wheels for these, too
    python tools/wheel.py --check FILE   # only says what is in a wheel that exists

auditwheel gives the manylinux tag by the symbols that the libraries want, and would copy foreign
libraries into the wheel: torch's is the one that stays outside. Objects are kept in build/, so
that a repeated build is short; timestamps are those of the commit.

Only `attnforge._host`, the pybind11 module, is for one Python. A wheel for another one has the
same libraries and that file built anew, for which the other Python's headers are enough.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LIMIT = 60_000_000  # bytes; PyPI takes 100 MB per file, and a download should not hurt
OUTSIDE = "libtorch_cpu.so"  # comes with torch, of whatever version: the ABI is the stable one
CPU, CUDA = "libattnforge_cpu.so", "libattnforge_cuda.so"


@dataclass(frozen=True)
class Report:
    """What a wheel holds: its tags, stored bytes by library, and what the build recorded."""

    name: str
    bytes: int
    tags: tuple[str, ...]
    libraries: dict[str, int]
    foreign: tuple[str, ...]
    levels: tuple[str, ...]
    cuda: str


def inspect(wheel: Path) -> Report:
    with zipfile.ZipFile(wheel) as archive:
        entries = archive.infolist()
        (meta,) = [e.filename for e in entries if e.filename.endswith(".dist-info/WHEEL")]
        tags = re.findall(r"^Tag: (.+)$", archive.read(meta).decode(), re.MULTILINE)
        info = json.loads(archive.read("attnforge/_build_info.json"))
    shared = [e for e in entries if re.search(r"\.so(\.[\d.]+)?$", e.filename)]
    return Report(
        name=wheel.name,
        bytes=wheel.stat().st_size,
        tags=tuple(tag.strip() for tag in tags),
        libraries={Path(e.filename).name: e.compress_size for e in shared},
        foreign=tuple(e.filename for e in shared if not e.filename.startswith("attnforge/")),
        levels=tuple(info.get("isa_levels", ())),
        cuda=str(info.get("cuda", "left out")),
    )


def default_archs() -> list[str]:
    text = (ROOT / "CMakeLists.txt").read_text()
    match = re.search(r'set\(ATTNFORGE_CUDA_ARCHS "([^"]+)"', text)
    assert match is not None
    return match[1].split(";")


def complaints(report: Report, *, release: bool) -> list[str]:
    """Why this wheel must not be uploaded; `release` asks for all that a release has."""
    found = []
    if not report.tags or not all("-manylinux_" in tag for tag in report.tags):
        found.append(f"tags {', '.join(report.tags)}: not manylinux, no index takes it")
    if report.bytes > LIMIT:
        found.append(f"{report.bytes / 1e6:.1f} MB, more than {LIMIT / 1e6:.0f}")
    if report.foreign:
        found.append(f"carries libraries of others: {', '.join(report.foreign)}")
    if CPU not in report.libraries:
        found.append(f"no {CPU}")
    if release:
        if CUDA not in report.libraries:
            found.append(f"no {CUDA} ({report.cuda})")
        elif missing := set(default_archs()) - set(report.cuda.split()):
            found.append(f"CUDA kernels lack {', '.join(sorted(missing))} ({report.cuda})")
        if missing := {"baseline", "avx2", "avx512"} - set(report.levels):
            found.append(f"CPU kernels lack {', '.join(sorted(missing))}")
    return found


def describe(report: Report) -> str:
    lines = [f"{report.name}: {report.bytes / 1e6:.1f} MB of {LIMIT / 1e6:.0f}"]
    lines += [f"  {name}: {size / 1e6:.1f} MB" for name, size in sorted(report.libraries.items())]
    lines += [f"  CPU levels: {' '.join(report.levels)}", f"  CUDA: {report.cuda}"]
    return "\n".join(lines)


def tool(*command: str | Path) -> str:
    """What a command prints; its failure ends this program."""
    # Programs of an environment that is not activated lie beside its interpreter.
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    env = {**os.environ, "PATH": path}
    words = [str(word) for word in command]
    try:
        done = subprocess.run(words, env=env, capture_output=True, text=True)
    except OSError as error:
        raise SystemExit(f"wheel: {words[0]}: {error.strerror}") from None
    if done.returncode:
        raise SystemExit(
            f"wheel: exit {done.returncode}: {' '.join(words)}\n{done.stdout}{done.stderr}"
        )
    return done.stdout.strip()


def repair(wheel: Path, out: Path) -> Path:
    """The wheel under its manylinux tag, stripped, in `out`."""
    out.mkdir(parents=True, exist_ok=True)
    before = set(out.glob("*.whl"))
    options = ("--strip", "--exclude", OUTSIDE, "-w", out)
    tool(sys.executable, "-m", "auditwheel", "repair", *options, wheel)
    (made,) = set(out.glob("*.whl")) - before
    return made


def host_module(python: str, version: str, work: Path) -> Path:
    """`_host` for an interpreter of which nothing but its headers is needed."""
    ask = "import importlib.util as u; print(u.find_spec('torch').submodule_search_locations[0])"
    options = {
        "CMAKE_BUILD_TYPE": "Release",
        "Python_EXECUTABLE": python,
        "pybind11_DIR": tool(sys.executable, "-m", "pybind11", "--cmakedir"),
        "ATTNFORGE_TORCH_DIR": tool(sys.executable, "-c", ask),
        "ATTNFORGE_VERSION": version,
        "ATTNFORGE_OUTPUT_DIR": work / "out",
    }
    given = shlex.split(os.environ.get("CMAKE_ARGS", ""))  # before ours: the last one counts
    tool("cmake", "-S", ROOT, "-B", work, "-G", "Ninja", *given, "-DATTNFORGE_CUDA=off",
         *(f"-D{name}={value}" for name, value in options.items()))  # fmt: skip
    tool("cmake", "--build", work, "--target", "attnforge_host")
    (module,) = (work / "out").glob("_host.*.so")
    return module


def tag_of(python: str) -> str:
    return "cp{}{}".format(*tool(python, "-c", "import sys; print(*sys.version_info[:2])").split())


def for_python(raw: Path, python: str, out: Path) -> Path:
    """The wheel that was built for this interpreter, before its repair, for another one."""
    tag = tag_of(python)
    _, version, old, *_ = raw.stem.split("-")
    with tempfile.TemporaryDirectory() as folder:
        tool(sys.executable, "-m", "wheel", "unpack", raw, "-d", folder)
        (root,) = Path(folder).iterdir()
        (module,) = root.glob("attnforge/_host.*.so")
        module.unlink()
        shutil.copy2(host_module(python, version, ROOT / "build" / f"host-{tag}"), module.parent)
        (meta,) = root.glob("*.dist-info/WHEEL")
        meta.write_text(meta.read_text().replace(f"{old}-{old}-", f"{tag}-{tag}-"))
        tool(sys.executable, "-m", "wheel", "pack", root, "-d", out)
    return out / raw.name.replace(f"{old}-{old}-", f"{tag}-{tag}-")


def build(out: Path, pythons: Sequence[str] = ()) -> list[Path]:
    """sdist and wheels of this tree; returns the repaired wheels, this interpreter's first."""
    for python in pythons:  # before a build that takes long
        if tag_of(python) == tag_of(sys.executable):
            raise SystemExit(f"wheel: --python {python}: that is the Python which builds")
    work = ROOT / "build" / "wheel"
    for stale in (work, *(ROOT / "build").glob("lib*")):
        shutil.rmtree(stale, ignore_errors=True)  # a module that is gone must not travel
    for cache in (ROOT / "build").glob("temp*/CMakeCache.txt"):
        cache.unlink()  # nor options of an earlier build, such as fewer architectures
    commit = ["git", "log", "-1", "--format=%ct"]
    date = subprocess.run(commit, cwd=ROOT, capture_output=True, text=True).stdout.strip()
    env = {**os.environ, **({"SOURCE_DATE_EPOCH": date} if date else {})}
    for kind, where in (("--sdist", out), ("--wheel", work)):
        command = [sys.executable, "-m", "build", "--no-isolation", kind, "-o", str(where)]
        code = subprocess.run(command, cwd=ROOT, env=env).returncode
        if code:
            raise SystemExit(f"wheel: exit {code}: {' '.join(command)}")
    (raw,) = work.glob("*.whl")
    for old in out.glob("*.whl"):
        old.unlink()
    return [repair(each, out) for each in (raw, *(for_python(raw, p, work) for p in pythons))]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Build and check attnforge's wheel.")
    parser.add_argument("--out", type=Path, default=ROOT / "dist")
    parser.add_argument("--release", action="store_true", help="ask for all that a release has")
    parser.add_argument("--check", type=Path, metavar="FILE", help="a wheel that exists")
    parser.add_argument(
        "--python", action="append", default=[], help="another interpreter to make a wheel for"
    )
    options = parser.parse_args(argv)
    built = [options.check] if options.check else build(options.out.absolute(), options.python)
    found = []
    for report in map(inspect, built):
        print(describe(report))
        found += [f"{report.name}: {c}" for c in complaints(report, release=options.release)]
    for complaint in found:
        print(f"wheel: {complaint}", file=sys.stderr)
    return 1 if found else 0


if __name__ == "__main__":
    raise SystemExit(main())
