"""What saving and restoring a checkpoint cost one rank at 2, 4 and 8 gloo ranks, while each rank's share of the model stays the same.

    python benchmarks/checkpoint_scale.py

Prints a table: the most that any rank but the first did, and what the first did, who writes and reads the manifest for all.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from tests.checkpoint.processes import fresh_ranks
from tests.checkpoint.scale import measure

RANKS = (2, 4, 8)


def main() -> None:
    """Measure and print."""
    with tempfile.TemporaryDirectory() as folder:
        found = {ranks: fresh_ranks(ranks, measure, f"{folder}/{ranks}") for ranks in RANKS}
        sizes = {
            ranks: (Path(folder) / str(ranks) / "step_00000001" / "manifest.json").stat().st_size for ranks in RANKS
        }
    print("| | " + " | ".join(f"{ranks} ranks" for ranks in RANKS) + " |")
    print("|---|" + "---:|" * len(RANKS))
    for phase in ("save", "restore"):
        for key in sorted({key for ranks in found.values() for counts in ranks for key in counts[phase]}):
            for who, part in (("a rank", slice(1, None)), ("rank 0", slice(0, 1))):
                row = [max(counts[phase][key] for counts in found[ranks][part]) for ranks in RANKS]
                print(f"| {phase}: {key}, {who} | " + " | ".join(f"{value:,}" for value in row) + " |")
    print("| bytes of the manifest | " + " | ".join(f"{size:,}" for size in sizes.values()) + " |")


if __name__ == "__main__":
    main()
