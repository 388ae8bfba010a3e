from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_lite.tracking import JsonlTracker, RunInfo, read_rows
from megatron_lite.tracking.jsonl import METRICS_FILE, encode_row, truncate_rows

WRITER = """
import sys
from pathlib import Path
from megatron_lite.tracking import JsonlTracker, RunInfo
tracker = JsonlTracker()
tracker.start(RunInfo(run_dir=Path(sys.argv[1]), name="x", total_steps=10**9, start_step=int(sys.argv[2])))
step = int(sys.argv[2])
while True:
    step += 1
    tracker.log({"step": step, "loss": 1 / step, "source": "é" * 20})
    if step == int(sys.argv[3]):
        print("there", flush=True)
"""


def info(run_dir: Path, start: int = 0) -> RunInfo:
    return RunInfo(run_dir=run_dir, name="test", total_steps=100, start_step=start)


def strict(line: str | bytes) -> dict:
    """JSON as the standard has it: no NaN or Infinity literals."""

    def refuse(name: str) -> None:
        raise ValueError(name)

    return json.loads(line, parse_constant=refuse)


def step_line(step: int, **more: object) -> bytes:
    return encode_row({"step": step, "loss": 1.5, **more})


@given(st.floats())
def test_floats_come_back_to_the_bit(value: float) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / METRICS_FILE
        path.write_bytes(encode_row({"step": 1, "loss": value, "val": {"a": [value]}}))
        strict(path.read_bytes())
        (row,) = read_rows(path)
        for back in (row["loss"], row["val"]["a"][0]):
            assert type(back) is float
            assert back == value or (math.isnan(back) and math.isnan(value))
            assert math.copysign(1, back) == math.copysign(1, value) or math.isnan(value)


def test_every_row_is_on_disk_before_the_next(tmp_path: Path) -> None:
    tracker = JsonlTracker()
    tracker.start(info(tmp_path / "run"))
    for step in range(1, 4):
        tracker.log({"step": step, "loss": 0.1})
        lines = (tmp_path / "run" / METRICS_FILE).read_text().splitlines()
        assert [strict(line)["step"] for line in lines] == list(range(1, step + 1))
    tracker.close("finished")


def test_values_that_are_not_plain_data_are_refused() -> None:
    with pytest.raises(TypeError):
        encode_row({"step": 1, "loss": object()})


def test_resume_drops_the_torn_line_and_all_rows_past_the_step(tmp_path: Path) -> None:
    odd = b'{"loss":2.50,  "step": 5 }\n'  # not as we would write it: must stay as it is
    foreign = b'a whole line that is no row\n{"step": "x"}\n'
    keep = [step_line(4), b'{"step": 4, "val_loss": {"a": 1.0}}\n', odd, foreign]
    drop = [step_line(6), b'{"step": 6, "val_loss": {"a": 1.0}}\n', b'{"step": 5, "lo']
    path = tmp_path / METRICS_FILE
    path.write_bytes(b"".join(keep + drop))
    os.chmod(path, 0o640)
    assert truncate_rows(path, step=5) == 3
    assert path.read_bytes() == b"".join(keep)
    assert path.stat().st_mode & 0o777 == 0o640
    assert os.listdir(tmp_path) == [METRICS_FILE]


def test_a_file_with_nothing_to_drop_is_not_replaced(tmp_path: Path) -> None:
    path = tmp_path / METRICS_FILE
    path.write_bytes(step_line(1) + step_line(2))
    before = path.stat().st_ino
    assert truncate_rows(path, step=2) == 0
    assert path.stat().st_ino == before
    assert os.listdir(tmp_path) == [METRICS_FILE]


def test_a_last_row_without_its_newline_gets_one(tmp_path: Path) -> None:
    path = tmp_path / METRICS_FILE
    path.write_bytes(step_line(1) + step_line(2).rstrip(b"\n"))
    truncate_rows(path, step=2)
    assert path.read_bytes() == step_line(1) + step_line(2)


def test_without_a_checkpoint_the_record_begins_anew(tmp_path: Path) -> None:
    path = tmp_path / METRICS_FILE
    path.write_bytes(b'{"step": 0, "val_loss": {"a": 9.0}}\n' + step_line(1))
    JsonlTracker().start(info(tmp_path, start=0))
    assert path.read_bytes() == b""


@given(st.integers(0, 400), st.integers(1, 12))
def test_a_cut_anywhere_leaves_whole_rows_up_to_the_step(cut: int, step: int) -> None:
    whole = b"".join(step_line(i, text="é\n") for i in range(1, 11))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / METRICS_FILE
        path.write_bytes(whole[:cut])
        truncate_rows(path, step=step)
        after = path.read_bytes()
        assert whole.startswith(after)
        steps = [strict(line)["step"] for line in after.splitlines()]
        full = [
            strict(line)["step"] for line in whole[: cut + 1].split(b"\n")[:-1]
        ]  # rows cut short by a newline at most
        assert steps == [i for i in full if i <= step]


def test_killed_writer_then_resume_gives_every_step_once(tmp_path: Path) -> None:
    for start, reach in ((0, 200), (150, 300)):
        command = [sys.executable, "-c", WRITER, str(tmp_path), str(start), str(reach)]
        with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            process.stdout.readline()
            process.send_signal(signal.SIGKILL)
    tracker = JsonlTracker()
    tracker.start(info(tmp_path, start=250))
    tracker.log({"step": 251, "loss": 0.0})
    tracker.close("finished")
    lines = (tmp_path / METRICS_FILE).read_bytes().splitlines()
    assert [strict(line)["step"] for line in lines] == list(range(1, 252))


def test_reading_passes_over_what_is_no_row(tmp_path: Path) -> None:
    path = tmp_path / METRICS_FILE
    path.write_bytes(step_line(1) + b"[1]\nnonsense\n" + b"\x00\xff\n" + step_line(2) + b'{"step": 3')
    assert [row["step"] for row in read_rows(path)] == [1, 2]
    assert list(read_rows(tmp_path / "missing")) == []
