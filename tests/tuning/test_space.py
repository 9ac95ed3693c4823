"""Configs by content, and what a search space lets through."""

from __future__ import annotations

import json
import math

import pytest
import torch

from attnforge.registry import Config, Request, SearchSpace

REQUEST = Request("op", "cpu", "", torch.float32, (("head_dim", 128),))


def test_config_is_its_content() -> None:
    a, b = Config({"m": 64, "n": 128}), Config({"n": 128, "m": 64})
    assert a == b
    assert hash(a) == hash(b)
    assert a.text == '{"m":64,"n":128}'
    assert json.loads(a.text) == dict(a)
    assert (a.row, b.row) == ((64, 128), (128, 64))
    assert a != Config({"m": 64, "n": 256})
    assert Config({"x": True}) != Config({"x": 1})
    assert str(a) == "m=64 n=128"


def test_config_is_frozen_and_plain() -> None:
    config = Config({"m": 64})
    with pytest.raises(AttributeError, match="frozen"):
        config.row = (1,)
    with pytest.raises(TypeError):
        config["m"] = 1  # type: ignore[index]
    with pytest.raises(TypeError, match="is list"):
        Config({"m": [1]})  # type: ignore[dict-item]
    with pytest.raises(ValueError, match="finite"):
        Config({"m": math.nan})


def space(**options: object) -> SearchSpace:
    return SearchSpace(
        {"m": [32, 64], "n": [64, 128, 256]},
        {"m": 48, "n": 0},  # off the grid: the kernel's own choice
        "48 suits every register tile",
        constraints=(
            lambda c, r: "too large" if int(c["m"]) * int(c["n"]) > 8192 else None,
            lambda c, r: "narrow" if (r.dim("head_dim") or 0) > 64 and c["n"] == 64 else None,
        ),
        **options,  # type: ignore[arg-type]
    )


def test_grid_less_constraints_with_the_default_first() -> None:
    found = [c.text for c in space().configs(REQUEST)]
    assert found == ['{"m":48,"n":0}', '{"m":32,"n":128}', '{"m":32,"n":256}', '{"m":64,"n":128}']
    assert space().reasons(Config({"m": 64, "n": 256}), REQUEST) == ("too large",)
    assert "48 is not one of 32, 64" in space().reasons(Config({"m": 48, "n": 64}), REQUEST)[0]
    assert space().reasons(Config({"m": 48, "n": 0}), REQUEST) == ()


def test_a_parameter_keeps_its_type() -> None:
    flags = SearchSpace({"on": [0, 1]}, {"on": 0}, "off is plain")
    assert flags.reasons(Config({"on": True}), REQUEST) != ()


def test_model_ranks_and_prunes() -> None:
    ranked = space(model=lambda c, r: -float(c["m"]) - float(c["n"]) / 1000)
    assert [dict(c) for c in ranked.configs(REQUEST, limit=1)[1:]] == [{"m": 64, "n": 128}]
    assert len(space().configs(REQUEST, limit=1)) == 4  # without a model everything is measured


def test_default_may_depend_on_the_request() -> None:
    by_dim = SearchSpace({"m": [32, 64]}, lambda r: {"m": r.dim("head_dim") or 0}, "one row, one m")
    assert by_dim.default(REQUEST) == Config({"m": 128})


def test_names_must_fit() -> None:
    with pytest.raises(ValueError, match="want m"):
        SearchSpace({"m": [1]}, {"n": 1}, "")
    with pytest.raises(ValueError, match="at least one value"):
        SearchSpace({"m": []}, {"m": 1}, "")
    with pytest.raises(ValueError, match="want m"):
        SearchSpace({"m": [1]}, {"m": 1}, "").config({"m": 1, "n": 2})
