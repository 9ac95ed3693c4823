"""tools/peer_tests.py on a checkout made up here: what it draws, aliases and counts."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

TESTS = """
import pytest
import torch
from flash_attn import flash_attn_func, flash_attn_with_kvcache, newest_func
from flash_attn.bert_padding import unpad_input
from flash_attn.flash_attn_interface import flash_attn_gpu

capability = torch.cuda.get_device_capability("cuda")

@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
@pytest.mark.parametrize("seqlen_q,seqlen_k", [(3, 5), (5, 3), (9, 4096)])
@pytest.mark.parametrize("d", [8, 16, 24])
def test_attention(seqlen_q, seqlen_k, d, dropout_p):
    assert dropout_p == 0.0
    q = torch.zeros(1, seqlen_q, 2, d, device="cuda")
    k = torch.ones(1, seqlen_k, 2, d).to("cuda")
    assert torch.allclose(flash_attn_func(q, k, k), torch.ones_like(q))

def test_wrong():
    assert newest_func.__name__ == "x"

def test_absent():
    flash_attn_gpu.fwd(1)

def test_refused():
    x = torch.zeros(1, 1, 1, 8)
    flash_attn_with_kvcache(x, x, x, x)

def test_flash_attn_race_condition():
    assert False
"""


@pytest.mark.exhaustive
def test_counts_by_reason(tmp_path: Path) -> None:
    (tmp_path / "flash_attn").mkdir()
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "test_flash_attn.py").write_text(TESTS)
    path = os.pathsep.join([str(ROOT / "python"), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, str(ROOT / "tools" / "peer_tests.py"), str(tmp_path)]
    done = subprocess.run(
        [*command, "--project", "flash_attn", "--most", "4"],
        capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path},
    )  # fmt: skip
    assert done.returncode == 1, done.stdout + done.stderr
    assert "left out: sequences of more than 512" in done.stdout
    lines = re.findall(r"^ {3,}(\d+) (\w+(?: \w+)?)(?=:|$)", done.stdout, re.M)
    assert sorted((kind, int(n)) for n, kind in lines) == [
        ("failed", 1), ("left out", 1), ("left out", 6), ("left out", 6), ("not drawn", 2),
        ("passed", 4), ("refused", 1), ("skipped", 1),
    ]  # fmt: skip
