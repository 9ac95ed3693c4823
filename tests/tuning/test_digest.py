"""What a result of tuning holds for: a kernel's own source and headers, and no others."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = """
include("{root}/csrc/cpu/digests.cmake")
foreach(name IN ITEMS a b)
  attnforge_digest("{tree}/cpu/family/${{name}}.cpp" "{tree}" "{flags}" digest)
  message(STATUS "${{digest}}")
endforeach()
"""
# a reaches near, far and params; b reaches far. Both name the table, which reaches other.
TREE = {
    "cpu/family/a.cpp": '#include "cpu/family/near.h"\n#include "cpu/kernels.h"\n',
    "cpu/family/b.cpp": ' #  include "cpu/far.h" // it\n#include "cpu/kernels.h"\n#include <map>\n',
    "cpu/family/near.h": '#pragma once\n#include "cpu/far.h"\n#include "params.h"\n',
    "cpu/far.h": '#include "cpu/family/near.h"\n',
    "cpu/kernels.h": '#include "attnforge/other.h"\n',
    "cpu/family/params.h": "",
    "cpu/unused.h": "",
    "include/attnforge/other.h": "",
}


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    if shutil.which("cmake") is None:
        pytest.skip("digests are taken by cmake, which is not there")
    for name, text in TREE.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    (tmp_path / "cpu/far.h").write_text("")
    return tmp_path


def digests(tree: Path, flags: str = "-O3") -> list[str]:
    script = tree / "run.cmake"
    script.write_text(SCRIPT.format(root=ROOT, tree=tree, flags=flags))
    done = subprocess.run(["cmake", "-P", str(script)], capture_output=True, text=True, check=True)
    found = [line.removeprefix("-- ") for line in done.stdout.splitlines()]
    assert [len(x) for x in found] == [16, 16], done
    return found


@pytest.mark.parametrize(
    ("edited", "of_a", "of_b"),
    [
        ("cpu/family/a.cpp", True, False),
        ("cpu/family/near.h", True, False),
        ("cpu/family/params.h", True, False),
        ("cpu/far.h", True, True),
        ("cpu/kernels.h", False, False),
        ("include/attnforge/other.h", False, False),
        ("cpu/unused.h", False, False),
    ],
)
def test_an_edit_changes_what_is_made_of_it(
    tree: Path, edited: str, of_a: bool, of_b: bool
) -> None:
    before = digests(tree)
    with (tree / edited).open("a") as file:
        file.write("// edited\n")
    assert [x != y for x, y in zip(before, digests(tree), strict=True)] == [of_a, of_b]


def test_flags_count_and_circles_end(tree: Path) -> None:
    before = digests(tree)
    assert before == digests(tree)
    assert all(x != y for x, y in zip(before, digests(tree, "-O2"), strict=True))
    (tree / "cpu/far.h").write_text(TREE["cpu/far.h"])
    digests(tree)


def test_headers_are_those_of_the_compiler(tree: Path) -> None:
    """The scanner and ``c++ -MM`` agree about every kernel, but for the table of kernels."""
    compiler = shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        pytest.skip("no compiler to compare with")
    sources, script = ROOT / "csrc", tree / "run.cmake"
    kernels = sorted(sources.glob("cpu/*/*.cpp"))
    script.write_text(
        f'include("{sources}/cpu/digests.cmake")\n'
        + "".join(
            f'attnforge_included("{kernel}" "{sources}" found)\nmessage(STATUS "${{found}}")\n'
            for kernel in kernels
        )
    )
    done = subprocess.run(["cmake", "-P", str(script)], capture_output=True, text=True, check=True)
    scanned = [set(line.removeprefix("-- ").split(";")) for line in done.stdout.splitlines()]
    assert len(scanned) == len(kernels) > 0

    def included(kernel: Path, *definitions: str) -> set[str]:
        command = [compiler, "-MM", "-std=c++20", *(f"-D{name}" for name in definitions)]
        command += [f"-I{sources}", f"-I{sources}/include", str(kernel)]
        out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        return {str(Path(word).resolve()) for word in out.split() if word.endswith(".h")}

    tiles = ("ATTNFORGE_ISA=amx_soft", "ATTNFORGE_BELOW=avx512_soft",
             "ATTNFORGE_LANES_amx_soft=ATTNFORGE_LANES_avx512_soft")  # fmt: skip
    for kernel, headers in zip(kernels, scanned, strict=True):
        named = included(kernel, "ATTNFORGE_ISA=baseline")
        if not headers <= named:  # what levels of matrix tiles alone include
            named |= included(kernel, *tiles)
        assert headers <= named, kernel
        missing = named - headers - {str(sources / "cpu/kernels.h")}
        assert all(path.startswith(str(sources / "include/attnforge")) for path in missing), missing
