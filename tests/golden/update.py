"""Write the golden curves anew, with the reason: python -m tests.golden.update 'why the numbers changed'

A curve is the losses and gradient norms of a run of 20 steps, `mlite train` in this process, which takes about a second. Only curves
that changed are written, and each keeps the reasons of all its changes. Commit them together with the change that they belong to.

The runs compute in float64, so that a curve says nothing about the machine that wrote it: 20 steps multiply what another order of
sums changes by about a thousand, which in float32 is 1e-4 and in float64 1e-13.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests import runs

FOLDER = Path(__file__).parent
CURVES: dict[str, list[str]] = {
    "nemotron4": [],
    "llama_tied_wsd": [
        "model.family=llama", "model.norm=rmsnorm", "model.mlp.activation=swiglu", "model.rope.fraction=1",
        "model.tie_embeddings=true", "schedule=wsd", "schedule.decay_fraction=0.5", "data.reset_attention=false",
    ],
    "hybrid": [
        "model=nano2_tiny", "model.num_layers=null", "model.pattern=M-M*-", "model.mamba.heads=4", "model.mamba.head_dim=8",
        "model.mamba.state=8",
    ],
}  # fmt: skip


class _Float64Only(TorchDispatchMode):
    """Raises AssertionError at an operation that rounds to less than float64 (single numbers, such as Adam's step counter, may)."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.is_floating_point() and tensor.numel() > 1:
                assert tensor.dtype is torch.float64, f"{func} returns {tensor.dtype} in a run in float64"
        return result


@contextlib.contextmanager
def float64() -> Iterator[None]:
    """Inside, a run with precision=fp32 holds and computes everything in float64: that precision casts nothing, and parameters are
    made in torch's default dtype."""
    torch.set_default_dtype(torch.float64)
    try:
        with _Float64Only():
            yield
    finally:
        torch.set_default_dtype(torch.float32)


def curve(name: str, data: Path, run_dir: Path) -> dict[str, list[float]]:
    """Losses and gradient norms of the run `name` of CURVES, trained into `run_dir`."""
    with float64():
        assert runs.run(data, run_dir, *CURVES[name], "checkpoint.every=0") == 0
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
        for name in CURVES:
            with contextlib.redirect_stdout(io.StringIO()):
                new = {"data": data_hash(data), **curve(name, data, Path(folder) / name)}
            path = FOLDER / f"{name}.json"
            old = json.loads(path.read_text()) if path.exists() else {"why": []}
            if {key: old.get(key) for key in new} == new:
                print(f"{name}: unchanged")
                continue
            path.write_text(json.dumps({"why": [*old["why"], sys.argv[1]], **new}, indent=1) + "\n")
            print(f"{name}: written")


if __name__ == "__main__":
    main()
