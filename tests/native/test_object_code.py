"""What the compiler made of the kernels: no spills in inner loops, no instruction of a wider level.

Speed rests on accumulators staying in registers and safety on each level using only its own
instructions. Neither shows in results; both can break with a compiler or a harmless-looking edit.
"""

from __future__ import annotations

import platform
import re
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

import pytest

pytestmark = [
    pytest.mark.native,
    pytest.mark.skipif(platform.machine() != "x86_64", reason="x86-64 object code"),
]

Objects = dict[str, list[Path]]

LEVELS = ("baseline", "avx2", "avx512", "amx", "avx512_soft", "amx_soft")
# avx512_soft holds 16 lanes in two ymm registers and so must spill: it is there for results only.
SPILL_FREE = ("baseline", "avx2", "avx512", "amx")
MIN_MULTIPLIES = 8  # packed multiplies that make a loop an inner loop of a matrix product

MICRO_KERNELS = ("gemm_tile",)
# Loops that write the stack all the same, by name: so many instructions at most, on any level.
STACK_BUDGET = {
    # A group of four tokens and its coefficients are small arrays, kept there by design.
    "prepare_groups<": 107,
    "scan_groups<": 32,
    # Spills of kda's backward (sums over channel gates): known, small beside its loops.
    "HeadBackward<": 24,
    # One vector of unpacked nibbles (avx2), one or two around fp8's software conversion (baseline).
    "scores<": 4,
    # 8 accumulators, bounds of two keys and what widens fp16: 6 on avx2, the rest on baseline.
    "bound_pages<": 39,
}

RESULT = re.compile(r"\S+\s+[xyz]mm(\d+)\b")  # the register that an instruction writes
CLEARED = re.compile(r"v?p?xor(?:ps|pd|d|q)?\s+([xyz]mm\d+)(?:,\1)+$")
STORE = re.compile(r"v?mov\S+\s+[A-Z]+ PTR \[[^]]*\],[xyz]mm(\d+)$")
ELEMENT = re.compile(r"v?(?:movss|movd|movq|movsd)\s")
MULTIPLY = re.compile(r"vf(?:n?m(?:add|sub))\d+ps|v?mulps")
VECTOR = re.compile(r"\b[xyz]mm\d+")
JUMP = re.compile(r"j[a-z]+\s+([0-9a-f]+)\b")
FUNCTION = re.compile(r"^[0-9a-f]+ <(.+)>:$")
INSTRUCTION = re.compile(r"^\s*([0-9a-f]+):\t(.*)$")
# A spill slot: stack pointer plus a constant. With an index register it is an array, not a spill.
SLOT = {
    "rsp": re.compile(r"\[rsp(?:[+-]0x[0-9a-f]+)?\]"),
    "rbp": re.compile(r"\[rbp(?:[+-]0x[0-9a-f]+)?\]"),
}


@dataclass
class Function:
    name: str
    code: list[tuple[int, str]] = field(default_factory=list)  # (address, text)


def parse(text: str) -> list[Function]:
    functions: list[Function] = []
    for line in text.splitlines():
        if start := FUNCTION.match(line):
            functions.append(Function(start[1]))
        elif functions and (found := INSTRUCTION.match(line)):
            functions[-1].code.append((int(found[1], 16), found[2].split("#")[0].strip()))
    return functions


def disassemble(path: Path) -> list[Function]:
    command = ["objdump", "-d", "-C", "-M", "intel", "--no-show-raw-insn", str(path)]
    return parse(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def inner_loops(function: Function) -> list[list[str]]:
    """Bodies of the loops (backward jump's target .. jump) that contain no other loop."""
    if not function.code:
        return []
    first = function.code[0][0]
    spans = {
        (int(jump[1], 16), address)
        for address, text in function.code
        if (jump := JUMP.match(text)) and first <= int(jump[1], 16) <= address
    }
    inner = [
        (a, b)
        for a, b in spans
        if not any(a <= c and d <= b and (c, d) != (a, b) for c, d in spans)
    ]
    return [[t for address, t in function.code if a <= address <= b] for a, b in sorted(inner)]


def product_loops(function: Function) -> list[list[str]]:
    """Inner loops of multiplications. One that calls (`log`, per row) saves registers by ABI."""
    return [
        body
        for body in inner_loops(function)
        if sum(bool(MULTIPLY.match(text)) for text in body) >= MIN_MULTIPLIES
        and not any(text.startswith("call") for text in body)
    ]


def settles(body: list[str]) -> list[bool]:
    """For each instruction of a loop body, whether it stores a vector that the loop has computed.

    Not so a register that the loop leaves alone or has just cleared, nor one element: so begins
    and fills the array of a tail, which has fewer elements than a vector.
    """
    written = {m[1] for m in map(RESULT.match, body) if m}
    constant = {n: n not in written for n in map(str, range(32))}
    found = []
    for text in body:
        result, cleared = RESULT.match(text), CLEARED.match(text)
        store = STORE.match(text)
        found.append(store is None or not (ELEMENT.match(text) or constant[store[1]]))
        if result:
            constant[result[1]] = cleared is not None or result[1] not in written
    return found


def spills(function: Function, body: list[str]) -> list[str]:
    """Vector instructions of a loop body that touch a stack slot and should not.

    In a register tile (MICRO_KERNELS) that is every one. Elsewhere it is a slot that the loop
    writes: a value that changes and lives in memory. Slots only read hold loop constants, such as
    the polynomial of exp2 with 16 registers, and cost what reading them from .rodata would.
    """
    framed = any(re.match(r"mov\s+rbp,rsp", text) for _, text in function.code)
    touching: dict[str, list[tuple[bool, str]]] = {}  # slot -> (writes it, instruction)
    for text, settled in zip(body, settles(body), strict=True):
        slot = SLOT["rsp"].search(text) or (framed and SLOT["rbp"].search(text))
        if VECTOR.search(text) and slot:
            operands = text.split(None, 1)[1].split(",")
            writes = settled and slot[0] in operands[0]
            touching.setdefault(slot[0], []).append((writes, text))
    strict = any(name in function.name for name in MICRO_KERNELS)
    return [
        text
        for uses in touching.values()
        if strict or any(writes for writes, _ in uses)
        for _, text in uses
    ]


@pytest.mark.parametrize("level", SPILL_FREE)
def test_inner_product_loops_keep_their_registers(level: str, objects: Objects) -> None:
    if level not in objects:
        pytest.skip(f"{level} is not built here")
    tiles, found = 0, []
    for path in objects[level]:
        for function in disassemble(path):
            own: list[str] = []
            for body in product_loops(function):
                tiles += any(name in function.name for name in MICRO_KERNELS)
                own += spills(function, body)
            allowed = [n for name, n in STACK_BUDGET.items() if name in function.name]
            if len(own) > max(allowed, default=0):
                found += [f"{path.parent.name}/{path.name}: {function.name}: {t}" for t in own]
    # amx has its products in tiles: there it is the loops of softmax that are looked at.
    assert tiles > 0 or level == "amx", "no register tile recognised: the check would prove nothing"
    assert found == []


@pytest.mark.parametrize("level", LEVELS)
def test_only_instructions_of_the_level(level: str, objects: Objects) -> None:
    if level not in objects:
        pytest.skip(f"{level} is not built here")
    evex = re.compile(r"\bzmm\d|\b[xy]mm(?:1[6-9]|2\d|3[01])\b|\{k[1-7]\}")
    forbidden = {
        "baseline": re.compile(r"^v(?!err|erw)[a-z]|\b[yz]mm\d"),  # VEX and EVEX mnemonics
        "avx2": evex,
        "avx512": re.compile(r"^tile|^\S*bf16"),
        "avx512_soft": evex,
        "amx_soft": evex,
    }.get(level)
    widest = {"baseline": "xmm", "avx512": "zmm", "amx": "tmm"}.get(level, "ymm")
    seen = False
    found = []
    for path in objects[level]:
        for function in disassemble(path):
            for _, text in function.code:
                seen = seen or widest in text
                if forbidden is not None and forbidden.search(text):
                    found.append(f"{path.name}: {function.name}: {text}")
    assert found[:20] == []
    assert seen, f"{level} uses no {widest} register"


@pytest.mark.parametrize("level", LEVELS)
def test_objects_define_no_weak_symbol(level: str, objects: Objects) -> None:
    """Of a weak symbol in several levels the linker keeps one: perhaps the AVX-512 copy."""
    if level not in objects:
        pytest.skip(f"{level} is not built here")
    weak = []
    for path in objects[level]:
        command = ["nm", "-C", "--defined-only", str(path)]
        listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        weak += [line for line in listed.splitlines() if re.search(r" [WwVvu] ", line)]
    assert weak == []


def test_the_checker_sees_a_spill() -> None:
    """Known answers: changing values are spills; constants only in a register tile."""
    multiplies = "".join(f"  {a:x}:\tvfmadd231ps ymm{a % 8},ymm8,ymm9\n" for a in range(0x20, 0x28))
    text = (
        "0000000000000010 <NAME>:\n"
        "  10:\tvmovaps YMMWORD PTR [rsp+0x20],ymm1\n"
        f"{multiplies}"
        "  28:\tvaddps ymm1,ymm2,YMMWORD PTR [rsp+0x20]\n"
        "  29:\tvmovaps ymm1,YMMWORD PTR [rsp+rax*4+0x20]\n"
        "  2a:\tmov    rcx,QWORD PTR [rsp+0x8]\n"
        "  2b:\tvmovaps YMMWORD PTR [rbp-0x20],ymm1\n"
        "  2c:\tvmovaps ymm3,YMMWORD PTR [rbp-0x20]\n"
        "  2d:\tjne    20 <NAME+0x10>\n"
        "  2e:\tjmp    10 <NAME>\n"
    )
    constant = "vaddps ymm1,ymm2,YMMWORD PTR [rsp+0x20]"
    changing = ["vmovaps YMMWORD PTR [rbp-0x20],ymm1", "vmovaps ymm3,YMMWORD PTR [rbp-0x20]"]
    for name, unframed, framed in (
        ("softmax", [], changing),
        ("gemm_tile<6, 2>", [constant], [constant, *changing]),
    ):
        (function,) = parse(text.replace("NAME", name))
        (body,) = product_loops(function)
        assert spills(function, body) == unframed
        function.code.insert(0, (0x10, "mov    rbp,rsp"))
        assert spills(function, body) == framed
        function.code.insert(-1, (0x2C, "call   40 <log>"))
        assert product_loops(function) == []
