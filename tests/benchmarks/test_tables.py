"""The benchmarks of operations, checkpoints, data, ranks and start-up at their smallest: what their tables say, and what they refuse."""

from __future__ import annotations

import pytest
import torch

from benchmarks import checkpoint, data, kernels, scaling, start


def table(printed: str, first: str) -> dict[str, list[str]]:
    """first cell -> the other cells, of the table whose first heading is `first`."""
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in printed.splitlines() if line[:1] == "|"]
    begin = next(i for i, cells in enumerate(lines) if cells[0] == first)
    end = next((i for i, cells in enumerate(lines) if i > begin + 1 and set(cells[0]) == {"-"}), len(lines) + 1) - 1
    return {cells[0]: cells[1:] for cells in lines[begin + 2 : end]}


def test_an_operation_is_held_against_its_floor_and_its_plain_form(capsys):
    kernels.main(["--size", "tiny", "--turns", "2"])
    rows = table(capsys.readouterr().out, "operation")
    assert len(rows) == len(kernels.OPERATIONS)
    for _, ours, floor, over_floor, _, plain, over_ours in rows.values():
        assert all(float(number) > 0 for number in (ours, floor, over_floor, plain, over_ours))
    assert (rows["linear cross-entropy"][4], rows["AdamW"][4]) == ("FLOPs", "bytes")


def test_forms_that_do_not_agree_are_not_compared():
    x = torch.ones(3)
    wrong = kernels.Operation("scan", "", lambda: [x], lambda: [x + 0.01], flops=1.0, bytes=1.0)
    with pytest.raises(ValueError, match=r"scan: .* differ by 9.9e-03"):
        kernels.check(wrong)


def test_the_floor_is_the_larger_of_flops_and_bytes_and_ratios_are_of_one_turn():
    operation = kernels.Operation("x", "s", list, list, flops=1.0, bytes=1.0)
    turns = [kernels.Turn(ours=2 * speed, plain=6 * speed, flops=speed, bytes=0.5 * speed) for speed in (1, 10, 100)]
    assert kernels.row(operation, turns) == ["x", "s", "2e+04", "1e+04", "2.0", "FLOPs", "6e+04", "3.0"]


def test_a_save_in_the_background_blocks_for_less_than_it_takes(capsys):
    checkpoint.main(["--size", "tiny", "--saves", "2", "--steps", "2", "--disk-seconds", "0.3"])
    rows = table(capsys.readouterr().out, "save")
    blocked, whole = ({name: float(cells[i]) for name, cells in rows.items()} for i in range(2))
    assert all(seconds >= 0.3 for seconds in whole.values())
    assert blocked["foreground"] == whole["foreground"] >= 0.3 > blocked["background"]


def test_opening_and_loading_are_measured(capsys):
    data.main(["--size", "tiny", "--turns", "2"])
    printed = capsys.readouterr().out
    opening, reading = table(printed, "documents"), table(printed, "part")
    assert list(opening) == ["100", "10,000"]
    for cells in opening.values():
        assert 0 < float(cells[3]) <= float(cells[4])  # opened before the first sample is there
    for cells in (cells for name, cells in reading.items() if name.startswith("loader")):
        assert all(float(cell.replace(",", "")) > 0 for cell in cells)


def test_an_efficiency_is_the_machine_s_times_that_of_sending():
    turns = [{"single": 1.0 * s, "apart": 1.25 * s, "none": 2.0 * s} for s in (1, 5, 9)]
    assert scaling.row(2, "none", turns, tokens=100) == ["2", "none", "20", "0.50", "0.80", "0.62"]
    assert scaling.row(1, "none", turns, tokens=100) == ["1", "", "20", "1", "", ""]


@pytest.mark.slow
def test_ranks_step_alone_apart_and_together(capsys):
    scaling.main(["--ranks", "2", "--size", "tiny", "--turns", "2", "--steps", "1"])
    rows = [line.split("|")[1:-1] for line in capsys.readouterr().out.splitlines() if line.startswith("| 2 ")]
    assert [cells[1].strip() for cells in rows] == [*scaling.SHARDED]
    for cells in rows:
        assert all(float(cell) > 0 for cell in cells[3:])


@pytest.mark.slow
def test_the_start_of_a_run_is_divided_into_its_parts(capsys, tmp_path):
    with pytest.raises(ValueError, match=r"train\.max_step"):  # a run that fails says why
        start.parts(["train.max_step=3"], str(tmp_path))
    start.main(["--turns", "1", "--", "experiment=smoke", "data=random"])
    printed = capsys.readouterr().out
    first, later = ([float(cells[i]) for cells in table(printed, "part").values()] for i in range(2))
    for seconds in (first, later):
        assert sum(seconds[:-1]) == pytest.approx(seconds[-1], abs=0.005 * len(seconds))
    assert set(table(printed, "command")) == {f"`{name}`" for name in start.COMMANDS}


@pytest.mark.parametrize("benchmark", [kernels, checkpoint, data, scaling, start])
def test_numbers_out_of_range_are_refused(benchmark, capsys):
    key = "--saves" if benchmark is checkpoint else "--turns"
    with pytest.raises(SystemExit):
        benchmark.main([key, "0"])
    printed = capsys.readouterr().err
    assert key in printed
    assert "0 must be at least 1" in printed
