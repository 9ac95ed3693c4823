"""``Config`` and ``SearchSpace``: what may be tuned about a kernel, declared beside the kernel.

    SPACE = SearchSpace(
        parameters={"block_m": [32, 64, 128], "warps": [4, 8]},
        default={"block_m": 64, "warps": 4},
        reason="64 rows fill the registers at head_dim 128",
        constraints=(lambda config, request: None if fits(config, request) else "over 164 KiB",),
    )
    KernelSpec(..., launch=launch, space=SPACE)     # launch(..., config: Config)

A config is identified by its content, never by an index, so that a space may grow, shrink or be
reordered without giving old results another meaning.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from attnforge.registry.spec import Request

__all__ = ["Config", "Constraint", "Scalar", "SearchSpace"]

Scalar = int | float | str | bool
"""What a parameter may be: everything that JSON writes and reads without loss."""

Constraint = Callable[["Config", "Request"], "str | None"]
"""None if a config can serve the request, else the reason as a phrase."""


class Config(Mapping[str, Scalar]):
    """A frozen mapping of parameters, equal to another by its content.

    ``text`` is its canonical JSON (keys sorted, no spaces), ``row`` its values in the order of
    the search space: what a launcher hands to native code.
    """

    __slots__ = ("_values", "row", "text")

    _values: dict[str, Scalar]
    row: tuple[Scalar, ...]
    text: str

    def __init__(self, values: Mapping[str, Scalar]) -> None:
        for name, value in values.items():
            if not isinstance(name, str) or not isinstance(value, (int, float, str, bool)):
                raise TypeError(
                    f"attnforge.Config: {name!r} is {type(value).__name__} {value!r}; want a "
                    "string as name and an int, float, str or bool as value"
                )
            if isinstance(value, float) and not math.isfinite(value):
                raise ValueError(f"attnforge.Config: {name!r} is {value}; want a finite number")
        text = json.dumps(dict(values), sort_keys=True, separators=(",", ":"))
        object.__setattr__(self, "_values", dict(values))
        object.__setattr__(self, "row", tuple(values.values()))
        object.__setattr__(self, "text", text)

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(f"attnforge.Config is frozen; make another instead of setting {name}")

    def __getitem__(self, name: str) -> Scalar:
        return self._values[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self.row)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Config) and self.text == other.text

    def __hash__(self) -> int:
        return hash(self.text)

    def __str__(self) -> str:
        return " ".join(f"{name}={value}" for name, value in self.items())

    def __repr__(self) -> str:
        return f"Config({self._values!r})"


class SearchSpace:
    """The configs of one kernel: a grid of parameters, less what the constraints exclude.

    parameters: values to try by name, in the order of ``Config.row``.
    default: the config of an untuned call, or a function of the request that gives it. It need
        not lie on the grid, and no constraint is asked about it.
    reason: one phrase that says why that is the default; ``explain`` shows it.
    constraints: called with (config, request); None or a reason, as predicates do.
    model: expected time of (config, request) in any unit. Tuning then measures only the most
        promising configs.
    environment: what beside the device the speed depends on, such as ISA level and threads.
        Results hold for equal values only.
    source: a digest of the kernel's source; default: of the file the launcher stands in. Results
        hold for an equal digest only.
    """

    def __init__(
        self,
        parameters: Mapping[str, Sequence[Scalar]],
        default: Mapping[str, Scalar] | Callable[[Request], Mapping[str, Scalar]],
        reason: str,
        *,
        constraints: Sequence[Constraint] = (),
        model: Callable[[Config, Request], float] | None = None,
        environment: Callable[[], Mapping[str, Scalar]] | None = None,
        source: Callable[[], str] | None = None,
    ) -> None:
        if not parameters or not all(parameters.values()):
            raise ValueError(
                f"attnforge.SearchSpace: parameters are {dict(parameters)}; want at least one name "
                "with at least one value"
            )
        self.parameters = {name: tuple(values) for name, values in parameters.items()}
        self.constraints = tuple(constraints)
        self.reason, self.model, self.source = reason, model, source
        self.environment = environment or dict
        self._default = default
        if not callable(default):
            self.config(default)  # a wrong name shows where it stands

    def config(self, values: Mapping[str, Scalar]) -> Config:
        """``values`` in the order of the parameters; ValueError unless the names are the same."""
        if values.keys() != self.parameters.keys():
            raise ValueError(
                f"attnforge.SearchSpace: a config of {', '.join(sorted(values)) or 'nothing'}; "
                f"want {', '.join(self.parameters)}"
            )
        return Config({name: values[name] for name in self.parameters})

    def default(self, request: Request) -> Config:
        """The config of an untuned call."""
        return self.config(self._default(request) if callable(self._default) else self._default)

    def reasons(self, config: Config, request: Request) -> tuple[str, ...]:
        """Why ``config`` cannot serve ``request``: empty for the default and what may be tried."""
        if config == self.default(request):
            return ()
        foreign = [
            f"{name} {value!r} is not one of {', '.join(map(repr, self.parameters[name]))}"
            for name, value in config.items()
            if not any(value is v or (type(value) is type(v) and value == v)
                       for v in self.parameters[name])
        ]  # fmt: skip
        if foreign:
            return tuple(foreign)
        said = (need(config, request) for need in self.constraints)
        return tuple(reason for reason in said if reason is not None)

    def configs(self, request: Request, limit: int | None = None) -> list[Config]:
        """The default first, then what may be tried; with a model its best ``limit`` of them."""
        default = self.default(request)
        grid = itertools.product(*self.parameters.values())
        tried = (Config(dict(zip(self.parameters, row, strict=True))) for row in grid)
        found = [c for c in tried if c != default and not self.reasons(c, request)]
        if self.model is not None:
            model = self.model
            found.sort(key=lambda c: model(c, request))
            found = found[:limit]
        return [default, *found]

    def describe(self) -> dict[str, list[Scalar]]:
        """The grid as plain data."""
        return {name: list(values) for name, values in self.parameters.items()}
