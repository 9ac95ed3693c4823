"""Tables and figure of trained examples come from the committed runs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from attnforge.testing import training


def test_tables(tmp_path: Path) -> None:
    folder = tmp_path / "docs" / "measurements" / "training"
    folder.mkdir(parents=True)
    runs = [
        {"layer": name, "parameters": 12345, "losses": [[0, 6.0], [20, 5.0], [40, last]]}
        for name, last in (("worse", 3.25), ("better", 2.5))
    ]
    (folder / "char_lm.json").write_text(json.dumps({"runs": runs}))
    lines = training.char_lm_table(tmp_path).splitlines()
    assert lines[0] == "| layer | parameters | step 0 | step 40 |"
    assert lines[2:] == ["| better | 12 k | 6.00 | 2.50 |", "| worse | 12 k | 6.00 | 3.25 |"]
    with pytest.raises(FileNotFoundError):
        training.smollm2_table(tmp_path)
