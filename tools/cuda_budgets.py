"""Holds every kernel of libattnforge_cuda.so to a table of resources, without a GPU.

    python tools/cuda_budgets.py --write      # of the built library into csrc/cuda/budgets.json
    python tools/cuda_budgets.py --launches   # what the tests of the emulator ran, against it

A row is an architecture and a kernel id. It holds the registers of a thread, its stack in bytes,
the accesses to that stack in the hot loop, the one that multiplies (spills elsewhere are cold), and
the bytes of shared memory of its largest launch. ``tests/cuda/test_compiled.py`` compares all but
the last. That is asked for at a launch and stands in no object code: the emulator notes it, and
``--launches`` compares. A kernel that no test launched is an error, too. Needs cuobjdump and
nvdisasm, which come with Triton's wheel, and nm.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
TABLE = ROOT / "csrc" / "cuda" / "budgets.json"
LIBRARY = ROOT / "python" / "attnforge" / "lib" / "libattnforge_cuda.so"
EMULATED = ROOT / "build" / "emulated" / "emulated" / "libattnforge_emulated.so"
LAUNCHES = EMULATED.parent / "launches"
DTYPES = ("fp32", "fp16", "bf16", "fp8")  # of enum DType
GRADIENTS = ("dkdv", "dk", "dv", "dq")  # of enum Gradient
HEAD_DIMS = ("64x64", "96x96", "128x128", "192x128", "192x192", "256x256")  # of kHeadDims
PAGED_DIMS = ("64x64", "128x128", "256x256")  # of kPagedDims
SM90_DECODE_DIMS = ("64x64", "128x128", "192x128", "256x256", "576x512")  # of kSm90DecodeDims
SM90_FP8_DIMS = ("64x64", "128x128", "256x256")  # of kSm90Fp8Dims
WALK_DIMS = ("64x64", "128x64")  # of kWalkDims
WALK_GATES = ("whole", "read", "columns")  # of enum WalkGate
LISTED_DIMS = ("64x64", "128x128", "192x128", "256x256")  # of kListedDims
INDEXED_BWD_DIMS = ("64x64", "128x128", "256x256")  # of kIndexedBwdDims
SCORE_DIMS = ("64x64", "128x128", "256x256")  # of kScoreDims

Row = dict[str, int]


def tool(name: str) -> Path:
    """One of the programs in Triton's wheel."""
    import triton

    return Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name


def kernel_id(symbol: str) -> str | None:
    """``fwd.bf16.d64x64.features`` for a mangled kernel name, None for kernels without a tile."""
    paged = re.search(
        r"\d+(PagedPrefill|PagedDecode|Latent)CaseILN\w*?5DTypeE(\d)E(?:Li(\d)E)?Lb(\d)E", symbol
    )
    if paged is not None:
        kind, dtype, dims, codes = paged.groups()
        name = f"paged_{kind.removeprefix('Paged').lower()}{'_codes' if codes == '1' else ''}"
        return f"{name}.{DTYPES[int(dtype)]}.d{PAGED_DIMS[int(dims)] if dims else '576x512'}"
    listed = re.search(
        r"\dListed(?:Fwd|Bwd)CaseILN\w*?5DTypeE(\d)ELi(\d)ELN\w*?8ListRowsE(\d)E"
        r"(?:LN\w*?8GradientE(\d))?", symbol
    )  # fmt: skip
    if listed is not None:
        dtype, dims, many, gradient = listed.groups()
        kind = "fwd" if gradient is None else GRADIENTS[int(gradient)]
        few = "_few" if many == "0" else ""
        return f"listed_{kind}{few}.{DTYPES[int(dtype)]}.d{LISTED_DIMS[int(dims)]}"
    indexed = re.search(r"\dIndexedCaseILN\w*?5DTypeE(\d)ELi(\d)E", symbol)
    if indexed is not None:
        dtype, dims = map(int, indexed.groups())
        return f"indexed_fwd.{DTYPES[dtype]}.d{LISTED_DIMS[dims]}"
    indexed = re.search(r"\dIndexedBwdCaseILN\w*?5DTypeE(\d)ELi(\d)ELN\w*?8GradientE(\d)E", symbol)
    if indexed is not None:
        dtype, dims, gradient = map(int, indexed.groups())
        return f"indexed_{GRADIENTS[gradient]}.{DTYPES[dtype]}.d{INDEXED_BWD_DIMS[dims]}"
    scores = re.search(r"\dKeyScoresCaseILN\w*?5DTypeE(\d)ELi(\d)E", symbol)
    if scores is not None:
        dtype, dims = map(int, scores.groups())
        return f"key_scores.{DTYPES[dtype]}.d{SCORE_DIMS[dims]}"
    decode = re.search(r"Sm90DecodeCaseILN\w*?5DTypeE(\d)ELi(\d)ELb(\d)E", symbol)
    if decode is not None:
        dtype, dims, latent = map(int, decode.groups())
        kind = "latent_sm90" if latent else "decode_sm90"
        return f"{kind}.{DTYPES[dtype]}.d{SM90_DECODE_DIMS[dims]}.features"
    fp8 = re.search(r"Sm90Fp8CaseILi(\d)E", symbol)
    if fp8 is not None:
        return f"fwd_sm90.fp8.d{SM90_FP8_DIMS[int(fp8[1])]}.features"
    walk = re.search(
        r"\d(Walk|Delta)CaseILN\w*?5DTypeE(\d)ELi(\d)ELN\w*?8WalkGateE(\d)ELb(\d)E", symbol
    )
    if walk is not None:
        dtype, dims, gate, other = map(int, walk.groups()[1:])
        kind = f"wide_{WALK_GATES[gate]}" if other else WALK_GATES[gate]
        if walk[1] == "Delta":
            kind = f"delta_{WALK_GATES[gate]}{'_reverse' * other}"
        return f"linear_{kind}.{DTYPES[dtype]}.d{WALK_DIMS[dims]}"
    case = re.search(r"\d(Fwd|Decode|Bwd|Sm90|Sm90Bwd)CaseI(.*?)EEE", symbol + "EEE")
    if case is None:
        return None
    found = re.match(
        r"LN\w*?5DTypeE(?P<dtype>\d)ELi(?P<dims>\d)E(?:Lb(?P<features>\d)E)?"
        r"(?:LN\w*?8GradientE(?P<gradient>\d))?",
        case[2] + "E",
    )
    assert found is not None, symbol
    kinds = {"Fwd": "fwd", "Decode": "decode", "Sm90": "fwd_sm90"}
    kind = kinds.get(case[1]) or GRADIENTS[int(found["gradient"])]
    kind += "_sm90" if case[1] == "Sm90Bwd" else ""
    tail = ".features" if case[1] == "Decode" or found["features"] == "1" else ""
    return f"{kind}.{DTYPES[int(found['dtype'])]}.d{HEAD_DIMS[int(found['dims'])]}{tail}"


def hot_spills(sass: str) -> int:
    """Accesses to local memory inside the loop that holds most products; 0 without one.

    Loops over HGMMA (e4m3: QGMMA) lie in the loop of a persistent kernel: the innermost counts.
    """
    lines = sass.splitlines()
    first = {m[1]: n for n, x in enumerate(lines) if (m := re.match(r"\s*(\.L_x_\d+):", x))}
    best = (0.0, 0)
    for number, line in enumerate(lines):
        branch = re.search(r"\bBRA\b.*(\.L_x_\d+)", line)
        start = first.get(branch[1], number) if branch else number
        if start < number:
            body = "\n".join(lines[start:number])
            rank = len(re.findall(r"\bHMMA\b", body)) or ("GMMA" in body) / (number - start)
            best = max(best, (rank, len(re.findall(r"\b(?:LDL|STL)\b", body))))
    return best[1] if best[0] else 0


def _run(name: str, *arguments: str | Path, **options: Any) -> str:
    command = [str(tool(name)), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, **options)
    return str(done.stdout)


def usage(library: Path = LIBRARY) -> dict[str, Row]:
    """``sm_80/<kernel id>`` -> registers and stack, of every kernel of the library."""
    rows: dict[str, Row] = {}
    arch = ""
    name: str | None = None
    for line in _run("cuobjdump", "-res-usage", library).splitlines():
        if found := re.match(r"arch = (sm_\d+a?)", line.strip()):
            arch = found[1]
        elif found := re.match(r"Function (\S+):", line.strip()):
            name = kernel_id(found[1])
        elif name and (found := re.search(r"REG:(\d+) STACK:(\d+)", line)):
            rows[f"{arch}/{name}"] = {"registers": int(found[1]), "stack": int(found[2])}
    return rows


def code(library: Path = LIBRARY) -> dict[str, str]:
    """``sm_80/<kernel id>`` -> disassembly."""
    found: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as folder:
        _run("cuobjdump", "-xelf", "all", library, cwd=folder)
        for cubin in sorted(Path(folder).glob("*.cubin")):
            arch = re.findall(r"sm_\d+", cubin.name)[-1]
            for part in re.split(r"\.section\s+\.text\.", _run("nvdisasm", "-c", cubin))[1:]:
                name = kernel_id(part.split(",")[0])
                if name is not None:  # files are named without the architecture's suffix
                    found[f"{arch}{'a' * ('_sm90.' in name)}/{name}"] = part
    return found


def measure(library: Path = LIBRARY, sass: dict[str, str] | None = None) -> dict[str, Row]:
    """The table of a library, or of its disassembly."""
    sass = code(library) if sass is None else sass
    rows = usage(library)
    return {name: {**rows[name], "hot_spills": hot_spills(sass[name])} for name in sorted(rows)}


def launched(folder: Path = LAUNCHES, library: Path = EMULATED) -> dict[str, int]:
    """``sm_80/<kernel id>`` -> bytes of shared memory, of what ran under the emulator."""
    if not library.is_file():
        raise SystemExit(f"cuda_budgets: {library} is not there: run tests/cuda, which builds it")
    done = subprocess.run(["nm", str(library)], capture_output=True, text=True, check=True)
    names = {}
    for address, symbol in re.findall(r"^([0-9a-f]+) [tTwW] (\S+)$", done.stdout, re.MULTILINE):
        if name := kernel_id(symbol):
            names[int(address, 16)] = f"{'sm_90a' if '_sm90.' in name else 'sm_80'}/{name}"
    found: dict[str, int] = {}
    for file in folder.glob("*"):
        if file.stat().st_mtime < library.stat().st_mtime:
            continue  # addresses of another build
        for line in file.read_text().splitlines():
            place, size = map(int, line.split())
            if place in names:
                found[names[place]] = max(size, found.get(names[place], 0))
    return found


def check_launches(table: dict[str, Row], found: dict[str, int]) -> list[str]:
    """What is wrong with the launches of a whole run of the emulator's tests."""
    wrong = [f"{name}: no test has launched it" for name in sorted(set(table) - set(found))]
    for name, size in sorted(found.items()):
        most = table.get(name, {}).get("shared")
        if most is None or size > most:
            had = "none" if most is None else most
            wrong.append(f"{name}: {size} bytes of shared memory, {had} are in the table")
    return wrong


def write_table(build: str, rows: dict[str, Row]) -> None:
    lines = ",\n".join(f"  {json.dumps(name)}: {json.dumps(row)}" for name, row in rows.items())
    TABLE.write_text(f'{{\n"build": {json.dumps(build)},\n"kernels": {{\n{lines}\n}}\n}}\n')


def main() -> int:
    parser = argparse.ArgumentParser(description="Resources of every CUDA kernel.")
    parser.add_argument("--write", action="store_true", help=f"write {TABLE.relative_to(ROOT)}")
    parser.add_argument("--launches", action="store_true", help="shared memory, by the emulator")
    options = parser.parse_args()
    old = json.loads(TABLE.read_text())
    table: dict[str, Row] = old["kernels"]
    if options.launches:
        found = launched()
        if options.write:
            for name in found.keys() & table.keys():
                table[name]["shared"] = found[name]
            write_table(old["build"], table)
        wrong = check_launches(table, found)
        print(*(wrong or [f"{len(found)} kernels were launched, within their shared memory"]),
              sep="\n")  # fmt: skip
        return 1 if wrong else 0
    measured = measure()
    for name, used in measured.items():
        print(f"{name:<40}", *(f"{key} {value:>4}" for key, value in used.items()))
    if options.write:
        sys.path.insert(0, str(ROOT / "python"))
        from attnforge import _native

        kept = {n: {k: v for k, v in row.items() if k == "shared"} for n, row in table.items()}
        write_table(_native.build_info("cuda"),
                    {n: {**row, **kept.get(n, {})} for n, row in measured.items()})  # fmt: skip
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
