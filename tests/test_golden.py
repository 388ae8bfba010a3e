"""The golden curves: losses and gradient norms that a change of the code must not move. How to change them: CONTRIBUTING.md.

Tolerance: 1e-10, relative, of loss and gradient norm. The runs compute in float64 (see `tests/golden/update.py`). Another instruction
set (AVX-512, AVX2, SSE in torch, oneDNN, MKL and glibc), thread count or micro-batch size orders sums differently, which moved these
numbers by at most 2e-13; Adam's eps of 1.1e-8 instead of 1e-8 moves them by 1e-5, clipping at 1.0000001 instead of 1 by 2e-8.
Mistakes that Adam hides in the loss show in the gradient norm.

There is no curve in float32 or bf16: reordered sums move the first by 1e-4 in 20 steps and make the second another run. What is special
to those is compared on one machine (tests/engine).
"""

from __future__ import annotations

import json

import pytest

from tests.golden.update import CURVES, FOLDER, curve, data_hash

TOLERANCE = 1e-10


@pytest.mark.parametrize("name", CURVES)
def test_the_curve_is_the_golden_one(name, tiny_data, tmp_path):
    golden = json.loads((FOLDER / f"{name}.json").read_text())
    if data_hash(tiny_data) != golden["data"]:
        pytest.fail(
            "the token files are not those of the golden curves (another tokenizers release, another tests/runs.py?)"
        )
    for key, values in curve(name, tiny_data, tmp_path / "run").items():
        assert len(values) == len(golden[key]) == 20
        worst = max(abs(new / old - 1) for new, old in zip(values, golden[key]))
        assert worst <= TOLERANCE, f"{key} of {name} is off by {worst:.1e}; see CONTRIBUTING.md, Proof by the loss"


def test_every_curve_says_why_it_is_what_it_is():
    files = {path.stem: json.loads(path.read_text()) for path in FOLDER.glob("*.json")}
    assert files.keys() == CURVES.keys()
    assert all(content["why"] and all(content["why"]) for content in files.values())
