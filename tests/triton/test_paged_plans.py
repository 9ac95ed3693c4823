"""Planned splits in Triton: the cases of every kernel that takes a plan
(``tests/ops/test_paged_plans.py``), and the latent pages of MLA."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
import torch

from attnforge.testing.cases import Target
from attnforge.testing.compare import compare
from attnforge.testing.paged import PagedCase, planned

pytestmark = pytest.mark.thinned(3)


@pytest.fixture
def target() -> Target:
    """What the shared cases run on."""
    return Target("triton")


def _cases() -> ModuleType:
    path = Path(__file__).resolve().parents[1] / "ops" / "test_paged_plans.py"
    spec = importlib.util.spec_from_file_location("shared_test_paged_plans", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


_plans = _cases()

test_any_plan = _plans.test_any_plan
test_one_piece_is_no_split = _plans.test_one_piece_is_no_split
test_new_numbers_in_the_same_tensors = _plans.test_new_numbers_in_the_same_tensors
test_neighbours_change_nothing = _plans.test_neighbours_change_nothing
test_a_stale_plan_is_named = _plans.test_a_stale_plan_is_named
test_room_for_no_piece = _plans.test_room_for_no_piece
test_as_on_the_cpu = _plans.as_on_the_cpu
test_many_steps = _plans.many_steps
test_unchecked_numbers = _plans.unchecked_numbers
test_unchecked_ranges = _plans.unchecked_ranges
test_no_pieces = _plans.no_pieces
test_any_numbers = _plans.any_numbers


@pytest.mark.parametrize("heads", [12, 20])
def test_latent_pages(heads: int) -> None:
    """12 and 20 rows of the one KV head, in tiles of either kind."""
    case = PagedCase(lengths=(70, 0, 33), rows=(1,) * 3, heads_q=heads, heads_k=1, head_dim=576,
                     v_head_dim=512, latent=True, dtype=torch.bfloat16, sinks=True)  # fmt: skip
    inputs = case.make()
    got = inputs.forward("triton", split_plan=planned(((16, 40, 70), (), (33,)), 6))
    compare(got, inputs.truth(rounded=True)).check()
