"""What every command does around its work: parse the command line, turn a user's error into one line and an exit code."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from megatron_lite.config import errors
from megatron_lite.config.compose import compose_config, help_text
from megatron_lite.errors import CheckpointError, WorkFailedError, error_text


def check_at_least_one(config: Any, *keys: str) -> None:
    """Raise ValueError naming a key of `config` whose number is below 1. None stands for no number."""
    for key in keys:
        value = getattr(config, key)
        if value is not None and value < 1:
            raise ValueError(f"{key}={value} must be at least 1")


def run_command(
    name: str,
    schema: type,
    purpose: str,
    work: Callable[[Any], int],
    *,
    compose: Callable[[list[str]], Any] | None = None,
) -> None:
    """Compose the config of `mlite <name>` from the command line, call `work(config)` and exit with what it returns.

    compose: from overrides to the config, where `compose_config` alone does not do.
    Exit codes: 2 for a user error, printed in one line; 1 for work that began and failed (the same command continues from
    what was finished) and for running out of memory; 130 after Ctrl-C.
    """
    arguments = sys.argv[1:]
    if {"-h", "--help"} & set(arguments):
        print(help_text(name, schema, purpose))
        return
    try:
        sys.exit(work(compose(arguments) if compose else compose_config(name, schema, arguments)))
    except WorkFailedError as error:
        print(f"failed: {error}", file=sys.stderr)
        sys.exit(1)
    except (ValueError, CheckpointError, OSError) as error:
        print(f"error: {error_text(error)}", file=sys.stderr)
        sys.exit(2)
    except (MemoryError, RuntimeError) as error:
        if not errors.is_out_of_memory(error):
            raise
        print(f"failed: {errors.out_of_memory(error)}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)  # what a shell reports for SIGINT
