"""Importance against loops over transformers' models in float64, and at every layout."""

from __future__ import annotations

from unittest.mock import patch

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from megatron_lite.compress.depth import Probe, RemovalOptions, removal_order
from megatron_lite.compress.importance import Meter
from megatron_lite.compress.scores import ImportanceConfig, Scores
from megatron_lite.engine.fsdp import FsdpConfig
from megatron_lite.parallel.assemble import assemble, from_tensors
from megatron_lite.parallel.mesh import CPU, Mesh, ParallelConfig, build_mesh
from megatron_lite.parallel.parallelize import Recipe
from megatron_lite.weights import load, open_weights
from tests.compress.reference import readings
from tests.distributed import run_ranks
from tests.hf_folders import make_folder

SAMPLES, LENGTH = 8, 12
OPTIONS = ImportanceConfig()


def calibration():
    """Tokens and a mask with a sample that does not count at all, and samples of which different shares count."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, 384, (SAMPLES, LENGTH), generator=generator)
    mask = torch.rand(SAMPLES, LENGTH, generator=generator) < torch.linspace(0.3, 1.0, SAMPLES)[:, None]
    mask[3] = False
    return tokens, mask


def measured(probe, mesh=None, *, micro_batch=2, options=OPTIONS, ignore_mask=False, documents=None):
    """The sums over the calibration data; data-parallel ranks take samples in turn."""
    mesh = mesh or Mesh()
    meter = Meter(probe.decoder, mesh, options)
    tokens, mask = calibration()
    whole = {"tokens": tokens, "loss_mask": mask | ignore_mask} | (
        {} if documents is None else {"documents": documents}
    )
    sums: dict[str, torch.Tensor] = {}
    with torch.no_grad(), meter.reading():
        for start in range(0, SAMPLES, micro_batch * mesh.data_parallel_size):
            first = start + mesh.data_parallel_rank * micro_batch
            batch = mesh.place({key: value[first : first + micro_batch] for key, value in whole.items()})
            meter.begin(batch)
            probe(batch, states=True)
            for place, total in meter.take().items():
                sums[place] = sums.get(place, 0.0) + total
    return sums


def near(ours: torch.Tensor, theirs, *, rel=1e-5) -> bool:
    theirs = torch.as_tensor(theirs)
    return bool((ours - theirs).abs().max() <= rel * theirs.abs().max())


@pytest.mark.parametrize("kind", ["nemotron", "llama", "nemotron_h"])
def test_scores_are_those_of_a_float64_loop(kind, tmp_path):
    folder = make_folder(tmp_path / "hf", kind)
    decoder, _ = load(folder)
    scores = Scores({}, SAMPLES, measured(Probe(decoder)))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
    expected = readings(model, *calibration())
    hidden = 0.0
    if kind == "nemotron_h":
        for layer, symbol in enumerate("M-M*"):
            hidden += expected[f"{layer}.norm"]
            read = {"M": "in_proj", "-": "down_proj", "*": "o_proj"}[symbol]
            theirs = expected[f"{layer}.{read}"]
            if symbol == "M":
                theirs = theirs[54:108]  # 6 heads of 9: x comes after z
            assert near(scores.root(f"layers.{layer}.mixer", "l2"), theirs), layer
    else:
        for block in range(2):
            hidden += expected[f"{block}.input_layernorm"] + expected[f"{block}.post_attention_layernorm"]
            assert near(scores.root(f"layers.{2 * block}.mixer", "l2"), expected[f"{block}.o_proj"])
            assert near(scores.root(f"layers.{2 * block + 1}.mixer", "l2"), expected[f"{block}.down_proj"])
    assert near(scores.hidden(decoder.config, OPTIONS), hidden)
    tokens, mask = calibration()
    with torch.no_grad():
        last = model.model(input_ids=tokens).last_hidden_state.abs() * mask[..., None]  # after the norm before the head
    final = (last.sum(dim=1) / mask.sum(dim=1).clamp(min=1)[:, None]).square().sum(dim=0).sqrt().numpy()
    assert near(scores.hidden(decoder.config, ImportanceConfig(final_norm=True)), hidden + final)
    assert not near(scores.hidden(decoder.config, OPTIONS), hidden + final, rel=1e-2)
    depth = np.array([expected[f"{unit}.io"] for unit in range(len(scores.depth()))])
    assert near(scores.depth(), depth)


def test_aggregations(tmp_path):
    decoder, _ = load(make_folder(tmp_path / "hf", "llama"))
    inputs = []
    decoder.layers[1].mixer.down.register_forward_pre_hook(lambda _, args: inputs.append(args[0].double()))
    options = ImportanceConfig(batch="mean", sequence="l2")
    scores = Scores({}, SAMPLES, measured(Probe(decoder), options=options))
    values = torch.cat(inputs) * calibration()[1][..., None]
    expected = values.square().sum(dim=1).sqrt().mean(dim=0)
    assert near(scores.root("layers.1.mixer", "mean"), expected)
    assert not near(scores.root("layers.1.mixer", "mean"), values.abs().mean(dim=(0, 1)))


def assembled(path, mesh, parallel):
    weights = open_weights(path)
    probe, _ = assemble(
        weights.config,
        mesh=mesh,
        recipe=Recipe(parallel),
        fill=from_tensors(weights.tensors),
        wrap=Probe,
        distribute=FsdpConfig().distribute(mesh, torch.float32),
    )
    return probe.eval()


LAYOUTS = {
    "tp2 sp, dp2": (ParallelConfig(tp=2, sequence_parallel=True), 2),
    "tp2, dp2": (ParallelConfig(tp=2), 1),
    "hsdp": (ParallelConfig(dp_replicate=2), 2),
    "cp2, dp2": (ParallelConfig(cp=2), 1),
    "cp2, tp2 sp": (ParallelConfig(cp=2, tp=2, sequence_parallel=True), 4),
}
BUGS = {  # what is planted at a layout
    "tp2 sp, dp2": ("_whole", lambda meter, x: x.view(*meter._mask_BT.shape, -1)),  # slices as they are in memory
    "cp2, dp2": ("_over_slices", lambda meter, x: x),  # squared before a sample's mean is complete
}


def documents() -> torch.Tensor:
    """Of the calibration data: borders anywhere, documents of one token among them."""
    return (torch.rand(SAMPLES, LENGTH, generator=torch.Generator().manual_seed(4)) < 0.3).cumsum(1)


def at_layouts(rank: int, world_size: int, path: str) -> dict[str, dict[str, torch.Tensor]]:
    found = {}
    for name, (parallel, micro_batch) in LAYOUTS.items():
        mesh = build_mesh(parallel.degrees(world_size), device=CPU)
        probe = assembled(path, mesh, parallel)
        found[name] = measured(probe, mesh, micro_batch=micro_batch, documents=documents())
        if name in BUGS:
            with patch.object(Meter, *BUGS[name]):
                found[f"bug at {name}"] = measured(probe, mesh, micro_batch=micro_batch, documents=documents())
    return found


@pytest.mark.parametrize("kind", ["nemotron", "nemotron_h"])
def test_scores_do_not_depend_on_the_layout(kind, tmp_path):
    folder = make_folder(tmp_path / "hf", kind)
    alone = measured(assembled(folder, Mesh(), ParallelConfig()), micro_batch=8, documents=documents())
    everyone = run_ranks(4, at_layouts, str(folder))
    for layout in LAYOUTS:
        for rank, found in enumerate(everyone):
            assert found[layout].keys() == alone.keys()
            wrong = [place for place, total in alone.items() if not near(found[layout][place].sqrt(), total.sqrt())]
            assert wrong == [], (layout, rank)
    for layout in BUGS:
        found = everyone[0][f"bug at {layout}"]
        assert not near(found["layers.1.mixer"].sqrt(), alone["layers.1.mixer"].sqrt()), layout


def test_what_does_not_count_is_not_read(tmp_path):
    probe = Probe(load(make_folder(tmp_path / "hf", "llama"))[0])
    assert not near(measured(probe, ignore_mask=True)["layers.1.mixer"], measured(probe)["layers.1.mixer"])


def removal(path, mesh, parallel, *, loss: bool) -> list[int]:
    probe = assembled(path, mesh, parallel)
    tokens, mask = calibration()
    rows = slice(mesh.data_parallel_rank, None, mesh.data_parallel_size)
    batch = mesh.place({"tokens": tokens[rows], "targets": tokens[rows].roll(-1, 1), "loss_mask": mask[rows]})
    removed: list[int] = []

    def forward(*arguments, **options):
        with torch.no_grad():
            return probe(*arguments, **options)

    options = RemovalOptions(2, loss=loss, keep=lambda: None)
    removal_order(probe.decoder, forward, lambda: [batch], mesh=mesh, removed=removed, options=options)
    return removed


def removal_at_layout(rank: int, world_size: int, path: str) -> list[list[int]]:
    layouts = ParallelConfig(tp=2, sequence_parallel=True), ParallelConfig(tp=2, cp=2)
    meshes = [build_mesh(parallel.degrees(world_size), device=CPU) for parallel in layouts]
    return [removal(path, meshes[loss], layouts[loss], loss=loss) for loss in (True, False)]


def test_iterative_removal_takes_what_hurts_least(tmp_path):
    folder = make_folder(tmp_path / "hf", "nemotron_h")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
    tokens, mask = calibration()
    targets = tokens.roll(-1, 1)

    def logits(without):
        handles = [model.model.layers[n].register_forward_hook(lambda _, args, out: args[0]) for n in without]
        with torch.no_grad():
            found = model(input_ids=tokens).logits
        for handle in handles:
            handle.remove()
        return found

    whole = logits([])
    losses = {
        "loss": lambda y: -y.log_softmax(-1).gather(-1, targets[..., None])[..., 0][mask].sum(),
        "logits": lambda y: (y - whole).square()[mask].sum(),
    }
    expected = []
    for measure in losses.values():
        gone: list[int] = []
        for _ in range(2):
            left = [layer for layer in range(4) if layer not in gone]
            gone.append(min(left, key=lambda layer: measure(logits([*gone, layer])).item()))
        expected.append(gone)
    assert [removal(str(folder), Mesh(), ParallelConfig(), loss=loss) for loss in (True, False)] == expected
    assert run_ranks(4, removal_at_layout, str(folder)) == [expected] * 4
