"""Write the golden curves anew, with the reason: python -m tests.golden.update 'why the numbers changed'

A curve is the losses and gradient norms of a run of 20 steps that takes about a second. Only curves that changed are written, and each
keeps the reasons of all its changes. Commit them together with the change that they belong to.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import sys
import tempfile
from pathlib import Path

from tests import runs

FOLDER = Path(__file__).parent
CURVES: dict[str, list[str]] = {
    "nemotron4": [],  # the run of the fixture `straight`
    "llama_tied_wsd": [
        "model.family=llama", "model.norm=rmsnorm", "model.mlp.activation=swiglu", "model.rope.fraction=1",
        "model.tie_embeddings=true", "schedule=wsd", "schedule.decay_fraction=0.5", "data.reset_attention=false",
    ],
}  # fmt: skip


def curve(run_dir: Path) -> dict[str, list[float]]:
    """Losses and gradient norms of a finished run."""
    rows = runs.rows(run_dir)
    return {key: [row[key] for row in rows] for key in ("loss", "grad_norm")}


def data_hash(data: Path) -> str:
    """Of the token files: another one means another tokenizer or corpus, whatever the model does."""
    found = hashlib.sha256()
    for path in sorted(data.glob("*.bin")):
        found.update(path.name.encode() + path.read_bytes())
    return found.hexdigest()[:16]


def main() -> None:
    """Run all curves and write those that differ from their file."""
    if len(sys.argv) != 2 or not sys.argv[1].strip():
        sys.exit("usage: python -m tests.golden.update 'why the numbers changed'")
    with tempfile.TemporaryDirectory() as folder:
        data = runs.make_data(Path(folder) / "data")
        for name, overrides in CURVES.items():
            with contextlib.redirect_stdout(io.StringIO()):
                runs.run(data, Path(folder) / name, *overrides)
            new = {"data": data_hash(data), **curve(Path(folder) / name)}
            path = FOLDER / f"{name}.json"
            old = json.loads(path.read_text()) if path.exists() else {"why": []}
            if {key: old.get(key) for key in new} == new:
                print(f"{name}: unchanged")
                continue
            path.write_text(json.dumps({"why": [*old["why"], sys.argv[1]], **new}, indent=1) + "\n")
            print(f"{name}: written")


if __name__ == "__main__":
    main()
