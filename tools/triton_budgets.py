"""Compiles every shipped Triton tile ahead of time and holds it to a table of resources.

    python tools/triton_budgets.py --write   # compile everything, write triton_kernels/budgets.json

No GPU is needed: the launchers run on CPU tensors under a driver that names an architecture and
compiles instead of launching, so what is compiled is what a launcher would start there. A row holds
the registers of a thread, its stack in bytes, the accesses to that stack (spills) in hot loops, and
of a block the shared memory and the columns of tensor memory.
``tests/triton/test_compile.py`` compares.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import re
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch

ROOT = Path(__file__).resolve().parent.parent
TABLE = ROOT / "triton_kernels" / "budgets.json"
ARCHS = (80, 86, 90, 100)


class Variant(NamedTuple):
    """One specialisation of every kernel. features: window, softcap, ALiBi, sinks, used keys.

    mods: a group of features of single scores, see ``score_features``, or "cope" for the kernels
    of that family, or a key of PAGED or LINEAR. fp8 has no backward.
    """

    dtype: torch.dtype
    head_dim: int
    causal: bool = False
    features: bool = False
    mods: str = ""

    @property
    def name(self) -> str:
        words = [str(self.dtype).removeprefix("torch."), f"d{self.head_dim}"]
        words += ["causal"] * self.causal + ["features"] * self.features
        return "-".join(words + [self.mods] * bool(self.mods))

    @property
    def archs(self) -> tuple[int, ...]:
        return (80, 90) if self.mods in LINEAR else ARCHS


class Paged(NamedTuple):
    """A problem of the paged family. page_size: of less than a tile, or a multiple of it."""

    rows: int
    page_size: int = 16
    keys: int = 2048  # more than a split of them needs a merge
    code: torch.dtype | None = None  # with scales and zeros per page
    writes: bool = False  # also the kernels that write
    plan: int = 0  # pieces that a plan has room for, beside which sinks are the merge's


PAGED = {
    "pages": Paged(rows=1, keys=9000),
    "large-pages": Paged(rows=1, page_size=128),
    "many-rows": Paged(rows=100),
    "int4-pages": Paged(rows=1, code=torch.uint8, writes=True),
    "planned-pages": Paged(rows=1, plan=132),
}

# Gates of what problems of the linear family have: their number decides which code is built.
LINEAR = {"linear-scalar": "scalar", "linear-key": "key", "delta-key": "key"}

# Every tile that ships (three widths, two sizes of elements), and masks and features once.
VARIANTS = (
    *(Variant(torch.bfloat16, d) for d in (64, 128, 256)),
    *(Variant(torch.float32, d) for d in (64, 128, 256)),
    Variant(torch.bfloat16, 128, causal=True),
    *(Variant(torch.bfloat16, d, causal=True, features=True) for d in (128, 256)),
    *(Variant(torch.bfloat16, 128, causal=True, mods=mods) for mods in ("masks", "biases")),
    *(Variant(torch.float8_e4m3fn, d, causal=True, mods="descales") for d in (64, 128, 256)),
    *(Variant(torch.bfloat16, d, causal=True, mods="cope") for d in (64, 128, 256)),
    Variant(torch.float32, 64, causal=True, mods="cope"),
    *(Variant(torch.bfloat16, 128, causal=True, mods=mods) for mods in PAGED),
    Variant(torch.bfloat16, 256, causal=True, mods="many-rows"),
    *(Variant(torch.bfloat16, 128, causal=True, mods=mods) for mods in LINEAR),
)


class _NoDevice:
    """A Triton driver of an architecture, without a device."""

    def __init__(self, arch: int) -> None:
        from triton.backends.compiler import GPUTarget

        self.target = GPUTarget("cuda", arch, 32)

    def get_current_target(self) -> Any:
        return self.target

    def get_current_device(self) -> tuple[str, int]:
        return ("none", self.target.arch)  # kernels are cached by device

    def get_current_stream(self, device: Any) -> int:
        return 0


@contextlib.contextmanager
def compiling(arch: int) -> Iterator[list[tuple[str, Any]]]:
    """Launches inside compile for ``sm_<arch>`` and append (kernel name, compiled kernel)."""
    from triton.runtime.driver import driver
    from triton.runtime.jit import JITFunction

    from attnforge.backends.triton import _flash_tiles, linear

    found: list[tuple[str, Any]] = []
    run = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        kernel = run(self, *args, grid=grid, warmup=True, **options)
        found.append((self.__name__, kernel))
        return kernel

    active = driver._active
    driver.set_active(_NoDevice(arch))
    try:
        with (
            mock.patch.object(JITFunction, "run", compile_only),
            mock.patch.object(_flash_tiles, "device_arch", return_value=("cuda", f"sm_{arch}")),
            mock.patch.object(linear, "device_arch", return_value=("cuda", f"sm_{arch}")),
        ):
            yield found
    finally:
        driver._active = active


def disassembled(tool: str, option: str, cubin: bytes) -> str:
    """What one of the tools in Triton's wheel prints about a binary."""
    import triton

    program = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / tool
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(program), option, file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def hot_spills(sass: str) -> int:
    """Accesses to local memory in the innermost loops that multiply, all of them together.

    Spills elsewhere, in the cold path for NaN or around an epilogue, cost next to nothing.
    """
    total, first_line = 0, {}
    lines = sass.splitlines()
    newest_loop = 0
    for number, line in enumerate(lines):
        if label := re.match(r"(\.L_x_\d+):", line.strip()):
            first_line[label[1]] = number
        branch = re.search(r"\bBRA\b.*(\.L_x_\d+)", line)
        start = first_line.get(branch[1]) if branch else None
        if start is not None and start >= newest_loop:  # backwards, around no other loop
            body = "\n".join(lines[start:number])
            if re.search(r"\b(HGMMA|HMMA|UTCHMMA|FFMA)\b", body):
                total += len(re.findall(r"\b(?:LDL|STL)\b", body))
            newest_loop = number
    return total


def resources(kernel: Any) -> dict[str, int]:
    """Of a thread: registers, stack, spills in hot loops. Of a block: shared and tensor memory."""
    cubin = kernel.asm["cubin"]
    words = re.search(r"REG:(\d+) STACK:(\d+)", disassembled("cuobjdump", "-res-usage", cubin))
    assert words is not None
    return {
        "registers": int(words[1]),
        "stack": int(words[2]),
        "hot_spills": hot_spills(disassembled("nvdisasm", "-c", cubin)),
        "shared": int(kernel.metadata.shared),
        "tensor_columns": int(getattr(kernel.metadata, "tmem_size", 0) or 0),
    }


def score_features(group: str, rows: int, keys: int, heads: int, half: int) -> dict[str, Any]:
    """Fields of FlashParams: what hides, drops or turns; or what changes logits by tensors."""
    from attnforge._params import FlashMods

    if group == "masks":
        mods = FlashMods(
            row_bounds=torch.zeros(1, heads, rows, 2, dtype=torch.int32),
            mask=torch.zeros(2, 1, rows, keys, dtype=torch.bool),
            segments_q=torch.zeros(2, rows, dtype=torch.int32),
            segments_k=torch.zeros(2, keys, dtype=torch.int32),
            rope_cos=torch.zeros(1, keys, half),
            rope_sin=torch.zeros(1, keys, half),
            positions_q=torch.zeros(1, rows, dtype=torch.int32),
            positions_k=torch.zeros(1, keys, dtype=torch.int32),
            rng=torch.tensor([1 << 40, 7]),
        )
        return {"mods": mods, "dropout_p": 0.1}
    if group == "descales":
        mods = FlashMods(qk_descale=torch.ones(2, heads // 2), v_descale=torch.ones(2, heads // 2))
        return {"mods": mods}
    mods = FlashMods(
        key_bias=torch.zeros(2, heads, keys),
        bias=torch.zeros(1, heads, rows, keys, dtype=torch.bfloat16),
        rel_bias=torch.zeros(heads, 65),
        decay=torch.zeros(2, heads, keys, dtype=torch.float64),
        row_scale=torch.zeros(1, 1, rows),
    )
    return {"mods": mods}


def launch_cope(dout: torch.Tensor, tape: Any, p: Any) -> None:
    """Every kernel of the cope family, with a table for all heads."""
    from attnforge.backends.triton import cope

    emb, (q, k, v) = torch.zeros(1, dout.shape[-1], 64), tape[:3]
    cope.fwd(q, k, v, emb, p, tape.out, tape.lse, tape.out_lo)
    dq, dk, dv, demb = map(torch.zeros_like, (q, k, v, emb))
    cope.bwd(dout, tape.lse, tape, emb, p, (dq, dk, dv, demb))


def _problem(variant: Variant) -> tuple[Any, ...]:
    """q, k, v, out, low, lse and FlashParams of a variant."""
    from attnforge._params import FlashParams

    dtype, d = variant.dtype, variant.head_dim
    rows, keys, heads = 48, 80, 4
    q = torch.zeros(2, rows, heads, d, dtype=dtype)
    k, v = torch.zeros(2, 2, keys, heads // 2, d, dtype=dtype)
    float8 = dtype.itemsize == 1
    out, low = torch.zeros(2, *q.shape, dtype=torch.bfloat16 if float8 else dtype)
    lse = torch.zeros(2, heads, rows)
    some = variant.features
    p = FlashParams(
        None, None, torch.zeros(2, dtype=torch.int32) if some else None,
        torch.zeros(2, heads) if some else None, torch.zeros(heads) if some else None,
        rows, keys, 0.125, 32 if some else -1, 0 if variant.causal else -1, 8.0 if some else 0.0,
    )  # fmt: skip
    if variant.mods not in ("", "cope"):
        p = p._replace(**score_features(variant.mods, rows, keys, heads, d // 2))
    return q, k, v, out, low if dtype.itemsize == 2 else q.new_empty(0), lse, p


def forward(variant: Variant) -> None:
    """The forward alone."""
    from attnforge.backends.triton import flash

    q, k, v, out, low, lse, p = _problem(variant)
    flash.fwd(q, k, v, p, out, lse, low)


def launch_paged(variant: Variant, problem: Paged, v_dim: int = 0) -> None:
    """Paged attention, and writing pages; v_dim: of values that are a part of the keys."""
    from attnforge._params import PagedCache, PagedParams, PagedWrite
    from attnforge.backends.triton import paged

    rows, size, keys, code, writes, plan = problem
    dtype, d, heads, heads_kv = variant.dtype, variant.head_dim, 8, 1 if v_dim else 2
    k, v = torch.zeros(2, 9, size, heads_kv, d // (2 if code is torch.uint8 else 1),
                       dtype=code or dtype)  # fmt: skip
    scale = None if code is None else torch.ones(9, 1, heads_kv)
    lengths = torch.ones(2, dtype=torch.int32)
    table = torch.zeros(2, keys // size, dtype=torch.int32)
    cache = PagedCache(k, k[..., :v_dim] if v_dim else v, table, lengths, *[scale] * 4)
    p = PagedParams(None, None, None, None, rows, 0.1, -1, 0, 0.0)
    if plan:
        pieces, first = torch.zeros(3, plan, dtype=torch.int32), torch.zeros(3, dtype=torch.int32)
        p = p._replace(sinks=torch.zeros(heads), split_pieces=pieces, split_first=first)
    q, lse = torch.zeros(2, rows, heads, d, dtype=dtype), torch.zeros(2, heads, rows)
    paged.fwd(q, cache, p, q[..., : v_dim or d].contiguous(), lse)
    if writes:
        low, turns = torch.zeros(9, heads_kv, d), torch.zeros(1, 99, d // 2)
        write = PagedWrite(None, turns, turns, None, False, low, low)
        paged.append(q[:, :, :heads_kv], q[:, :, :heads_kv], cache, write)


def launch(variant: Variant) -> None:
    """Every kernel of a variant's family on one problem, through its launcher."""
    from attnforge._params import FlashGrads, FlashTape
    from attnforge.backends.triton import flash
    from attnforge.ops._flash_ops import GRAD_MODS

    if variant.mods in PAGED:
        launch_paged(variant, PAGED[variant.mods])
        return
    if variant.mods in LINEAR:
        family = delta if variant.mods.startswith("delta") else linear
        family(variant.dtype, variant.head_dim, LINEAR[variant.mods])
        return
    q, k, v, out, low, lse, p = _problem(variant)
    if variant.mods == "cope":
        launch_cope(torch.zeros_like(out), FlashTape(q, k, v, out, lse, low), p)
        return
    learned = [getattr(p.score_mods, name) for name in GRAD_MODS]
    rest = [q.new_empty(0) if x is None else torch.zeros_like(x) for x in learned]
    grads = FlashGrads._make([*map(torch.zeros_like, (q, k, v)), torch.zeros(q.shape[2]), *rest])
    flash.fwd(q, k, v, p, out, lse, low)
    if variant.dtype.itemsize > 1:
        flash.bwd(torch.zeros_like(out), lse, FlashTape(q, k, v, out, lse, low), p, grads)
    if not variant.mods:  # of one row
        q, p, out, lse = q[:, :1], p._replace(max_seqlen_q=1), out[:, :1], lse[..., :1].clone()
    flash.decode(q, k, v, p, out, lse, 2)


def latent(dtype: torch.dtype) -> None:
    """A decode of the latent vectors of MLA, and a forward whose values are as wide."""
    from attnforge.backends.triton import flash

    q, k, _, _, low, lse, p = _problem(Variant(dtype, 576, causal=True))
    v = k[..., :512].contiguous()
    out = q[..., :512].contiguous()
    flash.decode(q, k, v, p, out, lse, 2)
    q, k = q[..., :192].contiguous(), k[..., :192].contiguous()
    flash.fwd(q, k, v, p, out, lse, low[..., :512].contiguous())
    launch_paged(Variant(dtype, 576), Paged(rows=1), v_dim=512)


def reductions(dtype: torch.dtype, head_dim: int) -> None:
    """Every kernel of the reductions, with all features."""
    from attnforge.backends.triton import reductions as launchers

    q, k, _, _, _, lse, p = _problem(Variant(dtype, head_dim, causal=True, features=True))
    (batch, rows, heads, _), keys = q.shape, k.shape[1]
    ends = torch.tensor([0, 10, keys], dtype=torch.int32)
    mass = torch.zeros(batch, heads, rows, 2)
    launchers.column_sums(q, k, lse, lse, p, torch.zeros(batch, heads, keys))
    launchers.span_mass(q, k, lse, ends, p, mass)
    launchers.span_bwd(mass, q, k, lse, ends, p, (q.clone(), k.clone(), lse.clone()))
    launchers.row_entropy(q, k, lse, p, lse.clone())
    launchers.block_max(q, k, lse, (16, 16), p, torch.zeros(batch, heads, 3, 5))
    values = torch.zeros(batch, heads, rows, 20)
    launchers.topk_keys(q, k, lse, 20, p, values, torch.zeros_like(values, dtype=torch.int32))
    edges = torch.zeros(9, 4, dtype=torch.int32), torch.zeros(9), torch.tensor(0)
    launchers.edges(q, k, lse, 0.1, p, *edges)
    launchers.head_gradient(q, q, lse.clone(), torch.zeros(batch, heads))


def block_sparse(head_dim: int, q_block: int, kv_block: int) -> None:
    """Every kernel of block-sparse attention, causal, with lists per KV head."""
    from attnforge._params import BlockLists, FlashTape
    from attnforge.backends.triton import block_sparse as launchers

    q, k, v, out, low, lse, p = _problem(Variant(torch.bfloat16, head_dim, causal=True))
    ids = torch.zeros(2, k.shape[2], -(-q.shape[1] // q_block), 5, dtype=torch.int32)
    lists = BlockLists(ids, None, q_block, kv_block)
    launchers.fwd(q, k, v, p, lists, out, lse, low)
    dq, dk, dv = map(torch.zeros_like, (q, k, v))
    tape = FlashTape(q, k, v, out, lse, low)
    launchers.bwd(out, lse, tape, p, lists, (dq, dk, dv, torch.zeros(q.shape[2])))


def indexed(head_dim: int, rows: int, per_query_head: bool) -> None:
    """Attention to listed keys with biases: by pages in splits, and forward and backward."""
    from attnforge._params import FlashTape, IndexedGrads, IndexedParams
    from attnforge.backends.triton import retrieval as launchers

    q, k = (torch.zeros(2, n, h, head_dim, dtype=torch.bfloat16) for n, h in ((rows, 8), (96, 2)))
    ids = torch.zeros(2, 8 if per_query_head else 2, 1000, dtype=torch.int32)
    used, bias = torch.zeros(2, dtype=torch.int32), ids.float()
    p = IndexedParams(ids, ids[..., 0], bias, None, used, 0.1)
    lse, low = torch.zeros(2, 8, rows), q.clone()
    pages = p._replace(block_table=torch.zeros(2, 6, dtype=torch.int32))
    paged = k.view(12, 16, 2, head_dim)
    launchers.indexed_fwd(q, paged, paged, pages, q, lse, q.new_empty(0))
    launchers.indexed_fwd(q, k, k, p, q, lse, low)
    tape, grads = FlashTape(q, k, k, q, lse, low), IndexedGrads(q, k, k.clone(), bias)
    launchers.indexed_bwd(q, None, tape, p, grads)


def choices(head_dim: int) -> None:
    """Every kernel that scores or chooses keys, and those of LSH."""
    from attnforge._params import SelectParams
    from attnforge.backends.triton import retrieval as launchers

    q, k = (torch.zeros(2, n, h, head_dim, dtype=torch.bfloat16) for n, h in ((1, 8), (96, 2)))
    used, out = torch.zeros(2, dtype=torch.int32), torch.zeros(2, 8, 1, 96)
    counts = torch.zeros(2, 2, 96, dtype=torch.int32)
    launchers.key_scores(q, k, None, None, counts, 0.1, out)
    launchers.page_scores(q, k, k, None, None, used, 0.1, False, out)
    ids, lens = torch.zeros(16, 10, dtype=torch.int32), torch.zeros(16, dtype=torch.int32)
    for kind in ("topk", "threshold", "topp"):
        p = SelectParams(kind, 10, out[0, 0, 0, :1], 0.9, 1, 2)
        launchers.select_columns(torch.zeros(16, 9000), None, p, ids, lens)
    planes, codes = torch.zeros(head_dim, 90), torch.zeros(2, 2, 96, 10, dtype=torch.int16)
    mean, norms = torch.zeros(2, 2, head_dim), torch.zeros(2, 2, 96)
    launchers.lsh_encode(k, mean, planes, 9, codes)
    starts = torch.zeros(2, 2, 1, 10, 513, dtype=torch.int32)
    tables = torch.zeros(2, 2, 1, 10, 128, dtype=torch.int16)
    launchers.lsh_insert(starts, tables, 9, codes, used, used)
    launchers.lsh_truncate(starts, tables, 9, used)
    found = torch.zeros(2, 8, 96, dtype=torch.int32)
    launchers.lsh_retrieve(starts, tables, 9, codes[:, :, 0], q, k, mean, norms, used, used, 2, 0.0,
                           found, found[..., 0], found.float())  # fmt: skip


def linear(dtype: torch.dtype, head_dim: int, kind: str) -> None:
    """Every kernel of linear attention with gates of a kind, forward, backward and step."""
    from attnforge._params import LinearGrads, LinearOutputs, LinearParams, LinearTape
    from attnforge.backends.triton import linear as launchers

    time, heads, d = 80, 4, head_dim
    q, k = torch.zeros(2, 2, time, 2, d, dtype=dtype)
    v = torch.zeros(2, time, heads, d, dtype=dtype)
    shape = {"head": (heads,), "scalar": v.shape[:3], "key": v.shape, "value": v.shape}.get(kind)
    gate = None if shape is None else torch.zeros(shape)
    state, z, none = torch.zeros(2, heads, d, d), torch.zeros(2, heads, d), q.new_empty(0)
    norm = kind in ("scalar", "key")
    p = LinearParams(gate, kind, state, z if norm else None, None, 0.1, True, "sum" * norm, 1e-6)
    z, den, low = (x if norm else none for x in (z, v[..., 0].float(), v))
    outputs = LinearOutputs(v, state, z, den.contiguous(), low if dtype.itemsize == 2 else none)
    launchers.chunk_fwd(q, k, v, p, outputs)
    dgate = none if gate is None or kind == "head" else gate
    grads = LinearGrads(q, k, v, dgate, state, z)
    launchers.chunk_bwd(v, state, z if norm else None, LinearTape(q, k, v, outputs), p, grads)
    own = None if gate is None else gate if kind == "head" else gate[:, 0]
    launchers.step(
        q[:, 0], k[:, 0], v[:, 0], state, z if norm else None, None, p._replace(gate=own), v[:, 0]
    )


def delta(dtype: torch.dtype, head_dim: int, kind: str) -> None:
    """Every kernel of the delta rules, with gates of a kind, and of the scan."""
    from attnforge._params import DeltaGrads, DeltaParams
    from attnforge.backends.triton import delta as launchers
    from attnforge.backends.triton import scan

    time, heads, d = 80, 4, head_dim
    q, k = torch.zeros(2, 2, time, 2, d, dtype=dtype)
    v = torch.zeros(2, time, heads, d, dtype=dtype)
    beta, state = torch.zeros(v.shape[:3]), torch.zeros(2, heads, d, d)
    g = None if kind == "none" else torch.zeros(v.shape[: 3 if kind == "scalar" else 4])
    p = DeltaParams(g, beta, state, None, 0.1)
    launchers.delta_chunk_fwd(q, k, v, p, v, state)
    none = q.new_empty(0)
    grads = DeltaGrads(q, k, v, none if g is None else g, beta, state)
    launchers.delta_chunk_bwd(v, state, q, k, v, p, grads)
    p = p._replace(g=None if g is None else g[:, 0], beta=beta[:, 0])
    launchers.delta_step(q[:, 0], k[:, 0], v[:, 0], state, None, p, v[:, 0])
    if kind == "none":
        x, log, last = v[:, :, 0], torch.zeros(2, time, d), torch.zeros(2, d)
        scan.diag_scan_fwd(x, log, last, None, x, last)
        scan.diag_scan_bwd(x, last, x, log, last, None, (x, log, last))


def nsa(head_dim: int, top_n: int) -> None:
    """Block importance and the choice by it, at the paper's sizes."""
    from attnforge._params import FlashParams, NsaSelectParams
    from attnforge.backends.triton import nsa as launchers

    q, k = (torch.zeros(2, n, h, head_dim, dtype=torch.bfloat16) for n, h in ((80, 32), (64, 2)))
    p = FlashParams(None, None, None, None, None, 80, 64, 0.125, -1, -1, 0.0)
    asked = NsaSelectParams(p, 32, 16, 64, 17, top_n, 1, 2)
    at, lse = torch.zeros(1, 80, dtype=torch.int32), torch.zeros(2, 32, 80)
    launchers.importance(q, k, lse, at, asked, torch.zeros(2, 2, 80, 17))
    launchers.select(q, k, lse, at, asked, torch.zeros(2, 2, 80, top_n, dtype=torch.int32))


def measure(arch: int, variant: Variant) -> dict[str, tuple[dict[str, int], Any]]:
    """kernel name -> (resources, compiled kernel) of one variant for ``sm_<arch>``.

    The second launch of a kernel of the linear family is named ``walk-2``: its roles are others.
    """
    with compiling(arch) as found:
        launch(variant)
    rows: dict[str, tuple[dict[str, int], Any]] = {}
    for full_name, kernel in found:
        name = full_name.rpartition(".")[2]
        if variant.mods in LINEAR and name in rows:
            name += f"-{2 + sum(row.startswith(f'{name}-') for row in rows)}"
        rows[name] = resources(kernel), kernel
    return rows


def row_name(arch: int, variant: Variant, kernel: str) -> str:
    """The key of the table."""
    return f"sm_{arch}/{variant.name}/{kernel}"


def main() -> None:
    parser = argparse.ArgumentParser(description="Resources of every shipped Triton kernel.")
    parser.add_argument("--write", action="store_true", help=f"write {TABLE.relative_to(ROOT)}")
    parser.add_argument("--only", default="", help="rows that this regex finds; the others stay")
    options = parser.parse_args()
    import triton

    rows: dict[str, Any] = {}
    for arch in ARCHS:
        for variant in (variant for variant in VARIANTS if arch in variant.archs):
            mine = row_name(arch, variant, "")
            if not re.search(options.only, mine):
                old = json.loads(TABLE.read_text())["kernels"]
                rows |= {n: used for n, used in old.items() if n.rpartition("/")[0] + "/" == mine}
                continue
            for kernel, (used, _) in measure(arch, variant).items():
                name = row_name(arch, variant, kernel)
                rows[name] = used
                print(
                    f"{name:<48}", *(f"{key} {value:>6}" for key, value in used.items()), flush=True
                )
    if options.write:
        lines = ",\n".join(f"  {json.dumps(n)}: {json.dumps(used)}" for n, used in rows.items())
        head = f'"triton": {json.dumps(triton.__version__)}'
        TABLE.write_text(f'{{\n{head},\n"kernels": {{\n{lines}\n}}\n}}\n')


if __name__ == "__main__":
    main()
