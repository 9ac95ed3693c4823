"""Makes the tables of tuned configs that come with the package, from a run on this machine.

    python tools/tuning_tables.py flash --budget 600      # measure, confirm, write

A winner is kept only if it also wins in two fresh processes, each by more than the margin and the
noise. Entries hold for the kernels' source as it is now: run this last before a release, on a
quiet machine. An operator without a winner gets no file, and an old file of this device is removed.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from pathlib import Path

PROCESSES = 2


def winners(text: str) -> dict[str, object]:
    """The parsed file of results without entries where the default stayed; {} if none is left."""
    data: dict[str, object] = json.loads(text)
    entries = data["entries"]
    assert isinstance(entries, dict)
    kept = {key: entry for key, entry in entries.items() if entry["measured"]["gain"] > 1.0}
    return {**data, "entries": kept} if kept else {}


def main() -> None:
    parser = argparse.ArgumentParser(description="Tuned configs that come with the package.")
    parser.add_argument("what", help="a family or an operator, as for attnforge tune")
    parser.add_argument("--budget", type=float, default=600.0, help="seconds for everything")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        os.environ["ATTNFORGE_CACHE_DIR"] = folder
        import attnforge
        from attnforge.tuning import store

        report = attnforge.tune(options.what, budget=options.budget, confirm=PROCESSES)
        print(report)
        target = store.tables_directory()
        for path in sorted(Path(folder, "tune").glob("*.json")):
            kept, shipped = winners(path.read_text(encoding="utf-8")), target / path.name
            if kept:
                target.mkdir(exist_ok=True)
                store.write_text(shipped, json.dumps(kept, indent=1) + "\n")
                print(f"wrote {shipped}")
            elif shipped.exists():
                shipped.unlink()
                print(f"removed {shipped}")


if __name__ == "__main__":
    main()
