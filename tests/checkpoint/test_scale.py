"""A rank's work does not grow with the number of ranks; the exceptions are listed in docs/checkpoints.md."""

from __future__ import annotations

from tests.checkpoint.scale import BYTES, measure
from tests.distributed import run_ranks


def test_saving_and_restoring_cost_a_rank_the_same_on_two_and_four_ranks(tmp_path):
    few, many = (run_ranks(ranks, measure, str(tmp_path / str(ranks))) for ranks in (2, 4))
    for phase in ("save", "restore"):
        collectives = {counts[phase]["collectives"] for counts in few + many}
        assert len(collectives) == 1, collectives
        for key in ("files opened", "fsyncs"):
            # a rank's share of the hashing begins and ends inside of files: up to two more
            assert max(c[phase][key] for c in many) <= max(c[phase][key] for c in few) + 2, (phase, key)
    for counts in many:
        # header and norms beside the matrices; hashing is shared by blocks of 1 MiB
        assert counts["restore"]["bytes of tensors read"] < BYTES * 1.05
        assert counts["restore"]["bytes hashed"] < BYTES * 1.05 + 2**20
