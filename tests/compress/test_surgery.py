"""The cut model against transformers' tensors sliced by hand, exactly; and what cutting holds in memory."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from megatron_lite.commands.plan import PlanConfig
from megatron_lite.compress.axes import RESIDUAL
from megatron_lite.compress.depth import without
from megatron_lite.compress.scores import ImportanceConfig, random_scores
from megatron_lite.compress.sizes import resized, sizes_of
from megatron_lite.compress.surgery import PrunedTensors
from megatron_lite.compress.target import TargetConfig
from megatron_lite.config.compose import compose_config
from megatron_lite.models import Decoder
from megatron_lite.models.flops import parameter_count
from megatron_lite.models.huggingface import expected_shapes, export_folder
from megatron_lite.tensor_files import WholeTensors, read_whole
from megatron_lite.weights import Weights, load, open_weights, save_weights
from tests.compress.reference import head_rows, sliced
from tests.hf_folders import make_folder
from tests.model_configs import model_config
from tests.models.conftest import loud_decoder

# kind -> (sizes, residual layers, what transformers calls them)
TARGETS = {
    "nemotron": (
        {"hidden_size": 24, "ffn_size": 31, "heads": 2},
        (2, 3),
        {"hidden_size": 24, "intermediate_size": 31, "num_attention_heads": 2, "num_hidden_layers": 1},
    ),
    "llama": ({"hidden_size": 36}, (0, 1, 2, 3), {"hidden_size": 36, "head_dim": 10, "model_type": "llama"}),
    "llama, odd": ({"hidden_size": 37}, (0, 1, 2, 3), {"hidden_size": 37, "head_dim": 10, "model_type": "mistral"}),
    "mistral": ({"ffn_size": 20, "heads": 4}, (0, 1, 2, 3), {"intermediate_size": 20}),
    "nemotron_h": (
        {"hidden_size": 33, "ffn_size": 17, "heads": 2, "mamba_heads": 4, "mamba_head_dim": 5},
        (0, 1, 3),
        {
            "hidden_size": 33,
            "intermediate_size": 17,
            "num_attention_heads": 2,
            "mamba_num_heads": 4,
            "mamba_head_dim": 5,
            "hybrid_override_pattern": "M-*",
        },
    ),
}


def pruned(path, sizes, layers, **options):
    weights = open_weights(path)
    selection = random_scores(weights.config, 3).select(weights.config, sizes, layers, ImportanceConfig())
    return weights, selection, PrunedTensors(weights.tensors, weights.config, selection, **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", TARGETS)
def test_what_is_exported_are_the_slices(kind, dtype, tmp_path):
    sizes, layers, changes = TARGETS[kind]
    folder = make_folder(tmp_path / "hf", kind.removesuffix(", odd"), dtype=dtype)
    weights, selection, tensors = pruned(folder, sizes, layers)
    export_folder(tmp_path / "out", config=tensors.config, tensors=WholeTensors(tensors), extra=weights.extra)
    ours = load_file(tmp_path / "out" / "model.safetensors")
    config = AutoConfig.from_pretrained(folder)
    is_hybrid = kind == "nemotron_h"
    hf_layers = list(layers) if is_hybrid else [layer // 2 for layer in layers[::2]]
    inner = {layer: dict(kept) for layer, kept in selection.inner.items()}
    if not is_hybrid:
        inner = {layer // 2: inner[layer] | inner[layer + 1] for layer in layers[::2]}
    before = load_file(folder / "model.safetensors")
    theirs = sliced(before, config, layers=hf_layers, hidden=selection.hidden, inner=inner)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    made = AutoConfig.from_pretrained(tmp_path / "out")
    same = [key for key in changes if key != "hybrid_override_pattern"]
    assert {key: getattr(made, key) for key in same} == {key: changes[key] for key in same}
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    tokens = torch.tensor([[5, 6, 7]])
    assert model.generate(tokens, max_new_tokens=3, min_new_tokens=3, do_sample=False).shape == (1, 6)
    decoder, _ = load(tmp_path / "out")
    with torch.no_grad():  # the values of bf16 in fp32, at 1e-6 of logits of size 10
        assert torch.allclose(model(tokens).logits, decoder(tokens)[..., :384], atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["nemotron_h", "llama"])
def test_any_slice_is_that_of_the_whole(kind, tmp_path, monkeypatch):
    monkeypatch.setattr("megatron_lite.compress.surgery.BLOCK_BYTES", 300)  # a few rows at a time
    sizes, layers, _ = TARGETS[kind]
    _, _, tensors = pruned(make_folder(tmp_path / "hf", kind), sizes, layers, head_residual=True)
    generator = torch.Generator().manual_seed(0)
    for name in tensors.names():
        whole = read_whole(tensors, name)
        for _ in range(3):
            box = []
            for length in whole.shape:
                start = int(torch.randint(0, length + 1, (1,), generator=generator))
                box.append(slice(start, int(torch.randint(start, length + 1, (1,), generator=generator))))
            part = tensors.read(name, [b.start for b in box], [b.stop - b.start for b in box])
            assert torch.equal(part, whole[tuple(box)]), name


def test_the_residual_of_pruned_heads(tmp_path):
    folder = make_folder(tmp_path / "hf", "mistral", num_attention_heads=16, head_dim=6)  # 2 groups of 8 query heads
    weights, selection, tensors = pruned(folder, {"heads": 10}, (0, 1, 2, 3), head_residual=True)
    scores = random_scores(weights.config, 3)
    per_head = scores.root("layers.0.mixer", "l2").view(16, 6).norm(dim=1)
    q = load_file(folder / "model.safetensors")["model.layers.0.self_attn.q_proj.weight"]
    expected = {}
    for group in range(2):
        ranked = sorted(range(8 * group, 8 * group + 8), key=lambda head: -per_head[head])
        for i in range(1, 6):  # as the paper counts: L = 8 heads, K = 5; head i gets the residual of head 2 K - i + 1
            head = q[head_rows([ranked[i - 1]], 6)]
            partner = 2 * 5 - i + 1
            expected[ranked[i - 1]] = 2 * head - q[head_rows([ranked[partner - 1]], 6)] if partner <= 8 else head
    export_folder(tmp_path / "out", config=tensors.config, tensors=WholeTensors(tensors), extra=weights.extra)
    ours = load_file(tmp_path / "out" / "model.safetensors")
    kept = sorted(expected)
    assert selection.inner[0]["heads"].tolist() == kept
    assert (selection.inner[0][RESIDUAL] >= 0).sum() == 6
    assert torch.equal(ours["model.layers.0.self_attn.q_proj.weight"], torch.cat([expected[head] for head in kept]))
    plain = pruned(folder, {"heads": 10}, (0, 1, 2, 3))[2]
    assert not torch.equal(
        read_whole(plain, "layers.0.mixer.qkv.weight"), read_whole(tensors, "layers.0.mixer.qkv.weight")
    )


@pytest.mark.parametrize(
    ("source", "sizes", "pattern", "parameters"),
    [
        ("mistral_nemo_12b", {"hidden_size": 4096, "ffn_size": 11520}, None, 8_414_105_600),
        (
            "nemotron_nano2_12b",
            {"hidden_size": 4480, "ffn_size": 15680},
            "M-M-M-MM-M-M-M*-M-M-M*-M-M-M-M*-M-M-M-M*-M-MM-M-M-M-M-M-",
            8_888_227_328,
        ),
    ],
)
def test_published_sizes(source, sizes, pattern, parameters):
    config = compose_config("plan", PlanConfig, [f"model={source}"]).model
    layers = TargetConfig(pattern=pattern).layers_of(config, range(len(config.symbols)))
    assert parameter_count(resized(config, sizes_of(config) | sizes, layers)) == parameters


class Held:
    """The tensors of a decoder."""

    def __init__(self, decoder) -> None:
        self.tensors = dict(decoder.named_parameters())

    def names(self):
        return self.tensors.keys()

    def shape(self, name):
        return tuple(self.tensors[name].shape)

    def dtype(self, name):
        return self.tensors[name].dtype

    def read(self, name, offsets, sizes):
        return self.tensors[name].detach()[tuple(slice(o, o + n) for o, n in zip(offsets, sizes))]


WINDOWED = {
    "family": "llama", "norm": "rmsnorm", "pattern": "**-*-", "hidden_size": 24, "attention.heads": 6, "attention.kv_heads": 2,
    "attention.head_dim": 4, "attention.value_head_dim": 5, "attention.window": 3, "attention.always_visible": 1,
    "attention.global_layers": [1], "attention.qk_norm": True, "linear_bias": True, "mlp.ffn_size": 20, "vocab_size": 50,
    "max_seq_len": 32,
}  # fmt: skip


def test_windows_stay_with_their_layers_and_values_have_a_width_of_their_own():
    """The pruned model computes what the whole one does without the layers, heads and neurons that go."""
    config = model_config(WINDOWED)
    whole = loud_decoder(config).double()
    layers = (1, 3, 4)
    selection = random_scores(config, 3).select(config, {"heads": 4, "ffn_size": 7}, layers, ImportanceConfig())
    tensors = PrunedTensors(Held(whole), config, selection)
    assert (tensors.config.attention.window, tensors.config.attention.global_layers) == (3, [0])
    small = Decoder(tensors.config).double()
    small.load_state_dict({name: read_whole(tensors, name) for name in tensors.names()})
    tokens = torch.arange(40).view(2, 20)
    with torch.no_grad(), without(whole, [0, 2]):
        for layer, axis, name, width in ((1, "heads", "out", 5), (3, "heads", "out", 5), (4, "ffn_size", "down", 1)):
            weight = whole.layers[layer].mixer.get_parameter(f"{name}.weight")
            gone = [i for i in range(weight.shape[1] // width) if i not in selection.inner[layer][axis]]
            weight.unflatten(1, (-1, width))[:, gone] = 0
        assert (whole(tokens) - small(tokens)).abs().max() < 1e-12 * small(tokens).abs().max()
    for others in ((1, 2), (2, 4)):  # only the layer without a window, and no attention
        left = resized(config, sizes_of(config), others)
        left.validate()
        assert (left.attention.window, left.attention.always_visible, left.attention.global_layers) == (None, 0, [])


class Renamed:
    """A source with one more parameter."""

    def __init__(self, source) -> None:
        self.source = source

    def names(self):
        return [*self.source.names(), "layers.0.mixer.later.weight"]

    def shape(self, name):
        return self.source.shape(name)


def test_what_no_row_knows_is_refused(tmp_path):
    weights, selection, _ = pruned(make_folder(tmp_path / "hf", "llama"), {"heads": 2}, (0, 1))
    with pytest.raises(ValueError, match=r"layers\.0\.mixer\.later\.weight cannot be pruned"):
        PrunedTensors(Renamed(weights.tensors), weights.config, selection)


class Constant:
    """The tensors of a model that is on no disk: each is made when it is read."""

    def __init__(self, config) -> None:
        self.shapes = {name: tuple(shape) for name, shape in expected_shapes(config).items()}

    def names(self):
        return self.shapes.keys()

    def shape(self, name):
        return self.shapes[name]

    def dtype(self, name):
        return torch.bfloat16

    def read(self, name, offsets, sizes):
        return torch.full(tuple(sizes), 0.5, dtype=torch.bfloat16)


MEMORY = """
import resource, sys, torch
from megatron_lite.commands.prune import compose_prune, prune
import megatron_lite.engine.fsdp, megatron_lite.training.build
torch.set_num_threads(1)
words = ["target.hidden_size=1024", "target.ffn_size=2880", "target.heads=24", "importance.score=random"]
config = compose_prune([f"checkpoint={sys.argv[1]}", f"output={sys.argv[2]}", "head_residual=true", *words])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
prune(config)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""


@pytest.mark.slow
def test_a_model_is_cut_in_the_memory_of_a_few_tensors(tmp_path):
    """At a sixteenth of Mistral NeMo's matrices, with fewer layers: what is in memory does not depend on their number."""
    nemo = compose_config("plan", PlanConfig, ["model=mistral_nemo_12b"]).model
    mlp = replace(nemo.mlp, ffn_size=14336 // 4)
    config = replace(nemo, hidden_size=5120 // 4, vocab_size=131072 // 4, num_layers=6, mlp=mlp)
    save_weights(tmp_path / "nemo", Weights(tmp_path, config, Constant(config)))
    largest = 131072 * 5120 // 16 * 2 / 2**20  # MiB: 80
    words = [sys.executable, "-c", MEMORY, str(tmp_path / "nemo"), str(tmp_path / "out")]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    assert open_weights(tmp_path / "out").config.hidden_size == 1024
    assert int(done.stdout.split()[-1]) < 3 * largest, done.stdout
