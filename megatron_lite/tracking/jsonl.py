"""metrics.jsonl: the record of a run, one JSON object a line.

Notable:
  - a row is one flushed line, so a killed process loses no finished row (flushed to the kernel, not
    fsynced: a power failure may lose the last seconds);
  - floats are written with their full repr and read back to the same bits; NaN and infinities, which JSON
    lacks, are the strings "NaN", "Infinity" and "-Infinity" (Python's `float()` reads them, and so does
    JavaScript's `Number()`); `read_rows` turns them back into floats;
  - on resume the file is cut back to the resumed step, so every step appears once;
  - rows of steps that the run itself went back behind (`train.on_spike=rollback`) stay, marked `"dropped": true`; nobody reads them.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from megatron_lite.atomic import whole_file
from megatron_lite.tracking.base import Row, RunInfo

METRICS_FILE = "metrics.jsonl"
_NOT_IN_JSON = {"NaN", "Infinity", "-Infinity"}


def encode_row(row: Row) -> bytes:
    """One line of valid JSON with its newline. Raises TypeError for values that are not plain data."""
    return json.dumps(_to_json(row), allow_nan=False, ensure_ascii=False).encode() + b"\n"


def read_rows(path: str | Path) -> Iterator[Row]:
    """The rows of a metrics file, also of one that is being written: a torn or foreign line is skipped."""
    path = Path(path)
    if not path.exists():
        return
    with path.open("rb") as file:
        for line in file:
            row = _decode(line)
            if row is not None and not row.get("dropped"):
                yield _from_json(row)


def truncate_rows(path: Path, *, step: int, validation: bool = False) -> int:
    """Drop a torn last line and every row past `step`, with `validation` also that step's validation row; return how many went.

    Kept lines stay as they are, byte for byte. The file is replaced atomically, and only if something is dropped.
    At step 0 there is no checkpoint: the run starts over and everything is dropped, a validation row of step 0 too.
    """
    if not path.exists():
        return 0
    dropped = 0
    temporary = path.with_name(f".{path.name}.tmp")
    with path.open("rb") as source, temporary.open("wb") as target:
        for line in source:
            if _is_past(line, step, validation):
                dropped += 1
            else:
                target.write(line if line.endswith(b"\n") else line + b"\n")
        target.flush()
        os.fsync(target.fileno())
    if dropped == 0 and temporary.stat().st_size == path.stat().st_size:
        temporary.unlink()
        return 0
    os.chmod(temporary, path.stat().st_mode & 0o777)
    os.replace(temporary, path)
    return dropped


class JsonlTracker:
    """Writes `run_dir/metrics.jsonl`."""

    def __init__(self) -> None:
        self._file: BinaryIO | None = None

    def start(self, run: RunInfo) -> None:
        path = run.run_dir / METRICS_FILE
        path.parent.mkdir(parents=True, exist_ok=True)
        truncate_rows(path, step=run.start_step, validation=run.validation_due)
        self._file = path.open("ab")

    def log(self, row: Row) -> None:
        """Raises OSError when the disk is full: a run must not continue without its record."""
        assert self._file is not None, "log() before start()"
        self._file.write(encode_row(row))
        self._file.flush()

    def drop_after(self, step: int) -> None:
        """Mark the rows past `step`; the file is replaced as a whole."""
        assert self._file is not None, "drop_after() before start()"
        path = Path(self._file.name)
        self._file.close()
        with whole_file(path) as temporary, path.open("rb") as source, temporary.open("wb") as target:
            target.writelines(_marked(line, step) for line in source)
        self._file = path.open("ab")

    def close(self, status: str) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None


def _is_past(line: bytes, step: int, validation: bool) -> bool:
    row = _decode(line)
    if row is None:
        return not line.endswith(b"\n")  # torn; a whole line that is not our row is not ours to drop
    if row.get("dropped"):
        return step == 0
    return step == 0 or row["step"] > step or (validation and row["step"] == step and "val_loss" in row)


def _marked(line: bytes, step: int) -> bytes:
    row = _decode(line)
    return line if row is None or row["step"] <= step else encode_row(row | {"dropped": True})


def _decode(line: bytes) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except ValueError:  # also UnicodeDecodeError: torn within a character
        return None
    return row if isinstance(row, dict) and isinstance(row.get("step"), int) else None


def _to_json(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if isinstance(value, dict):
        return {key: _to_json(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_to_json(item) for item in value]
    return value


def _from_json(value: Any) -> Any:
    if isinstance(value, str) and value in _NOT_IN_JSON:
        return float(value)
    if isinstance(value, dict):
        return {key: _from_json(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_from_json(item) for item in value]
    return value
