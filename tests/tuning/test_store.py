"""Files of results: whole at any time, shared without loss, and never trusted."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import attnforge
from attnforge.tuning import store
from attnforge.tuning.entry import Entry, Problem

OP, DEVICE = "toy_scan", "a CPU (family 1 model 2)"


def entry(rows: int = 64, **changes: Any) -> Entry:
    problem = Problem("float32", {"head_dim": 8}, ("window_right",), {"rows": rows, "pairs": 8})
    whole = Entry("toy.scan", problem, {"source": "abc", "threads": 2}, {"mode": "good"}, {},
                  {"date": "2026-01-31", "gain": 1.25})  # fmt: skip
    return replace(whole, **changes)


@pytest.fixture
def file(cache: Path) -> Path:
    """A file with one result."""
    return store.merge(OP, DEVICE, [entry()])


@pytest.fixture
def no_warnings() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


@pytest.mark.usefixtures("no_warnings")
def test_round_trip(file: Path) -> None:
    assert store.read(file) == [entry()]
    data = json.loads(file.read_text())
    assert (data["op"], data["device"]) == (OP, DEVICE)
    assert list(data["entries"]) == [entry().key]
    assert [p.name for p in file.parent.iterdir() if p.suffix == ".json"] == [file.name]


@pytest.mark.usefixtures("cache", "no_warnings")
def test_no_file_is_no_result() -> None:
    assert store.read(store.file_of(store.directory(), OP, DEVICE)) == []
    assert not store.directory().exists()  # reading makes nothing


def test_directory_is_the_users_alone(file: Path) -> None:
    assert file.parent.stat().st_mode & 0o777 == 0o700
    assert file.parent.parent.stat().st_mode & 0o777 == 0o700
    assert file.stat().st_mode & 0o777 == 0o600


def test_key_is_what_an_entry_holds_for() -> None:
    base = entry()
    assert replace(base, config={"mode": "x"}, measured={}).key == base.key
    assert entry(128).key != base.key
    assert replace(base, environment={"source": "abc", "threads": 4}).key != base.key
    assert replace(base, spec="toy.other").key != base.key


def test_merging_replaces_the_same_and_keeps_the_rest(file: Path) -> None:
    foreign = json.loads(file.read_text())
    foreign["entries"]["from the future"] = {"schema": 99, "anything": [1, 2]}
    file.write_text(json.dumps(foreign))
    better = entry(config={"mode": "better"})
    store.merge(OP, DEVICE, [better, entry(128)])
    assert sorted(store.read(file), key=lambda e: e.problem.bucket["rows"]) == [better, entry(128)]
    assert json.loads(file.read_text())["entries"]["from the future"]["anything"] == [1, 2]


WRITER = """
import sys
from attnforge.tuning import store
from attnforge.tuning.entry import Entry, Problem
def write(rows):
    problem = Problem("float32", {{"head_dim": 8}}, (), {{"rows": rows, "pairs": 8}})
    measured = {{"date": "2026-01-31", "gain": 1.0, "padding": "x" * 4000}}
    store.merge({op!r}, {device!r}, [Entry("toy.scan", problem, {{}}, {{}}, {{}}, measured)])
first, step, count = map(int, sys.argv[1:])
print("ready", flush=True)
n = first
while count < 0 or n < first + step * count:
    write(n)
    n += step
"""


def writer(*args: int) -> subprocess.Popen[str]:
    code = WRITER.format(op=OP, device=DEVICE)
    source = str(Path(attnforge.__file__).parents[1])
    env = {**os.environ, "PYTHONPATH": source}
    command = [sys.executable, "-c", code, *map(str, args)]
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True)


def wait_ready(*processes: subprocess.Popen[str]) -> None:
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"


def test_two_processes_write_at_once(cache: Path) -> None:
    """Entries of both survive, and every reader meanwhile sees a whole file."""
    even, odd = writer(0, 2, 40), writer(1, 2, 40)
    wait_ready(even, odd)
    file = store.file_of(cache, OP, DEVICE)
    reads = 0
    while even.poll() is None or odd.poll() is None:
        if file.exists():
            json.loads(file.read_text())
            reads += 1
    assert (even.returncode, odd.returncode) == (0, 0)
    rows = sorted(e.problem.bucket["rows"] for e in store.read(file))
    assert rows == list(range(80))
    assert reads > 0
    assert not list(cache.glob(".*.json.*"))  # no temporary file is left


def test_a_writer_killed_at_any_time_leaves_a_whole_file(cache: Path) -> None:
    file = store.file_of(cache, OP, DEVICE)
    known: set[int] = set()
    for turn in range(8):
        process = writer(1000 * turn, 1, -1)
        wait_ready(process)
        while not any(e.problem.bucket["rows"] >= 1000 * turn for e in store.read(file)):
            assert process.poll() is None
            time.sleep(0.002)
        time.sleep(0.013 * turn)
        process.send_signal(signal.SIGKILL)
        process.wait()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            found = {e.problem.bucket["rows"] for e in store.read(file)}
        assert known <= found  # nothing that was there is lost
        known = found
    assert len(known) >= 8
    store.merge(OP, DEVICE, [entry()])  # and the lock of the dead is free


HOSTILE = {
    "empty": b"",
    "truncated": None,
    "binary": b"\x80\x04\x95pickle",
    "list": b"[1, 2]",
    "no entries": b'{"op": "toy_scan"}',
    "entries are no object": b'{"entries": []}',
    "deep": b"[" * 200_000,
    "too large": b" " * (store.MAX_BYTES + 1),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_an_unusable_file_is_one_warning_and_no_result(file: Path, name: str) -> None:
    content = HOSTILE[name]
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2] if content is None else content)
    with pytest.warns(RuntimeWarning, match="are ignored"):
        assert store.read(file) == []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert store.read(file) == []
    # The next result is written, and the old file is out of the way, not lost.
    with warnings.catch_warnings(record=True):
        store.merge(OP, DEVICE, [entry(128)])
    assert store.read(file) == [entry(128)]
    assert file.with_name(f"{file.name}.unusable").exists()


BAD_ENTRIES: dict[str, Any] = {
    "a string": "x",
    "no problem": {"schema": 1, "spec": "toy.scan"},
    "config of lists": entry().to_json() | {"config": {"mode": ["good"]}},
    "gain is text": entry().to_json() | {"measured": {"date": "2026-01-31", "gain": "a lot"}},
    "bucket is text": entry().to_json() | {"problem": {**entry().to_json()["problem"],
                                                       "bucket": {"rows": "64"}}},
    "too large": entry().to_json() | {"config": {"mode": "x" * 20_000}},
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_ENTRIES)
def test_a_malformed_entry_costs_only_itself(file: Path, name: str) -> None:
    data = json.loads(file.read_text())
    data["entries"]["bad"] = BAD_ENTRIES[name]
    file.write_text(json.dumps(data))
    with pytest.warns(RuntimeWarning, match="1 of 2 entries are malformed"):
        assert store.read(file) == [entry()]


def refused(match: str) -> Any:
    return pytest.warns(RuntimeWarning, match=match)


def test_a_link_in_place_of_the_file_is_not_followed(file: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere.json"
    file.rename(elsewhere)
    file.symlink_to(elsewhere)
    with refused("symbolic link"):
        assert store.read(file) == []
    before = elsewhere.read_bytes()
    with warnings.catch_warnings(record=True):
        store.merge(OP, DEVICE, [entry(128)])
    assert elsewhere.read_bytes() == before
    assert store.read(file) == [entry(128)]


def test_a_link_in_place_of_the_directory_is_refused(file: Path, tmp_path: Path) -> None:
    file.parent.rename(tmp_path / "elsewhere")
    file.parent.symlink_to(tmp_path / "elsewhere")
    with refused("symbolic link"):
        assert store.read(file) == []
    with pytest.raises(RuntimeError, match=r"symbolic link; remove it, or set ATTNFORGE_CACHE_DIR"):
        store.merge(OP, DEVICE, [entry(128)])


@pytest.mark.parametrize("place", ["file", "directory", "parent"])
def test_what_everybody_may_write_is_refused(file: Path, place: str) -> None:
    path = {"file": file, "directory": file.parent, "parent": file.parent.parent}[place]
    path.chmod(0o777 if path.is_dir() else 0o666)
    with refused("everybody may write"):
        assert store.read(file) == []
    if place != "file":
        with pytest.raises(RuntimeError, match="everybody may write"):
            store.merge(OP, DEVICE, [entry(128)])


@pytest.mark.parametrize("place", ["file", "directory"])
def test_what_another_user_owns_is_refused(
    file: Path, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if os.getuid() == 0:
        os.chown(file if place == "file" else file.parent, 12345, -1)
        me, them = 0, 12345
    else:  # only root can give files away: be somebody else instead
        me, them = os.getuid() + 1, os.getuid()
        monkeypatch.setattr(os, "getuid", lambda: me)
    with refused(f"belongs to user {them}, not to {me}"):
        assert store.read(file) == []


def test_missing_extra_is_named(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "filelock", None)
    with pytest.raises(RuntimeError, match=r"pip install 'attnforge\[tune\]'"):
        store.merge(OP, DEVICE, [entry()])


def test_a_failed_write_leaves_the_old_file(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        store.merge(OP, DEVICE, [entry(128)])
    assert store.read(file) == [entry()]
    assert not list(file.parent.glob(".*.json.*"))
