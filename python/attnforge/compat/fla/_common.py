"""What the functions share: refusals, reversed time, layouts of states."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar

import torch
from torch import Tensor

from attnforge.ops._checks import fail

__all__ = [
    "Result",
    "backwards",
    "known",
    "old_state_name",
    "run",
]

_TUNING = {
    *("chunk_size", "chunk_indices", "cu_seqlens_cpu", "checkpoint_level", "disable_recompute"),
}
Result = tuple[Tensor, Any]
Function = TypeVar("Function", bound=Callable[..., Any])


def old_state_name(function: Function) -> Function:
    """``function`` that knows ``state_v_first`` by its former name, ``transpose_state_layout``."""

    @wraps(function)
    def renamed(*args: Any, **options: Any) -> Any:
        if "transpose_state_layout" in options:
            if "state_v_first" in options:
                fail(
                    function.__name__,
                    "transpose_state_layout is given beside state_v_first; want one of the names",
                )
            warnings.warn(
                "transpose_state_layout has been renamed to state_v_first",
                DeprecationWarning,
                stacklevel=2,
            )
            options["state_v_first"] = options.pop("transpose_state_layout")
        return function(*args, **options)

    return renamed  # type: ignore[return-value]


def known(op: str, rest: dict[str, Any]) -> None:
    """Refuse keywords that would change the result and are not served."""
    for name, value in rest.items():
        if name not in _TUNING and value not in (None, False):
            fail(op, f"{name} is {value!r}; want it left out: this form of fla's has no "
                     "counterpart here")  # fmt: skip


def backwards(x: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """x with time running backwards, within each sequence."""
    if cu_seqlens is None:
        return x.flip(1)
    token = torch.arange(x.shape[1], device=x.device)
    bounds = cu_seqlens.to(torch.int64)
    of = torch.searchsorted(bounds[1:].contiguous(), token, right=True)
    of = of.clamp_max(max(bounds.shape[0] - 2, 0))
    return x[:, bounds[of] + bounds[of + 1] - 1 - token]


def run(
    op: Callable[..., Result],
    tensors: list[Tensor | None],
    *,
    initial_state: Any,
    cu_seqlens: Tensor | None,
    reverse: bool = False,
    state_v_first: bool = False,
    **options: Any,
) -> Result:
    """``op`` with time reversed or states transposed, if asked for."""
    if reverse:
        tensors = [None if x is None else backwards(x, cu_seqlens) for x in tensors]
    if state_v_first and initial_state is not None:
        initial_state = initial_state.transpose(-1, -2)
    if isinstance(initial_state, Tensor):
        initial_state = initial_state.float()
    out, state = op(*tensors, initial_state=initial_state, cu_seqlens=cu_seqlens, **options)
    if reverse:
        out = backwards(out, cu_seqlens)
    if state_v_first and state is not None:
        state = state.transpose(-1, -2)
    return out, state
