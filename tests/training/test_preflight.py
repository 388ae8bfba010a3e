"""The check of nodes: what it measures on two gloo "nodes", and which host it names."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist

from megatron_lite.ranks import Ranks
from megatron_lite.runtime import Runtime
from megatron_lite.training import preflight
from megatron_lite.training.gpu_memory import faults, memory_faults
from megatron_lite.training.preflight import Report, bandwidths, measure, out_of_line
from tests.distributed import run_ranks

SAME = {"torch": "2.13", "device": "cpu"}
SPEEDS = {"matmul": 1.0, "link": 10.0, "write": 2.0}
WELL = [Report(rank, rank % 2, f"node{rank // 2}", SAME, SPEEDS, 1e9 + 0.01 * rank) for rank in range(6)]


def test_nodes_that_are_alike():
    near = replace(WELL[5], speeds={"matmul": 0.9, "link": 7.0, "write": 0.7})
    assert out_of_line([*WELL[:5], near]) == []


@pytest.mark.parametrize(
    ("rank", "change", "said"),
    [
        (2, {"same": {"torch": "2.12", "device": "cpu"}}, ["torch is 2.12 on node1 (rank 2)", "2.13"]),
        (2, {"same": {"device": "cpu"}}, ["torch is none on node1 (rank 2)"]),
        (4, {"speeds": {**SPEEDS, "matmul": 0.8}}, ["matmul is slow on node2 (rank 4): 0.8 TFLOP/s"]),
        (3, {"speeds": {**SPEEDS, "link": 5.0}}, ["link is slow on node1 (rank 3)"]),
        (4, {"speeds": {**SPEEDS, "write": 0.5}}, ["write is slow on node2 (rank 4)"]),
        (2, {"clock": 1e9 - 30}, ["the clock of node1 (rank 2) is -30"]),
        (4, {"faults": faults(["3", "0", "0"])}, ["the GPU of node2 (rank 4) has 3 uncorrectable ECC error"]),
        (2, {"unseen": (0, 4)}, ["run.dir on node1 (rank 2)", "node0 (rank 0), node2 (rank 4)"]),
    ],
)
def test_the_host_that_is_out_of_line_is_named(rank, change, said):
    (line,) = out_of_line([replace(report, **change) if report.rank == rank else report for report in WELL])
    assert all(text in line for text in said), line


@pytest.mark.parametrize(
    ("answers", "said"),
    [
        ({"gpu": "0", "remapped-rows": "No, No"}, []),
        ({"gpu": "[N/A]", "remapped-rows": "[N/A], [N/A]"}, []),  # a GPU without ECC
        ({"gpu": "0", "remapped-rows": "Yes, No"}, ["waits to be remapped: reset"]),
        ({"gpu": "12", "remapped-rows": "1, 1"}, ["12 uncorrectable", "waits to be remapped", "could not be remapped"]),
        ({"gpu": "7"}, ["7 uncorrectable"]),  # an old driver, which knows no remapped rows
        ({}, []),
    ],
)
def test_errors_of_a_gpus_memory(answers, said, tmp_path, monkeypatch):
    """As a stand-in for nvidia-smi answers for the one GPU that it is asked for; unknown queries end with an error, as there."""
    lines = [f'--query-{kind}=*) echo "{answer}" ;;' for kind, answer in answers.items()]
    cases = " ".join(lines)
    (tmp_path / "nvidia-smi").write_text(
        f'#!/bin/sh\n[ "$3" = --id=GPU-7 ] || exit 6\ncase $1 in {cases} *) exit 2 ;; esac\n'
    )
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="7"))
    found = memory_faults(torch.device("cuda", 0))
    assert len(found) == len(said)
    assert all(text in fault for text, fault in zip(said, found))


def test_a_clock_is_that_of_a_node():
    (line,) = out_of_line([replace(r, clock=r.clock + 30) if r.host == "node2" else r for r in WELL])
    assert "the clock of node2 (rank 4) is +30" in line


def two_nodes(rank: int, world_size: int, folder: str) -> tuple[list[Report], list]:
    """Each rank is a node of its own; the second one is slow and has another version."""
    runtime = Runtime(rank=rank, world_size=world_size, local_rank=0, device=torch.device("cpu"))
    ranks = Ranks(dist.new_group(backend="gloo"))
    with patch.object(preflight, "matmul_speed", return_value=1.0 - 0.5 * rank):
        if rank == 0:
            reports = measure(runtime, ranks, Path(folder))
        else:
            with patch.object(preflight, "versions", return_value={"torch": "0.4"}):
                reports = measure(runtime, ranks, Path(folder))

    def seconds(work, device) -> float:
        work()
        return 1.0 + rank

    with patch.object(preflight, "_seconds", seconds):
        return reports, list(bandwidths(runtime, 1))


def test_two_nodes(tmp_path):
    (reports, rows), (none, same_rows) = run_ranks(2, two_nodes, str(tmp_path / "run"))
    assert none == []
    assert [report.rank for report in reports] == [0, 1]
    assert all(set(report.speeds) == set(SPEEDS) and not report.unseen for report in reports)
    found = "\n".join(out_of_line(reports))
    assert "torch is 0.4 on" in found
    assert "matmul is slow on" in found
    assert rows == same_rows
    # of two ranks nccl-tests counts 2 (n - 1) / n = 1 and (n - 1) / n = 1 / 2 of the bytes; the slower rank takes two seconds
    sent = {"all-reduce": 1.0, "all-gather": 0.5}
    expected = {(operation, size): part * size / 2 / 1e9 for operation, part in sent.items() for size in (2**16, 2**20)}
    assert {(row.operation, row.size): row.speed for row in rows} == pytest.approx(expected)
    assert list((tmp_path / "run").iterdir()) == []  # nothing is left behind


def apart(rank: int, world_size: int, folder: str) -> list[Report]:
    """Every node has a run directory of its own."""
    runtime = Runtime(rank=rank, world_size=world_size, local_rank=0, device=torch.device("cpu"))
    with patch.object(preflight, "SEEN_SECONDS", 0.0):
        return measure(runtime, Ranks(dist.new_group(backend="gloo")), Path(folder) / str(rank))


def test_a_run_directory_that_is_not_shared(tmp_path):
    reports, _ = run_ranks(2, apart, str(tmp_path))
    assert [report.unseen for report in reports] == [(1,), (0,)]
    assert "is not on a file system that all share" in "\n".join(out_of_line(reports))
