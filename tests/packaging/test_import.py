"""Importing attnforge is cheap and silent: it prints, patches, compiles and initialises nothing."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
BUDGET_MS = 150.0  # over torch
BUDGET_PART = 0.15  # of torch's own import, where a slow machine makes that more


def python(code: str) -> subprocess.CompletedProcess[str]:
    env = {k: v for k, v in os.environ.items() if not k.startswith("ATTNFORGE_")}
    env["PYTHONPATH"] = str(ROOT / "python")
    return subprocess.run(
        [sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True
    )


def test_import_time() -> None:
    code = (
        "import time; t = time.perf_counter(); import torch; u = time.perf_counter(); "
        "import attnforge; print(1e3 * (u - t), 1e3 * (time.perf_counter() - u))"
    )
    # The least of some runs: the machine may be busy, the import is the same every time.
    runs = [[float(x) for x in python(code).stdout.split()] for _ in range(3)]
    torch, mine = (min(times) for times in zip(*runs, strict=True))
    budget = max(BUDGET_MS, BUDGET_PART * torch)
    assert mine < budget, f"import attnforge takes {mine:.0f} ms over torch's {torch:.0f}: {runs}"


def test_import_is_silent_and_lazy() -> None:
    code = (
        "import sys, torch\n"
        "before = set(sys.modules); threads = torch.get_num_threads(); kept = torch.nn.functional\n"
        "sdpa = kept.scaled_dot_product_attention\n"
        "import attnforge\n"
        "assert torch.get_num_threads() == threads\n"
        "assert kept.scaled_dot_product_attention is sdpa\n"
        "assert not torch.cuda.is_initialized()\n"
        "new = {name.split('.')[0] for name in set(sys.modules) - before}\n"
        "heavy = {'transformers', 'triton', 'cupy', 'matplotlib', 'rich', 'typer', 'gguf'}\n"
        "assert not new & heavy, new & heavy\n"
        "maps = open('/proc/self/maps').read() if sys.platform == 'linux' else ''\n"
        "assert 'libattnforge' not in maps\n"
    )
    done = python(code)
    assert (done.stdout, done.stderr) == ("", "")


def test_what_waits_is_there() -> None:
    """Names that are imported at their first use are what they say, and so are modules."""
    code = (
        "import attnforge\n"
        "from types import ModuleType\n"
        "found = {name: getattr(attnforge, name) for name in attnforge.__all__}\n"
        "print(*sorted(name for name, x in found.items() if isinstance(x, ModuleType)))\n"
    )
    assert python(code).stdout.split() == ["jit", "patterns", "reductions", "retrieval"]
