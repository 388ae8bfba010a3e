from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path

import pytest

from megatron_lite.tracking.base import flatten
from megatron_lite.tracking.jsonl import METRICS_FILE, encode_row
from megatron_lite.tracking.wandb import last_rows, stable_id
from tests.distributed import PATIENCE_SECONDS

pytest.importorskip("wandb")

RUN = """
import sys, time
from pathlib import Path
from megatron_lite.tracking import RunInfo, Trackers, WandbConfig, WandbTracker
folder, start, end, hang = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4] == "hang"
tracker = Trackers(None, [WandbTracker(WandbConfig(project="p", tags=["t"]))])  # on a thread of its own, as in a run
tracker.start(RunInfo(run_dir=folder, name="smoke", total_steps=12, start_step=start, config={"seed": 7}))
for step in range(start + 1, end + 1):
    tracker.log({"step": step, "loss": 1 / step, "mfu": None, "fp8": {"module": "layers.1"}})
    if step % 5 == 0:
        tracker.log({"step": step, "val_loss": {"english text": 2 / step}})
if hang:
    time.sleep(3600)
tracker.close("finished")
"""


def start(folder: Path, *arguments: object) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-c", RUN, str(folder), *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def records(folder: Path) -> dict[str, list[dict]]:
    """The records of an offline run by their kind, by wandb's own reader."""
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(folder)]
    out = subprocess.run(
        command, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=PATIENCE_SECONDS
    ).stdout
    found: dict[str, list[dict]] = defaultdict(list)
    for line in out.splitlines():
        record = json.loads(line)
        found[record["type"]].append(record[record["type"]])
    return found


def history(found: dict[str, list[dict]]) -> list[dict]:
    rows = []
    for record in found["history"]:
        items = record.get("item", record)
        rows.append({key: value for key, value in items.items() if not key.startswith("_")})
    return rows


def rows(steps: range) -> list[dict]:
    """What the script above logs, in the order of metrics.jsonl."""
    training = [{"step": i, "loss": 1 / i, "fp8": {"module": "layers.1"}} for i in steps]
    validation = [{"step": i, "val_loss": {"english text": 2 / i}} for i in steps if i % 5 == 0]
    return sorted(training + validation, key=lambda row: row["step"])


def wait_for_rows(folder: Path, count: int) -> Path:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while time.monotonic() < deadline:
        for run in folder.glob("wandb/offline-run-*"):
            if len(history(records(run))) >= count:
                return run
        time.sleep(0.3)
    raise AssertionError(f"no {count} rows in {folder} within {PATIENCE_SECONDS:g} s")


@pytest.mark.slow
def test_one_run_id_through_a_kill_and_steps_that_go_back(tmp_path: Path) -> None:
    process = start(tmp_path, 0, 10, "hang")
    try:
        first = wait_for_rows(tmp_path, 12)  # W&B's file lags by a second: what it has must survive the kill
    finally:
        process.kill()  # SIGKILL
        process.wait()
    (tmp_path / METRICS_FILE).write_bytes(b"".join(map(encode_row, rows(range(4, 7)))))
    assert start(tmp_path, 6, 12, "end").wait(timeout=PATIENCE_SECONDS) == 0
    (second,) = set(tmp_path.glob("wandb/offline-run-*")) - {first}

    expected = (tmp_path / "wandb_id").read_text().strip()
    before, after = records(first), records(second)
    for found in (before, after):
        (record, *_) = found["run"]
        assert record["run_id"] == expected
        assert record["project"] == "p"
        assert record["config"]["update"]["seed"] == 7
        metrics = {m.get("glob_name") or m["name"]: m for m in found["metric"]}
        assert metrics["*"]["step_metric"] == "step"
        assert "step" in metrics

    assert history(before) == [flatten(row) for row in rows(range(1, 11))]
    assert history(after) == [
        flatten(row) for row in rows(range(4, 13))
    ]  # the last minute before the checkpoint once more
    summary = {key: value for record in after["summary"] for key, value in record["update"].items()}
    assert summary["status"] == "finished"


def test_the_last_minute_of_training_before_a_step(tmp_path: Path) -> None:
    """What a resumed run logs again: a kill loses what W&B had not written."""
    written: list[dict] = [{"step": step, "loss": 1.0, "step_seconds": 7.0} for step in range(1, 41)]
    written.insert(20, {"step": 20, "val_loss": {"a": 2.0}})
    (tmp_path / METRICS_FILE).write_bytes(b"".join(map(encode_row, written)))
    again = last_rows(tmp_path / METRICS_FILE, upto=25)
    assert [row["step"] for row in again] == [17, 18, 19, 20, 20, 21, 22, 23, 24, 25]
    assert last_rows(tmp_path / METRICS_FILE, upto=0) == []
    assert last_rows(tmp_path / "absent", upto=3) == []


LOGINS = """
import os, sys
import wandb
from megatron_lite.tracking.wandb import lacks_login
def refused(**_):
    raise wandb.errors.AuthenticationError("no network")
home = {"HOME": sys.argv[1], "WANDB_BASE_URL": "http://127.0.0.1:9"}  # its ~/.netrc has a login for this host
for name, environment, login in (
    ("nothing", {}, wandb.login),
    ("found", {"WANDB_API_KEY": "1" * 40}, refused),
    ("netrc", home, None),
    ("mode", {"WANDB_MODE": "disabled"}, None),
):
    if not os.fork():  # W&B reads its environment once a process
        os.environ |= environment
        wandb.login = login
        sys.stderr = open(os.devnull, "w")
        print(name, lacks_login(), flush=True)
        os._exit(0)
    os.wait()
"""


def test_wandb_is_logged_in_where_it_says_so_itself(tmp_path: Path) -> None:
    (tmp_path / "user").mkdir()
    netrc = tmp_path / "user" / ".netrc"
    netrc.write_text(f"machine 127.0.0.1\n  login user\n  password {'1' * 40}\n")
    netrc.chmod(0o600)
    own = {key: value for key, value in os.environ.items() if not key.startswith(("WANDB_", "NETRC"))}
    command = [sys.executable, "-c", LOGINS, str(netrc.parent)]
    done = subprocess.run(
        command, capture_output=True, text=True, env=own | {"HOME": str(tmp_path)}, timeout=PATIENCE_SECONDS
    )
    found = dict(line.split() for line in done.stdout.splitlines())
    assert found == {"nothing": "True", "found": "False", "netrc": "False", "mode": "False"}, done.stderr


def test_ids_stay_with_their_directory(tmp_path: Path) -> None:
    ids = [stable_id(tmp_path / name) for name in ("a", "b", "a")]
    assert ids[0] == ids[2] != ids[1]
    assert ids[0].isalnum()
