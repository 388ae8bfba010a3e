"""The same logits and gradients as transformers' own classes, in float32, with large weights and odd shapes.

Tolerance: 1e-4 of the logits' standard deviation. Float32 rounding over these depths is about 1e-6 of it; a lost bias, a
swapped head or half a rotation is of the order of the deviation itself.
"""

from __future__ import annotations

import json

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    NemotronConfig,
    NemotronHConfig,
    Qwen2Config,
    Qwen3Config,
)

from megatron_lite.models import Decoder
from megatron_lite.models.huggingface import export_folder, open_folder
from megatron_lite.models.huggingface.registry import FAMILIES, family_named
from megatron_lite.tensor_files import WholeTensors

# The 33 tokens of the tests go past the original length; in every case some pairs are fast, some slow and some between.
LLAMA3 = {
    "rope.scaling": "llama3", "rope.factor": 4.0, "rope.original_seq_len": 16, "rope.low_freq_factor": 0.2,
    "rope.high_freq_factor": 2.0,
}  # fmt: skip
YARN = {
    "rope.scaling": "yarn", "rope.factor": 4.0, "rope.original_seq_len": 16, "rope.beta_fast": 2.0, "rope.beta_slow": 0.1,
}  # fmt: skip
QWEN2 = {"family": "qwen2", "attention.qkv_bias": True}
QWEN3 = {"family": "qwen3", "attention.qk_norm": True}
CASES = {
    "nemotron": ("nemotron", {}),
    "nemotron one kv head, head_dim not hidden/heads": (
        "nemotron",
        {"attention.kv_heads": 1, "attention.head_dim": 20},
    ),
    "nemotron every head its own kv": ("nemotron", {"attention.kv_heads": 4, "vocab_size": 97}),
    "nemotron hidden not divisible": ("nemotron", {"hidden_size": 50, "attention.heads": 3, "attention.kv_heads": 3}),
    "nemotron quarter rotary": ("nemotron", {"attention.head_dim": 16, "rope.fraction": 0.25}),
    "nemotron full rotary, other base": ("nemotron", {"rope.fraction": 1.0, "rope.base": 500.0}),
    "nemotron tied, large eps": ("nemotron", {"tie_embeddings": True, "norm_eps": 0.1}),
    "llama": ("llama", {}),
    "llama tied, one kv head": ("llama", {"tie_embeddings": True, "attention.kv_heads": 1}),
    "llama head_dim not hidden/heads": ("llama", {"attention.head_dim": 10, "norm_eps": 0.1, "vocab_size": 99}),
    "llama scaled as 3.1": ("llama", LLAMA3),
    "llama linear": ("llama", {"rope.scaling": "linear", "rope.factor": 3.0}),
    "qwen2 yarn": ("llama", QWEN2 | YARN),
    "qwen3, head_dim not hidden/heads, tied": ("llama", QWEN3 | {"attention.head_dim": 16, "tie_embeddings": True}),
    "qwen3 yarn": ("llama", QWEN3 | YARN | {"rope.attention_factor": 1.5}),
    "nemotron yarn": ("nemotron", YARN | {"attention.head_dim": 24}),
    "mistral": ("llama", {"family": "mistral"}),
    "mistral window": ("llama", {"family": "mistral", "attention.window": 7}),
    "mistral hidden not divisible": ("llama", {"family": "mistral", "hidden_size": 50, "attention.heads": 6}),
    "hybrid": ("hybrid", {}),
    "hybrid one group, own head dims, two taps": (
        "hybrid",
        {"mamba.groups": 1, "mamba.head_dim": 7, "mamba.conv": 2, "attention.head_dim": 10, "pattern": "MM*M-*"},
    ),
    "hybrid every head its own group, dt limits": (
        "hybrid",
        {
            "mamba.groups": 6,
            "mamba.dt_limits": [0.7, float("inf")],
            "norm_eps": 0.1,
            "pattern": "M*",
        },  # transformers wants one attention layer
    ),
}


@pytest.fixture(params=CASES, ids=lambda name: name.replace(" ", "_"))
def config(request):
    kind, changes = CASES[request.param]
    return request.getfixturevalue(kind)(**changes)


def in_transformers(folder, dtype=torch.float32):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="eager")
    return model.eval()


def assert_close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    assert actual.shape == expected.shape
    error = (actual - expected).abs().max() / expected.std()
    assert error < 1e-4, f"{error:.2e} of the standard deviation"


def test_export_has_transformers_logits_and_gradients(config, loud, tmp_path):
    model = loud(config)
    export_folder(tmp_path / "hf", config=config, tensors=dict(model.named_parameters()))
    reference = in_transformers(tmp_path / "hf")
    assert type(reference).__name__ == family_named(config.family).architecture
    tokens = torch.randint(0, config.vocab_size, (2, 33), generator=torch.Generator().manual_seed(1))
    logits, expected = model(tokens), reference(tokens).logits
    assert_close(logits, expected)

    labels = tokens.roll(-1, 1).flatten()
    for values in (logits, expected):
        torch.nn.functional.cross_entropy(values.flatten(0, 1), labels).backward()
    # NemotronH calls on disk what it calls model in memory `backbone`
    on_disk = "backbone." if config.family == "nemotron_h" else "model."
    gradients = {name.replace("model.", on_disk): p.grad for name, p in reference.named_parameters()}
    for rule in family_named(config.family).rules(config):
        ours = model.get_parameter(rule.native).grad
        for name, part in zip(rule.hf, rule.to_hf(ours), strict=True):
            # float32 sums over 66 tokens in another order: 1e-6 of the largest; 1e-3 still sees any wrong term
            error = (part - gradients[name]).abs().max() / gradients[name].abs().max()
            assert error < 1e-3, f"{name}: {error:.2e}"


@pytest.mark.parametrize("name", ["llama scaled as 3.1", "qwen2 yarn", "qwen3 yarn"])
def test_bf16_is_as_near_to_float32_as_transformers_bf16_past_the_original_length(name, llama, loud, tmp_path):
    """One rounding of a hidden state turns into any logit, so the two bf16 models are both compared with float32."""
    model = loud(llama(**CASES[name][1]), std=0.15).bfloat16()
    export_folder(tmp_path / "hf", config=model.config, tensors=dict(model.named_parameters()))
    tokens = torch.randint(0, model.config.vocab_size, (8, 64), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        exact = in_transformers(tmp_path / "hf")(tokens).logits[:, 16:]
        theirs = in_transformers(tmp_path / "hf", torch.bfloat16)(tokens).logits[:, 16:].float()
        ours = model(tokens)[:, 16:].float()
    error, expected = ((logits - exact).square().mean().sqrt() / exact.std() for logits in (ours, theirs))
    assert error < 1.2 * expected < 0.1, f"{error:.1e}, transformers {expected:.1e}"


HF_MODELS = {
    "nemotron": NemotronConfig(
        vocab_size=77, hidden_size=40, intermediate_size=52, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, rope_parameters={"rope_type": "default", "rope_theta": 300.0,
        "partial_rotary_factor": 0.25}, max_position_embeddings=64,
    ),
    "llama": LlamaConfig(
        vocab_size=77, hidden_size=40, intermediate_size=52, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=1, tie_word_embeddings=True, rms_norm_eps=1e-3, pad_token_id=7,
        max_position_embeddings=64,
    ),
    "mistral": MistralConfig(
        vocab_size=77, hidden_size=40, intermediate_size=52, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, head_dim=14, sliding_window=None, rope_parameters={"rope_type": "default",
        "rope_theta": 1e6}, max_position_embeddings=64,
    ),
    "mistral window": MistralConfig(
        vocab_size=77, hidden_size=40, intermediate_size=52, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, head_dim=14, sliding_window=6, max_position_embeddings=64,
    ),
    "llama3": LlamaConfig(
        vocab_size=77, hidden_size=40, intermediate_size=52, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=1, rope_parameters={"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0,
        "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8}, max_position_embeddings=64,
    ),
    "qwen2": Qwen2Config(
        vocab_size=77, hidden_size=40, intermediate_size=52, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, rope_parameters={"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0,
        "original_max_position_embeddings": 16}, max_position_embeddings=64, sliding_window=32, max_window_layers=1,
    ),
    "qwen3": Qwen3Config(
        vocab_size=77, hidden_size=40, intermediate_size=52, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, head_dim=14, max_position_embeddings=64, tie_word_embeddings=True,
    ),
    "nemotron_h": NemotronHConfig(
        vocab_size=77, hidden_size=40, intermediate_size=52, layers_block_type=["linear_attention", "mlp", "linear_attention",
        "full_attention"], num_attention_heads=4, num_key_value_heads=2, head_dim=14, mamba_num_heads=6, mamba_head_dim=9,
        n_groups=2, ssm_state_size=7, chunk_size=8, time_step_min=0.3, max_position_embeddings=64,
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", HF_MODELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_transformers_models_come_in_and_go_out_unchanged(kind, dtype, tmp_path):
    torch.manual_seed(0)
    reference = AutoModelForCausalLM.from_config(HF_MODELS[kind], attn_implementation="eager")
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter.normal_(0, 0.3)
    reference.to(dtype).save_pretrained(tmp_path / "in", max_shard_size="20KB")
    assert len(list((tmp_path / "in").glob("*.safetensors"))) > 1
    folder = open_folder(tmp_path / "in")
    assert all(tensor.dtype == dtype for tensor in WholeTensors(folder.tensors).values())

    model = Decoder(folder.config)
    model.load_state_dict(dict(WholeTensors(folder.tensors)))
    tokens = torch.randint(0, 77, (2, 21))
    assert_close(model(tokens), in_transformers(tmp_path / "in")(tokens).logits)

    export_folder(
        tmp_path / "out",
        config=folder.config,
        tensors=WholeTensors(folder.tensors),
        extra=folder.extra,
        max_shard_bytes=30_000,
    )
    assert_same_meaning(tmp_path / "in", tmp_path / "out")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert again.dtype == dtype
    for (name, tensor), other in zip(reference.to(dtype).state_dict().items(), again.state_dict().values()):
        assert torch.equal(tensor, other), name


def assert_same_meaning(first, second) -> None:
    """Both config.json read by transformers give the same configuration, generation_config.json the same content."""
    a, b = (AutoConfig.from_pretrained(folder).to_dict() for folder in (first, second))
    # flat copies beside rope_parameters, for readers older than transformers 5
    for key in ("_name_or_path", "rope_theta", "rope_scaling", "partial_rotary_factor"):
        a.pop(key, None)
        b.pop(key, None)
    assert a == b
    read = [json.loads((folder / "generation_config.json").read_text()) for folder in (first, second)]
    assert read[0] == read[1]


@pytest.mark.parametrize(
    ("family", "reference"),
    [
        ("nemotron4", NemotronConfig),
        ("llama", LlamaConfig),
        ("mistral", MistralConfig),
        ("qwen2", Qwen2Config),
        ("qwen3", Qwen3Config),
        ("nemotron_h", NemotronHConfig),
    ],
)
def test_defaults_are_those_of_transformers(family, reference):
    for key, value in FAMILIES[family].defaults.items():
        declared = reference.__dataclass_fields__[key].default
        assert value == declared, key
