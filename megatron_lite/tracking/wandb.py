"""Weights & Biases: the one file that imports `wandb`, and only when it is chosen.

Notable:
  - W&B's own settings hold: a login in ~/.netrc or the environment, WANDB_MODE, `wandb offline`;
  - without a login it is offline instead of asking for one: everything goes to `run_dir/wandb`, and `wandb sync
    run_dir/wandb/offline-run-*` sends it later (the parts of a resumed run in the order of their start);
  - one run id for the life of the run directory, drawn once and kept in `run_dir/wandb_id`. It is random,
    because two machines may both have a `runs/smoke`, and one id would make them one run;
  - W&B's own step counter refuses to go back, which a run resumed after a kill must do; we log without it and
    declare `step` the axis of every metric;
  - a kill loses what W&B had not written yet, so a resumed run logs its last minute once more.
"""

from __future__ import annotations

import netrc
import secrets
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from megatron_lite.atomic import whole_file
from megatron_lite.tracking.base import Row, RunInfo, WandbConfig, flatten
from megatron_lite.tracking.jsonl import METRICS_FILE, read_rows

ID_FILE = "wandb_id"
# W&B writes its offline file every 15 s by default, and a kill loses what was not written yet.
FLUSH_SECONDS = 1.0
FINISH_SECONDS = 45.0  # for the last upload; what does not get through stays in `run_dir/wandb` for `wandb sync`
REPEATED_SECONDS = 60.0  # of training before the step that a run resumes at; far above what W&B lags behind


class WandbTracker:
    """Mirrors the rows to W&B: training keys as they are, validation as `val_loss/<source>`."""

    def __init__(self, config: WandbConfig) -> None:
        self.config = config
        self._run: Any = None

    def start(self, run: RunInfo) -> None:
        import wandb

        settings: dict[str, Any] = {"console": "off"}  # the live progress bar would fill W&B's log
        wished = {"x_transaction_log_flush_interval": FLUSH_SECONDS, "finish_timeout": FINISH_SECONDS}
        settings |= {key: value for key, value in wished.items() if key in getattr(wandb.Settings, "model_fields", {})}
        mode = self.config.mode or ("offline" if lacks_login() else None)
        if mode:
            settings["mode"] = mode
        self._run = wandb.init(
            project=self.config.project,
            entity=self.config.entity,
            name=self.config.name or run.name,
            tags=self.config.tags or None,
            id=stable_id(run.run_dir),
            resume="allow",
            dir=str(run.run_dir),
            config={**run.config, "parameters": run.parameters, "layout": run.layout},
            settings=wandb.Settings(**settings),
        )
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")
        for row in last_rows(run.run_dir / METRICS_FILE, upto=run.start_step):
            self._run.log(flatten(row))

    def log(self, row: Row) -> None:
        self._run.log(flatten(row))

    def close(self, status: str) -> None:
        self._run.summary["status"] = status
        self._run.finish(exit_code=1 if status == "failed" else 0)


def lacks_login() -> bool:
    """Whether W&B would prompt for an API key, which an unattended job cannot answer."""
    import wandb

    settings = wandb.setup().settings
    if settings.mode != "online":  # WANDB_MODE, or `wandb offline`
        return False
    # an older W&B left the port out of ~/.netrc, and a newer one does not find that login: it shall say so itself
    with suppress(OSError, netrc.NetrcParseError):
        if netrc.netrc().authenticators(urlsplit(settings.base_url).hostname or ""):
            return False
    try:
        return not wandb.login(prompt=False)  # looks in its environment and ~/.netrc
    except TypeError:  # before this keyword came
        return not wandb.api.api_key
    except Exception:  # it found a login and tried it; `wandb.init` says what is wrong with it
        return False


def stable_id(run_dir: Path) -> str:
    """The W&B id of a run directory: read from `wandb_id`, or drawn and kept there."""
    path = run_dir / ID_FILE
    if path.exists() and (kept := path.read_text().strip()):
        return kept
    run_id = secrets.token_hex(8)
    with whole_file(path) as temporary:
        temporary.write_text(run_id + "\n")
    return run_id


def last_rows(path: Path, *, upto: int) -> list[Row]:
    """The rows of the last `REPEATED_SECONDS` of training up to step `upto`, in order."""
    rows: list[Row] = []
    seconds = 0.0
    for row in reversed([row for row in read_rows(path) if row.get("step", 0) <= upto]):
        if seconds > REPEATED_SECONDS:
            break
        rows.append(row)
        seconds += row.get("step_seconds") or 0.0
    return rows[::-1]
