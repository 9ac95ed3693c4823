"""`attnforge bench FAMILY`: kernels against torch on this machine, as a table, JSON and plots."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import typer

from attnforge.cli._progress import progress_bar

__all__ = ["register"]

# Limits torch's dispatcher, oneDNN, MKL and attnforge itself. All of them read their variable when
# they are loaded, so a restricted run is a new process.
_RESTRICT = {
    "avx2": {
        "ATEN_CPU_CAPABILITY": "avx2",
        "ONEDNN_MAX_CPU_ISA": "AVX2",
        "MKL_ENABLE_INSTRUCTIONS": "AVX2",
        "ATTNFORGE_CPU_ISA": "avx2",
    }
}


def _run_restricted(isa: str, arguments: list[str]) -> int:
    """This same command in a process where both sides are limited to `isa`; its exit status."""
    limited = ["--isa", isa, "--already-restricted"]
    command = [sys.executable, "-m", "attnforge", "bench", *arguments, *limited]
    # Inductor's graph cache does not know the limit: torch 2.13 would compile what it generated for
    # AVX-512 with AVX2 flags, and flex_attention would give wrong results.
    with tempfile.TemporaryDirectory(prefix="attnforge-bench-") as cache:
        env = {**os.environ, **_RESTRICT[isa], "TORCHINDUCTOR_CACHE_DIR": cache}
        return subprocess.run(command, env=env, check=False).returncode


def _arguments(family: str, quick: bool, options: Mapping[str, object]) -> list[str]:
    """The command line that these arguments came from."""
    words = [family, *(["--quick"] if quick else [])]
    for name, value in options.items():
        if value is not None:
            words += [f"--{name}", str(value)]
    return words


def _check_device(device: str, isa: str | None) -> None:
    if device not in ("cpu", "cuda"):
        raise typer.BadParameter(f"{device!r} is not cpu or cuda", param_hint="--device")
    if device == "cuda":
        import torch

        if isa is not None:
            raise typer.BadParameter("a GPU has no such level", param_hint="--isa")
        if not torch.cuda.is_available():
            raise typer.BadParameter("no CUDA device is there", param_hint="--device")


def _bench(
    family: Annotated[str, typer.Argument(help="Family to measure: flash, linear, reductions.")],
    quick: Annotated[bool, typer.Option("--quick", help="5 repeats instead of 15.")] = False,
    isa: Annotated[
        str | None,
        typer.Option("--isa", help="Limit torch and attnforge alike to this level: avx2."),
    ] = None,
    threads: Annotated[
        int | None,
        typer.Option("--threads", min=1, help="Threads for both sides (default: torch's)."),
    ] = None,
    json_file: Annotated[
        Path | None,
        typer.Option("--json", help="Write results, environment and every burst to this file."),
    ] = None,
    plot: Annotated[
        Path | None,
        typer.Option("--plot", help="Sweep sequence lengths too; write PNG plots to this folder."),
    ] = None,
    case: Annotated[
        str | None,
        typer.Option("--case", help="Only cases whose name matches this word or shell pattern."),
    ] = None,
    backend: Annotated[
        str | None,
        typer.Option("--backend", help="Force a backend for attnforge's side."),
    ] = None,
    device: Annotated[
        str, typer.Option("--device", help="cpu, or cuda for the current GPU.")
    ] = "cpu",
    already_restricted: Annotated[bool, typer.Option("--already-restricted", hidden=True)] = False,
) -> None:
    """Measure a family against torch: paired ratios, fraction of the same-run peak, error."""
    if isa is not None and isa not in _RESTRICT:
        raise typer.BadParameter(
            f"{isa!r} is not one of {', '.join(_RESTRICT)}", param_hint="--isa"
        )
    if isa is not None and not already_restricted:
        given = {
            "threads": threads, "json": json_file, "plot": plot, "case": case, "backend": backend
        }  # fmt: skip
        raise typer.Exit(_run_restricted(isa, _arguments(family, quick, given)))

    from attnforge.testing import bench, machine
    from attnforge.testing.roofline import measure_peaks

    _check_device(device, isa)
    bench.set_threads(threads)
    try:
        cases = bench.family_cases(family, quick, device=device)
        if plot is not None:
            cases += bench.family_cases(family, quick, sweep=True, device=device)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="FAMILY") from None
    cases = bench.select_cases(cases, case)
    if not cases:
        raise typer.BadParameter(f"no case matches {case!r}", param_hint="--case")

    env = machine.environment(restricted=isa or "", device=device)
    for key, value in env.items():
        typer.echo(f"{key:>13}  {value}")
    with progress_bar() as progress:
        progress("peaks of this machine", 0, len(cases))
        peaks = measure_peaks(device)
        results = bench.run_cases(cases, progress, peaks=peaks, backend=backend)
    for part in ([r for r in results if not r.series], [r for r in results if r.series]):
        if part:
            typer.echo(f"\n{bench.render_table(part)}\n")
    for name, entry in peaks.as_dict().items():
        typer.echo(
            f"same-run peak, {name}: {entry['peak']:.1f} {entry['unit']} ({entry['source']})"
        )
    typer.echo(bench.load_note(results))
    typer.echo(
        "ratio: median of paired bursts, above 1 attnforge is faster\n"
        "error: max |x - float64| [largest fraction of the per-element error bound]"
    )
    if json_file is not None:
        json_file.parent.mkdir(parents=True, exist_ok=True)
        json_file.write_text(bench.to_json(results, env, peaks), encoding="utf-8")
        typer.echo(f"wrote {json_file}")
    if plot is not None:
        from attnforge.testing import plots

        for path in plots.save_plots(results, plot, env, peaks.as_dict(), name=family):
            typer.echo(f"wrote {path}")


def register(app: typer.Typer) -> None:
    """Add the command to the application."""
    app.command("bench")(_bench)
