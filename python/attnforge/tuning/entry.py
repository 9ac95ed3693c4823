"""One result of tuning, its JSON form, and its key: a digest of what it holds for."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from attnforge.registry import tuned
from attnforge.registry.predicates import dtype_name
from attnforge.registry.space import Scalar
from attnforge.registry.spec import Request

__all__ = ["SCHEMA", "Entry", "Problem"]

SCHEMA = 1
_MAX_BYTES = 16 << 10  # of one entry: a real one has about 1 KiB
_SCALARS = (int, float, str, bool)


@dataclass(frozen=True)
class Problem:
    """A bucket: exact in dtype, dims and features, powers of two in sizes."""

    dtype: str
    dims: Mapping[str, int]
    features: tuple[str, ...]
    bucket: Mapping[str, int]

    @classmethod
    def of(cls, request: Request) -> Problem:
        """The bucket that a request with sizes falls into."""
        return cls(
            dtype_name(request.dtype),
            dict(request.dims),
            tuple(sorted(request.features)),
            tuned.bucket(dict(request.sizes)),
        )

    @classmethod
    def alone(cls, request: Request) -> Problem:
        """What a request has in common with every call that its sequences may stand in.

        No length: of a call only the longest shows. No layout: packed or dense, each sequence is
        the same.
        """
        how = tuned.operator(request.op)
        layouts = how.layouts if how is not None else frozenset()
        return cls(
            dtype_name(request.dtype),
            dict(request.dims),
            tuple(sorted(request.features - layouts)),
            tuned.bucket_alone(request.op, dict(request.sizes)),
        )

    def same_but_sizes(self, other: Problem) -> bool:
        """Whether only the bucket differs, in values and not in names."""
        return (
            self.dtype == other.dtype
            and self.dims == other.dims
            and self.features == other.features
            and self.bucket.keys() == other.bucket.keys()
        )

    def __str__(self) -> str:
        return " ".join(f"{name}={size}" for name, size in self.bucket.items())


@dataclass(frozen=True)
class Entry:
    """The winning config of one kernel for one bucket in one environment.

    over: kernels with a better score that it beat, with the digest of their source then; not
        empty makes it the preferred kernel of the bucket.
    measured: provenance: ``date commit gain gain_low gain_high median_s default_s spread repeats
        tried wrong sizes``. ``gain`` is time of the default over time of the config.
    """

    spec: str
    problem: Problem
    environment: Mapping[str, Scalar]
    config: Mapping[str, Scalar]
    over: Mapping[str, str] = field(default_factory=dict)
    measured: Mapping[str, Any] = field(default_factory=dict)

    @property
    def key(self) -> str:
        """A digest of what the entry holds for: the same bucket in another environment differs."""
        held_for = {k: v for k, v in self.to_json().items() if k in _IDENTITY}
        text = json.dumps(held_for, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()[:24]

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "schema": SCHEMA,
            "spec": self.spec,
            "problem": {
                "dtype": self.problem.dtype,
                "dims": dict(self.problem.dims),
                "features": list(self.problem.features),
                "bucket": dict(self.problem.bucket),
            },
            "environment": dict(self.environment),
            "config": dict(self.config),
            "over": dict(self.over),
            "measured": dict(self.measured),
        }

    @classmethod
    def from_json(cls, data: Any) -> Entry | None:
        """The entry, or None if it has another schema. ValueError if it is not well-formed.

        The file is data from outside: every type is checked, and nothing in it is executed.
        """
        if not isinstance(data, dict) or len(json.dumps(data)) > _MAX_BYTES:
            raise ValueError("not an object of reasonable size")
        if data.get("schema") != SCHEMA:
            return None
        try:
            problem = data["problem"]
            entry = cls(
                _text(data["spec"]),
                Problem(
                    _text(problem["dtype"]),
                    _mapping(problem["dims"], (int,)),
                    tuple(_text(name) for name in problem["features"]),
                    _mapping(problem["bucket"], (int,)),
                ),
                _mapping(data["environment"], _SCALARS),
                _mapping(data["config"], _SCALARS),
                _mapping(data["over"], (str,)),
                _mapping(data["measured"], (*_SCALARS, dict)),
            )
            float(entry.measured["gain"]), _text(entry.measured["date"])
        except (KeyError, TypeError) as error:
            raise ValueError(f"{type(error).__name__}: {error}") from None
        return entry


_IDENTITY = ("spec", "problem", "environment")


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is not a string")
    return value


def _mapping(value: Any, kinds: tuple[type, ...]) -> dict[str, Any]:
    if not isinstance(value, dict) or not all(type(v) in kinds for v in value.values()):
        raise TypeError(f"{value!r} is not an object of {'/'.join(k.__name__ for k in kinds)}")
    return value
