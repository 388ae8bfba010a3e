"""`mlite <door> [overrides]`: the same as `python -m megatron_lite.<door>`."""

from __future__ import annotations

import importlib
import sys

DOORS = {
    "train": "pretrain a model, or go on with a run",
    "evaluate": "loss and perplexity by source on held-out data",
    "generate": "continue a prompt",
    "convert": "to and from Hugging Face folders",
    "launch": "start a run here, on Slurm, on a list of hosts or on Kubernetes",
}


def main() -> None:
    """Hand the rest of the command line to the door that its first word names."""
    if len(sys.argv) < 2 or sys.argv[1] not in DOORS:
        known = "\n".join(f"  mlite {door:10} {purpose}" for door, purpose in DOORS.items())
        asked = sys.argv[1] if len(sys.argv) > 1 else "--help"
        wrong = asked not in ("-h", "--help")
        text = f"usage:\n{known}\n\n`mlite <door> --help` lists groups and keys."
        print(
            f"error: there is no door {asked!r}\n{text}" if wrong else text,
            file=sys.stderr if wrong else sys.stdout,
        )
        sys.exit(2 if wrong else 0)
    door = sys.argv.pop(1)
    importlib.import_module(f"megatron_lite.{door}").main()


if __name__ == "__main__":
    main()
