"""Drives CMakeLists.txt from setuptools. Metadata stands in pyproject.toml.

    python setup.py build_ext --inplace     # incremental developer build (make native)

Without a C++ compiler, cmake, ninja or torch's headers the pure-Python part still installs: the
reason goes to stderr and into ``attnforge/_build_info.json``, which ``attnforge doctor`` shows.
A compiler that is there and fails is an error: a broken build must not look like a missing one.
"""

from __future__ import annotations

import fcntl
import importlib.util
import json
import os
import shlex
import shutil
import site
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Command, Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent


def find_tool(name: str) -> str | None:
    """Path of a build tool on PATH or beside the running interpreter (a venv not activated)."""
    beside = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    return shutil.which(name, path=beside)


def find_compiler() -> str | None:
    if "CXX" in os.environ:
        words = shlex.split(os.environ["CXX"])
        return os.environ["CXX"] if words and shutil.which(words[-1]) else None
    return next(
        (found for name in ("c++", "g++", "clang++") if (found := shutil.which(name))), None
    )


def find_torch() -> Path | None:
    """Directory of the installed torch package, also from within an isolated build environment.

    Isolation hides the environment's site-packages from ``sys.path``, but not from ``sysconfig``;
    torch is not a build requirement, because pip would then download a second, perhaps CUDA, torch.
    """
    spec = importlib.util.find_spec("torch")
    if spec is not None and spec.submodule_search_locations:
        return Path(spec.submodule_search_locations[0])
    places = [sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]
    places += site.getsitepackages([sys.prefix, sys.base_prefix])
    for place in places:
        if (Path(place) / "torch" / "include" / "torch" / "csrc" / "stable").is_dir():
            return Path(place) / "torch"
    return None


def missing_for_native() -> str | None:
    """One sentence on what the native build lacks, or None."""
    if find_compiler() is None:
        return f"no C++ compiler (CXX={os.environ.get('CXX', '')!r}; install g++ or clang++)"
    for tool in ("cmake", "ninja"):
        if find_tool(tool) is None:
            return f"no {tool} (pip install {tool})"
    torch = find_torch()
    if torch is None:
        return "no installed torch to take the headers from (pip install torch first)"
    if not (torch / "include" / "torch" / "csrc" / "stable" / "library.h").is_file():
        return f"the torch in {torch} has no stable ABI headers (torch >= 2.10 is needed)"
    return None


def package_dir(command: Command, in_source: bool) -> Path:
    """Where attnforge's files go: the source tree (editable, in place) or the build tree."""
    return (
        ROOT / "python" / "attnforge"
        if in_source
        else Path(command.build_lib, "attnforge").resolve()
    )


def write_pure_build(target: Path, reason: str) -> None:
    sys.stderr.write(
        f"\nattnforge: native CPU kernels are NOT built: {reason}.\n"
        "attnforge: installing the pure-Python part; operators run on the reference backend.\n\n"
    )
    target.mkdir(parents=True, exist_ok=True)
    info = {"native": False, "reason": reason}
    (target / "_build_info.json").write_text(json.dumps(info, indent=2) + "\n")


def copy_headers(target: Path) -> None:
    """The headers of the CUDA kernels, from which the jit backend compiles at run time."""
    for root in (ROOT / "csrc", ROOT / "csrc" / "include"):
        for folder in ("cuda", "attnforge"):
            for path in (root / folder).rglob("*.h"):
                to = target / "include" / path.relative_to(root)
                to.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, to)


class BuildPy(build_py):
    """Adds the headers of kernels, and records why there is no native part, where there is none."""

    def run(self) -> None:
        super().run()
        if not self.editable_mode:  # there csrc/ itself is found
            copy_headers(package_dir(self, False))
        if MISSING is not None:
            write_pure_build(package_dir(self, self.editable_mode), MISSING)


class BuildNative(build_ext):
    """cmake once, then ninja, straight into the package directory."""

    def run(self) -> None:
        in_source = bool(self.inplace or self.editable_mode)
        target = package_dir(self, in_source)
        # As deep as the in-place one: relative paths, which ccache compares, are then the same.
        build_dir = ROOT / "build" / "native" if in_source else Path(self.build_temp).resolve()
        build_dir.mkdir(parents=True, exist_ok=True)
        with (build_dir / ".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # two ninjas in one directory corrupt each other
            self.build(build_dir, target)

    def build(self, build_dir: Path, target: Path) -> None:
        try:
            self.configure(build_dir, target)
        except subprocess.CalledProcessError as error:
            if self.inplace and not self.editable_mode:
                raise SystemExit(error.returncode) from None
            write_pure_build(target, "cmake could not configure the native build (see its output)")
            return
        jobs = os.environ.get("CMAKE_BUILD_PARALLEL_LEVEL") or str(os.cpu_count() or 1)
        result = subprocess.run([str(find_tool("ninja")), "-C", str(build_dir), "-j", jobs])
        if result.returncode:
            raise SystemExit(f"attnforge: the native build failed in {build_dir}")

    def configure(self, build_dir: Path, target: Path) -> None:
        options = {
            "CMAKE_MAKE_PROGRAM": find_tool("ninja"),
            "CMAKE_BUILD_TYPE": "Debug" if self.debug else "Release",
            "Python_EXECUTABLE": sys.executable,
            "ATTNFORGE_OUTPUT_DIR": target,
            "ATTNFORGE_TORCH_DIR": find_torch(),
            "ATTNFORGE_VERSION": self.distribution.get_version(),
        }
        if self.inplace or self.editable_mode:  # each kernel once, and PTX: a third of the time
            options["ATTNFORGE_CUDA_ARCHS"] = "80;90a"
        command = [str(find_tool("cmake")), "-S", str(ROOT), "-B", str(build_dir), "-G", "Ninja"]
        command += [f"-D{name}={value}" for name, value in options.items()]
        command += shlex.split(os.environ.get("CMAKE_ARGS", ""))
        subprocess.run(command, check=True)

    def get_outputs(self) -> list[str]:
        return []

    def get_output_mapping(self) -> dict[str, str]:
        return {}


MISSING = missing_for_native()

setup(
    packages=[
        *find_packages("python"),
        "attnforge.triton_kernels",
        *(f"attnforge.triton_kernels.{name}" for name in find_packages("triton_kernels")),
    ],
    # One placeholder: it makes the wheel a platform wheel; CMake decides what is really built.
    ext_modules=[Extension("attnforge._host", sources=[])] if MISSING is None else [],
    cmdclass={"build_py": BuildPy, "build_ext": BuildNative},
)
