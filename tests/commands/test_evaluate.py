"""Evaluation through the command: transformers' own loss on the same windows, and what is refused."""

from __future__ import annotations

import json
import math

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

from megatron_lite.data.indexed import IndexedDataset
from megatron_lite.data.tokenizer import load_tokenizer
from megatron_lite.errors import CheckpointError
from tests import runs
from tests.hf_folders import command, make_folder, metaspace_tokenizer


def evaluate(data, checkpoint, *overrides) -> list[str]:
    return ["--config-dir", str(data), "data=tiny", "data.seq_len=32", f"checkpoint={checkpoint}", *overrides]


def losses(capsys, data, checkpoint, *overrides) -> dict[str, float]:
    assert command("evaluate", *evaluate(data, checkpoint, "json=true", *overrides)) == 0
    return json.loads(capsys.readouterr().out.splitlines()[-1])["val_loss"]


def held_out(data, name, *, windows: int, seq_len: int) -> torch.Tensor:
    """The first windows of a held-out file, straight from the file: (windows, seq_len + 1) tokens."""
    tokens = IndexedDataset(data / f"{name}.validation").tokens(0, windows * seq_len + 1).astype("int64")
    return torch.stack([torch.from_numpy(tokens[k * seq_len : (k + 1) * seq_len + 1]) for k in range(windows)])


@pytest.mark.parametrize("kind", ["nemotron", "llama", "mistral"])
@pytest.mark.parametrize("shard", ["1GB", "30KB"])
def test_the_loss_is_transformers_own(kind, shard, tiny_data, tmp_path, capsys):
    folder = make_folder(tmp_path / "hf", kind, shard=shard)
    ours = losses(capsys, tiny_data, folder, "micro_batch_size=3", "data.reset_attention=false")
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    for group, (name, _) in runs.GROUPS.items():
        windows = held_out(tiny_data, name, windows=4, seq_len=32)
        with torch.no_grad():
            expected = theirs(input_ids=windows, labels=windows).loss.item()
        # fp32 rounding of a mean over 128 tokens is about 1e-6; a window more or less is about 1e-1
        assert ours[f"{group}/{name}"] == pytest.approx(expected, rel=1e-5)


def test_the_loss_of_separated_documents_is_that_of_each_alone(tiny_data, tmp_path, capsys):
    folder = make_folder(tmp_path / "hf", "nemotron")
    ours = losses(capsys, tiny_data, folder, "data.reset_attention=true")
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    for group, (name, _) in runs.GROUPS.items():
        total, count = 0.0, 0
        for window in held_out(tiny_data, name, windows=4, seq_len=32):
            ends = (window == 0).nonzero().flatten() + 1  # 0 ends a document
            for piece in window.tensor_split(ends):
                if len(piece) > 1:
                    with torch.no_grad():
                        total += theirs(input_ids=piece[None], labels=piece[None]).loss.item() * (len(piece) - 1)
                    count += len(piece) - 1
        assert ours[f"{group}/{name}"] == pytest.approx(total / count, rel=1e-5)


def logged(run_dir) -> dict:
    """The last validation row of a run."""
    lines = map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines())
    return [row for row in lines if "val_loss" in row][-1]


def printed(capsys, *overrides) -> dict:
    assert command("evaluate", "json=true", *overrides) == 0
    return json.loads(capsys.readouterr().out.splitlines()[-1])


@pytest.mark.parametrize(
    "keys",
    [
        [],
        # a micro-batch with blank windows, another length, precision and mask than the defaults
        ["data.validation.windows=5", "data.seq_len=24", "precision=bf16", "data.mask_eod_loss=true"],
    ],
)
def test_a_run_is_evaluated_as_it_was_trained_to_the_last_digit(keys, tiny_data, straight, tmp_path, capsys):
    run_dir = straight
    if keys:
        run_dir = tmp_path / "r"
        assert runs.run(tiny_data, run_dir, "train.max_steps=2", "schedule.warmup_steps=0", *keys) == 0
    shown = printed(capsys, f"checkpoint={run_dir}")
    assert {key: logged(run_dir)[key] for key in ("val_loss", "bits_per_byte")} == {
        key: shown[key] for key in ("val_loss", "bits_per_byte")
    }


def test_what_is_given_holds_over_what_the_run_was_trained_with(tiny_data, straight, capsys):
    own = logged(straight)["val_loss"]
    own_group = ["--config-dir", str(tiny_data), "data=tiny"]  # says nothing of the length of a window
    assert printed(capsys, f"checkpoint={straight}", *own_group)["val_loss"] == own
    for key in ("data.seq_len=16", "data.validation.windows=3", "precision=bf16", "data.reset_attention=false"):
        given = printed(capsys, f"checkpoint={straight}", key)["val_loss"]
        assert given.keys() == own.keys()
        assert all(given[source] != own[source] for source in own), key


def test_a_folder_that_names_no_data_needs_some(tmp_path):
    folder = make_folder(tmp_path / "hf", "llama")
    with pytest.raises(ValueError, match=r"checkpoint=.*hf .*data=<"):
        command("evaluate", f"checkpoint={folder}")


def test_bits_per_byte_are_those_of_the_decoded_text(tiny_data, straight, capsys):
    shown = printed(capsys, f"checkpoint={straight}", "data.reset_attention=false", "data.mask_eod_loss=false")
    windows = held_out(tiny_data, "prose", windows=4, seq_len=32)  # ASCII: no window begins inside a character
    text = load_tokenizer(tiny_data / "tokenizer").decode(windows[:, 1:].flatten().tolist(), skip_special_tokens=True)
    nats = shown["val_loss"]["english/prose"] * 4 * 32
    expected = nats / math.log(2) / len(text.encode())
    assert shown["bits_per_byte"]["english/prose"] == pytest.approx(expected, rel=1e-12)  # fp64 throughout


def test_the_table_names_every_source(tiny_data, straight, capsys):
    command("evaluate", *evaluate(tiny_data, straight))
    table = capsys.readouterr().out
    assert "bits per byte" in table
    assert all(f"{group}/{name}" in table for group, (name, _) in runs.GROUPS.items())


def test_bf16_is_near_fp32(tiny_data, straight, capsys):
    full = losses(capsys, tiny_data, straight)
    half = losses(capsys, tiny_data, straight, "precision=bf16")
    assert half != full
    assert half == pytest.approx(full, rel=2e-2)  # 8 bits of mantissa: 0.4 % an operation


def test_another_tokenizer_is_refused(tiny_data, straight, tmp_path):
    other = metaspace_tokenizer(tmp_path / "other")
    folder = make_folder(tmp_path / "hf", "llama", tokenizer=other)
    with pytest.raises(ValueError, match=r"was trained with tokenizer \w+, but data.tokenizer="):
        command("evaluate", *evaluate(tiny_data, folder))


def test_a_vocabulary_too_small_is_refused(tiny_data, tmp_path):
    folder = make_folder(tmp_path / "hf", "llama", vocab_size=100, pad_token_id=3)
    with pytest.raises(ValueError, match=r"model.vocab_size=100 .*set model.vocab_size=384"):
        command("evaluate", *evaluate(tiny_data, folder))


def test_data_without_held_out_files_is_refused(tiny_data, straight, tmp_path):
    config = yaml.safe_load((tiny_data / "data" / "tiny.yaml").read_text())
    for group in config["groups"].values():
        for source in group["sources"].values():
            del source["validation"]
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "tiny.yaml").write_text(yaml.safe_dump(config))
    with pytest.raises(ValueError, match="no source has a `validation` file"):
        command("evaluate", *evaluate(tmp_path, straight))


def test_a_damaged_checkpoint_named_directly_is_refused(tiny_data, straight, copy_of):
    checkpoint = copy_of(straight) / "checkpoints" / "step_00000020"
    for victim in checkpoint.glob("*.safetensors"):
        data = bytearray(victim.read_bytes())
        data[-3] ^= 1
        victim.write_bytes(data)
    with pytest.raises(CheckpointError, match="is damaged: its SHA-256"):
        command("evaluate", *evaluate(tiny_data, checkpoint))
