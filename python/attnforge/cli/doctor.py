"""``attnforge doctor``: what is installed, what works, and what to do about the rest."""

from __future__ import annotations

import json
from typing import Any

import typer

from attnforge.diagnose import examine

__all__ = ["register"]


def _lines(report: dict[str, Any]) -> list[str]:
    native, t = report["native"], report["torch"]
    lines = [
        f"attnforge {report['attnforge']}  python {report['python']}  {report['platform']}",
        f"torch     {t['version']}  {t['threads']} threads  cpu capability {t['cpu_capability']}"
        f"  cuda {t['cuda'] or 'not built in'}",
    ]
    lines += [f"device    {name}" for name in t["devices"]]
    if native["loaded"]:
        lines.append(
            f"native    {native['path']}  isa {native['isa_in_force']} "
            f"(asked {native['isa_requested']}; runs here: {', '.join(native['isa_levels'])})"
        )
    else:
        lines.append(f"native    not in use: {native['reason']}")
    host = report["host"]
    if host["present"] and host.get("cpu_features"):
        lines.append(f"cpu       {host['cpu_features']}")
    lines += [f"setting   {k}={v}" for k, v in report["settings"].items() if v not in (None, False)]
    for name, entry in report["backends"].items():
        state = "ok" if entry["available"] else f"not available: {entry['reason']}"
        lines.append(f"backend   {name:10} {len(entry['kernels'])} kernels  {state}")
    lines += [_tuning_line(report["tuning"])] if report["tuning"] else []
    lines += [f"problem   {text}" for text in report["problems"]]
    lines.append("healthy" if not report["problems"] else f"{len(report['problems'])} problem(s)")
    return lines


def _tuning_line(rows: list[dict[str, Any]]) -> str:
    """How many results of the package are for this machine, and why some are not used."""
    idle = sorted({f"{row['kernel']}: {row['not_used']}" for row in rows if row["not_used"]})
    used = sum(not row["not_used"] for row in rows)
    text = f"tuning    {used} of {len(rows)} results that come with the package are in use"
    return f"{text} (not: {'; '.join(idle)})" if idle else text


def register(app: typer.Typer) -> None:
    """Add the command ``doctor``."""

    @app.command()
    def doctor(
        as_json: bool = typer.Option(False, "--json", help="The same as JSON."),
    ) -> None:
        """Report the installation: torch, native library, ISA levels, backends.

        Exit code 1 if something is broken or missing.
        """
        report = examine()
        typer.echo(json.dumps(report, indent=2) if as_json else "\n".join(_lines(report)))
        if report["problems"]:
            raise typer.Exit(1)
