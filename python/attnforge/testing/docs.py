"""Generated parts of the documentation: support matrices from the registry, measured tables.

    python -m attnforge.testing.docs            # rewrite the pages of this source tree
    python -m attnforge.testing.docs --check    # exit 1 if a page is out of date

A page marks a generated part with the comments `<!-- begin NAME -->` and `<!-- end NAME -->`;
`GENERATORS` says what stands between them. A generator depends on the source tree alone, never on
the machine: results come from JSON files that are committed under `docs/measurements/`.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from attnforge.registry import KernelSpec, Request, list_kernels
from attnforge.registry.predicates import (
    Arch,
    Available,
    Device,
    Dtypes,
    Features,
    Without,
    dtype_name,
)
from attnforge.testing import bench, crossover, quality_report, training

__all__ = ["GENERATORS", "main", "render_page", "stale_pages", "support_matrix"]

_PART = re.compile(r"(<!-- begin ([\w-]+) -->\n).*?(<!-- end \2 -->)", re.DOTALL)
_PAGES = ("README.md", "docs/*.md")
_RESULTS = "docs/measurements"
_SHORT = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16", "float64": "fp64",
          "float8_e4m3fn": "fp8"}  # fmt: skip

# What a call may ask of a kernel beyond sizes and dtype, in the words of the documentation.
_FOUNDATION = {
    "causal, right window": "window_right",
    "sliding window": "window_left",
    "varlen (`cu_seqlens`)": "varlen",
    "`seqused_k` / `cache_seqlens`": "seqused_k",
    "softcap": "softcap",
    "ALiBi": "alibi",
    "learned sinks": "sinks",
}
# Features of single scores, which the flash operators alone take.
_MODS = {
    "per-head windows, prefix-LM, hulls of segments": "row_bounds",
    "segment ids": "segments",
    "bool mask (tree)": "mask",
    "key bias": "key_bias",
    "additive bias": "bias",
    "relative bias (T5)": "rel_bias",
    "forget gates": "forget_gate",
    "row scale": "row_scale",
    "RoPE at load": "rope",
    "dropout": "dropout",
    "sigmoid": "sigmoid",
    "relu": "relu",
    "softplus": "softplus",
    "signed softmax": "signed_softmax",
    "functions of your own (`attnforge.jit`)": "score_mod",
}
# What caches in pages add.
_PAGES_ONLY = {
    "fp8 pages": "kv_fp8",
    "int8 pages": "kv_int8",
    "int4 pages": "kv_int4",
    "lengths per KV head": "lengths_per_head",
    "split plans": "split_plan",
    "V as a view of K": "latent",
    "page bounds": "page_bounds",
}
_FEATURES = _FOUNDATION | _MODS | _PAGES_ONLY
_PAGED = frozenset(_PAGES_ONLY.values())
# Lengths are no option of a cache; of the mods it takes the tree mask.
_PAGED_FWD = frozenset({"seqused_k", "page_bounds", *_MODS.values()}) - {"mask"}
_APPENDED = _PAGED - {"split_plan", "latent"} | {"varlen", "rope"}
# One sequence at a time, of plain logits; the LSE has the sinks.
# Lists are what is seen: of the features of scores a bias alone, which is an argument.
_LISTED = frozenset(_FEATURES.values()) - {"seqused_k"}
_OF_THE_MATRIX = frozenset({"varlen", "sinks", *_MODS.values()})
# merge_states combines outputs: masks and biases have no meaning there. A decode is never packed.
_NOT_ASKED = {
    "merge_states": frozenset(_FEATURES.values()),
    "nsa_combine": frozenset(_FEATURES.values()),
    "block_sparse_fwd": frozenset(_MODS.values()) | _PAGED,
    "block_sparse_bwd": frozenset(_MODS.values()) | _PAGED,
    **dict.fromkeys(
        ("nsa_attend", "nsa_importance", "nsa_select"),
        frozenset(_FEATURES.values()) - {"varlen", "seqused_k"},
    ),
    "flash_fwd": _PAGED,
    "flash_bwd": _PAGED,
    "flash_decode": _PAGED | {"varlen"},
    "paged_fwd": _PAGED_FWD,
    "cascade_fwd": _PAGED_FWD
    | {"mask", "alibi", "window_left", "window_right", "split_plan"},
    "paged_append": frozenset(_FEATURES.values()) - _APPENDED,
    "reductions_head_gradient": frozenset(_FEATURES.values()),
    **dict.fromkeys(
        ("cope_fwd", "cope_bwd"), _PAGED | {"alibi", "sinks", "softcap", *_MODS.values()}
    ),
    **dict.fromkeys(("indexed_fwd", "indexed_bwd", "key_scores", "page_scores"), _LISTED),
    **dict.fromkeys(
        ("select_columns", "lsh_encode", "lsh_insert", "lsh_truncate", "lsh_retrieve", "lsh_attend",
         "expand_runs", "nearest", "cluster_sums"),
        frozenset(_FEATURES.values()),
    ),
    # No scores, no mask: what its functions take, all of its kernels have.
    **{
        name: frozenset(_FEATURES.values())
        for name in ("linear_chunk_fwd", "linear_chunk_bwd", "linear_step", "delta_chunk_fwd",
                     "delta_chunk_bwd", "delta_step", "diag_scan_fwd", "diag_scan_bwd")
    },
    **{
        f"reductions_{name}": _OF_THE_MATRIX | _PAGED
        for name in ("block_max", "column_sums", "edges", "row_entropy", "span_bwd", "span_mass",
                     "topk_keys")
    },
}  # fmt: skip


def _table(rows: Sequence[Sequence[str]]) -> str:
    head, *body = rows
    lines = [head, ["---"] * len(head), *body]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def own_kernels(family: str) -> list[KernelSpec]:
    """The built-in kernels of one family; those of plugins are documented by the plugins."""
    return [
        spec
        for spec in list_kernels()
        if spec.describe()["launch"].startswith("attnforge.")
        and spec.id.split(".")[1:2] == [family]
    ]


def _serves(spec: KernelSpec, feature: str) -> bool:
    """Whether a kernel has a feature, everything else about the request being to its liking."""
    devices = next((p.types for p in spec.requires if isinstance(p, Device)), ("cpu",))
    dtypes = next((p.dtypes for p in spec.requires if isinstance(p, Dtypes)), ())
    dims = (("head_dim", 64), ("v_head_dim", 64), ("group", 1))
    arch = next((f"sm_{p.lowest}" for p in spec.requires if isinstance(p, Arch)), "")
    request = Request(spec.op, devices[0], arch, dtypes[0], dims, frozenset({feature}))
    # Whether a library is built here says nothing about the kernel.
    return all(need(request) is None for need in spec.requires if not isinstance(need, Available))


def _needs(spec: KernelSpec) -> tuple[str, str, str]:
    """Device, dtypes and sizes of a kernel, from its predicates."""
    device, dtypes, sizes = "any", "any", []
    for need in spec.requires:
        if isinstance(need, Device):
            device = ", ".join(need.types)
        elif isinstance(need, Dtypes):
            dtypes = ", ".join(_SHORT.get(n, n) for n in map(dtype_name, need.dtypes))
        elif not isinstance(
            need, (Available, Features, Without)
        ):  # features have a table of their own
            sizes.append(str(need))
    return device, dtypes, "; ".join(sizes) or "any"


def support_matrix(family: str = "flash") -> str:
    """Two Markdown tables: what each kernel of a family requires, and which features it has."""
    specs = own_kernels(family)
    needs = [["kernel", "operator", "device", "dtypes", "sizes", "deterministic"]]
    for spec in specs:
        yes = "yes" if spec.deterministic else "no"
        needs.append([f"`{spec.id}`", f"`{spec.op}`", *_needs(spec), yes])
    asked = [s for s in specs if _NOT_ASKED.get(s.op, frozenset()) < set(_FEATURES.values())]
    features = [["feature", *(f"`{s.id}`" for s in asked)]]
    for label, name in _FEATURES.items():
        cells = [
            "–" if name in _NOT_ASKED.get(s.op, ()) else "yes" if _serves(s, name) else "no"
            for s in asked
        ]
        if not set(cells) <= {"–"}:
            features.append([label, *cells])
    return _table(needs) + ("\n" + _table(features) if len(features) > 1 else "")


def short_matrix(family: str = "flash") -> str:
    """One row per backend and set of requirements, for the README."""
    groups: dict[tuple[str, ...], list[str]] = {}
    for spec in own_kernels(family):
        groups.setdefault((spec.backend, *_needs(spec)), []).append(f"`{spec.op}`")
    rows = [["backend", "operators", "device", "dtypes", "sizes"]]
    for (backend, *needs), ops in groups.items():
        rows.append([f"`{backend}`", ", ".join(ops), *needs])
    return _table(rows)


def environment_table(env: Mapping[str, Any], peaks: Mapping[str, Any]) -> str:
    """Device, versions, commit, date, and the same-run peaks of a result file."""
    rows = [["", ""]]
    rows += [[key.replace("_", " "), str(env[key])] for key in env]
    for name, entry in peaks.items():
        rows.append([f"peak {name}", f"{entry['peak']:.1f} {entry['unit']} ({entry['source']})"])
    return _table(rows)


ResultFile = tuple[Path, list[bench.Result], dict[str, Any], dict[str, Any]]


def _result_files(root: Path, family: str, newest: bool) -> list[ResultFile]:
    """Result files with a table of the family, by name; newest: one for each limit."""
    found: list[ResultFile] = []
    for path in sorted((root / _RESULTS).glob("*.json")):
        results, env, peaks = bench.from_json(path.read_text(encoding="utf-8"))
        if any(not r.series and r.family == family for r in results):
            found.append((path, results, env, peaks))
    if not newest:
        return found
    latest: dict[str, ResultFile] = {}
    for file in sorted(found, key=lambda f: str(f[2]["date"])):
        latest[str(file[2]["restricted"])] = file
    return list(latest.values())


def measured(root: Path, table_only: bool = False, family: str = "flash") -> str:
    """Every committed result file of a family: environment, then the table of its cases.

    table_only: the tables alone, of the newest file for each limit of instruction sets.
    """
    parts: list[str] = []
    for path, results, env, peaks in _result_files(root, family, newest=table_only):
        rows = [r for r in results if not r.series and r.family == family]
        limit = "" if env["restricted"] == "no" else f", both sides limited to {env['restricted']}"
        title = f"{env['device']}, {env['threads']} threads, kernels {env['isa']}{limit}"
        source = f"[`{path.name}`]({'docs/' if table_only else ''}measurements/{path.name})"
        if table_only:
            note = f"commit `{env['commit']}`, {env['date']}, {source}"
            parts.append(f"**{title}** ({note})\n\n{summary_table(rows)}")
        else:
            table = bench.markdown_table(rows)
            parts.append(
                f"### {title}\n\nFrom {source}.\n\n{environment_table(env, peaks)}\n{table}\n\n"
                f"{bench.load_note(rows).capitalize()}.\n"
            )
    return "\n".join(parts) or "No results are committed yet.\n"


def summary_table(results: Sequence[bench.Result]) -> str:
    """One row per case and peer, for the README: ratio, rate, fraction of peak, error."""
    rows = [["case", "against", "speed-up", "rate", "of peak", "error (peer's)"]]
    for r in results:
        for v in r.versus:
            ours = f"{r.error.max_abs:.1e}" if r.error else "-"
            theirs = f" ({v.error.max_abs:.1e})" if v.error else ""
            cells = [r.title, v.peer, f"{v.ratio:.2f}x", f"{r.rate:.0f} {r.unit}"]
            rows.append([*cells, f"{r.peak_fraction:.0%}", ours + theirs])
    return _table(rows)


# What the decision guide compares: result files, and the cases of each.
_GUIDE = {
    "flash-zen4-avx512.json": ("forward-window-fp32-s4096-d64", "decode-bf16-h32-8-s32768-d128"),
    "linear-zen5-avx512.json": ("linear_attention-fwd-fp32-t8192", "gla-fwd-fp32-t8192"),
    "linear-zen5-avx512-backward.json": ("gla-fwd+bwd-fp32-t8192",),
    "paged-zen5-avx512.json": ("decode-bf16-b8-s8192-p16", "decode-int8-b8-s8192-p16",
                               "decode-int4-b8-s8192-p16", "cascade-bf16-b16-s4096-p16"),
    "reductions-zen4-avx512-s4096.json": ("column_sums-fp32-s4096", "topk_keys-fp32-s4096"),
}  # fmt: skip


def guide_table(root: Path) -> str:
    """One row per case of the decision guide and peer: our time, and how much longer theirs is."""
    rows = [["case", "ms", "against", "takes", "from"]]
    for name, cases in _GUIDE.items():
        results, _, _ = bench.from_json((root / _RESULTS / name).read_text(encoding="utf-8"))
        found = {r.name: r for r in results if not r.series}
        for result in map(found.__getitem__, cases):
            ours = f"{1e3 * result.timing.median_s:.1f}"
            for v in result.versus:
                source = f"[`{name.removesuffix('.json')}`](measurements/{name})"
                rows.append([result.title, ours, v.peer, f"{v.ratio:.2f}x", source])
    return _table(rows)


GENERATORS: dict[str, Callable[[Path], str]] = {
    "guide": guide_table,
    "support-matrix-flash": lambda root: support_matrix("flash"),
    "support-matrix-block_sparse": lambda root: support_matrix("block_sparse"),
    "measurements-block_sparse": lambda root: measured(root, family="block_sparse"),
    "support-matrix-nsa": lambda root: support_matrix("nsa"),
    "support-matrix-cope": lambda root: support_matrix("cope"),
    "support-matrix-reductions": lambda root: support_matrix("reductions"),
    "measurements-reductions": lambda root: measured(root, family="reductions"),
    "support-matrix-paged": lambda root: support_matrix("paged"),
    "measurements-paged": lambda root: measured(root, family="paged"),
    "support-matrix-retrieval": lambda root: support_matrix("retrieval"),
    "support-matrix-linear": lambda root: support_matrix("linear"),
    "measurements-retrieval": lambda root: measured(root, family="retrieval"),
    "measurements-linear": lambda root: measured(root, family="linear"),
    "crossovers": crossover.table,
    "quality-policies": quality_report.policies_table,
    "training-char-lm": training.char_lm_table,
    "training-smollm2": training.smollm2_table,
    "training-block-sparse": training.block_sparse_table,
    "training-needle": training.needle_table,
    "support-summary": lambda root: short_matrix("flash"),
    "measurements": measured,
    "measurements-summary": lambda root: measured(root, table_only=True),
}


def render_page(text: str, root: Path) -> str:
    """A page with its generated parts made anew.

    Raises:
        ValueError: a part has no generator.
    """

    def fill(match: re.Match[str]) -> str:
        begin, name, end = match.groups()
        if name not in GENERATORS:
            raise ValueError(f"attnforge.testing.docs: no generator is called {name!r}")
        return f"{begin}{GENERATORS[name](root)}{end}"

    return _PART.sub(fill, text)


def stale_pages(root: Path) -> dict[Path, str]:
    """Pages whose text differs from what the generators give, with the new text."""
    stale: dict[Path, str] = {}
    for pattern in _PAGES:
        for path in sorted(root.glob(pattern)):
            text = path.read_text(encoding="utf-8")
            new = render_page(text, root)
            if new != text:
                stale[path] = new
    return stale


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line of this module; the exit status."""
    parser = argparse.ArgumentParser(prog="python -m attnforge.testing.docs", description=__doc__)
    parser.add_argument(
        "--check", action="store_true", help="change nothing, exit 1 if out of date"
    )
    parser.add_argument("--root", type=Path, default=Path.cwd(), help="the source tree")
    options = parser.parse_args(arguments)
    stale = stale_pages(options.root)
    for path, text in stale.items():
        print(f"{'out of date' if options.check else 'rewrote'}: {path.relative_to(options.root)}")
        if not options.check:
            path.write_text(text, encoding="utf-8")
    return 1 if options.check and stale else 0


if __name__ == "__main__":
    sys.exit(main())
