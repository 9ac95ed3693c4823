"""``attnforge explain``: which kernel a call would use, on this or any other device."""

from __future__ import annotations

import json
from typing import Any

import typer

import attnforge
from attnforge import policies

__all__ = ["parse_shape", "register"]

_FUNCTIONS = ("flash_attention", "flash_attention_varlen", "flash_decode", "merge_states")


def parse_shape(text: str, option: str) -> tuple[int, ...]:
    """``"1,4096,32,128"`` as a shape; a usage error of ``option`` if it is none."""
    try:
        shape = tuple(int(part) for part in text.split(","))
    except ValueError:
        shape = ()
    if not shape or min(shape) < 0:
        raise typer.BadParameter(f"{text!r} is no shape; want sizes such as 1,4096,32,128", None,
                                 param_hint=option)  # fmt: skip
    return shape


def _window(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise typer.BadParameter(f"{text!r}; want left,right", param_hint="--window") from None


def _step(name: str, budget: int, q: str, k: str, v: str) -> tuple[Any, list[Any]]:
    """The step of a policy of a budget, with its shapes."""
    rows = parse_shape(q, "--q")
    keys = parse_shape(k, "--k") if k else rows
    values = parse_shape(v, "--v") if v else keys
    for option, shape in (("--q", rows), ("--k", keys), ("--v", values)):
        if len(shape) != 4 or not shape[2]:
            raise typer.BadParameter(f"{shape} is no batch,rows,heads,head_dim of a step",
                                     param_hint=option)  # fmt: skip
    # A budget of MagicPIG follows from its tables; a layer of PyramidKV stands for the others.
    options: dict[str, Any] = {} if name == "lsh" else {"budget": budget}
    if name == "pyramidkv":
        options["layers"] = 1
    try:
        return policies.POLICIES[name](**options).attend, [rows, keys, values]
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--budget") from None


def _arguments(
    function: str, q: str, k: str, v: str, batch: int, parts: int
) -> tuple[list[Any], dict[str, Any]]:
    """Positional arguments and index tensors of ``function`` as shapes."""
    rows = parse_shape(q, "--q")
    keys = parse_shape(k, "--k") if k else rows
    values = parse_shape(v, "--v") if v else keys
    if function == "merge_states":
        stat = (*rows[:-3], *rows[-2:-4:-1])
        return [[rows] * parts, [stat] * parts], {}
    if function == "flash_attention_varlen":
        bounds = (batch + 1,)
        return [rows, keys, values], {"cu_seqlens_q": bounds, "cu_seqlens_k": bounds}
    return [rows, keys, values], {}


def register(app: typer.Typer) -> None:
    """Add the command ``explain``."""

    @app.command()
    def explain(
        function: str = typer.Argument(
            help=f"One of {', '.join(_FUNCTIONS)}, or a sparse decode policy: "
            f"{', '.join(policies.POLICIES)}."
        ),
        q: str = typer.Option(..., help="Shape of q (or of one part), as 1,4096,32,128."),
        k: str = typer.Option("", help="Shape of k; default: that of q."),
        v: str = typer.Option("", help="Shape of v; default: that of k."),
        dtype: str = typer.Option("fp32", help="fp32, bf16, fp16, fp8 or fp64."),
        device: str = typer.Option("cpu", help="cpu, cuda, or a GPU not here: cuda:sm_90."),
        causal: bool = typer.Option(False, "--causal/--no-causal", help="Bottom-right causal."),
        window: str = typer.Option("", help="left,right; -1 is unlimited."),
        softcap: float = typer.Option(0.0, help="Logit softcap; 0 is off."),
        alibi: bool = typer.Option(False, "--alibi", help="With ALiBi slopes."),
        sinks: bool = typer.Option(False, "--sinks", help="With a sink logit per head."),
        lengths: bool = typer.Option(False, "--seqused", help="With per-sequence key counts."),
        batch: int = typer.Option(1, help="Sequences of a varlen call."),
        parts: int = typer.Option(2, help="Parts of merge_states."),
        budget: int = typer.Option(1024, help="Keys that a policy attends to."),
        backend: str = typer.Option("", help="Force a backend, as backend= does."),
        as_json: bool = typer.Option(False, "--json", help="The same as JSON."),
    ) -> None:
        """Say which kernel a call would use and why every other one is rejected.

        Of a policy: whether a step over so many keys is dense, and from where on it is not.

        Exit code 1 if no kernel can serve the call.
        """
        asked: Any
        if function in policies.POLICIES:
            if causal or window or softcap or alibi or sinks or lengths:
                raise typer.BadParameter("a step of a policy has none of --causal, --window, "
                                         "--softcap, --alibi, --sinks, --seqused")  # fmt: skip
            asked, args = _step(function, budget, q, k, v)
            options: dict[str, Any] = {}
        elif function in _FUNCTIONS:
            asked = getattr(attnforge, function)
            args, options = _arguments(function, q, k, v, batch, parts)
        else:
            known = ", ".join((*_FUNCTIONS, *policies.POLICIES))
            raise typer.BadParameter(f"{function!r} is none of {known}")
        if function in _FUNCTIONS and function != "merge_states":
            heads = (args[0][-2],)
            count = (args[0][0],) if function != "flash_attention_varlen" else (batch,)
            used = "cache_seqlens" if function == "flash_decode" else "seqused_k"
            options["causal"] = causal
            options["softcap"] = softcap
            if window:
                options["window_size"] = _window(window)
            if alibi:
                options["alibi_slopes"] = heads
            if sinks:
                options["sinks"] = heads
            if lengths:
                options[used] = count
        if backend:
            options["backend"] = backend
        try:
            answer = attnforge.explain(asked, *args, dtype=dtype, device=device, **options)
        except (TypeError, ValueError) as error:
            typer.echo(str(error), err=True)
            raise typer.Exit(2) from error
        typer.echo(json.dumps(answer.to_dict(), indent=2) if as_json else str(answer))
        if any(d.chosen is None for d in answer.decisions):
            raise typer.Exit(1)
