"""Wrong inputs of evaluate, generate and convert, and Hugging Face folders that are not supported."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_lite.data.tokenizer import train_tokenizer
from tests import runs
from tests.distributed import PATIENCE_SECONDS
from tests.hf_folders import CONFIGS

# $RUN is a finished run, $EMPTY an empty folder, $DATA what the runs read
GENERATE = [
    ("", r"checkpoint is not given.*add checkpoint="),
    ("checkpoint=$RUN", r"give either prompt='\.\.\.' or prompt_file="),
    ("checkpoint=$RUN prompt=a prompt_file=b", r"give either prompt='\.\.\.' or prompt_file="),
    ("checkpoint=$RUN prompt_file=/nowhere", r"prompt_file=/nowhere does not exist"),
    ("checkpoint=$RUN prompt_file=$DATA", r"prompt_file=.* is a folder"),
    ("checkpoint=$RUN prompt_file=$RUN/loss.png", r"prompt_file=.*loss\.png is not UTF-8 text"),
    ("checkpoint=$RUN prompt_file=/dev/null", r"prompt_file=/dev/null holds no prompt; write one a line"),
    ("checkpoint= prompt=a", r"path of the weights is empty; give a run directory"),
    ("checkpoint=/nowhere prompt=a", r"/nowhere does not exist; give a run directory"),
    ("checkpoint=$EMPTY prompt=a", r"empty is not a checkpoint"),
    ("checkpoint=$RUN prompt=a max_new_tokens=0", r"max_new_tokens=0 must be at least 1"),
    ("checkpoint=$RUN prompt=a max_new_tokens=100000", r"model\.max_seq_len=\d+; lower max_new_tokens to"),
    ("checkpoint=$RUN prompt=a sampling.temperature=-1", r"sampling\.temperature=-1\.0 must be 0"),
    ("checkpoint=$RUN prompt=a sampling.temperature=nan", r"sampling\.temperature=nan is not a finite number"),
    ("checkpoint=$RUN prompt=a sampling.temperature=1e-300", r"temperature=1e-300 must be 0 \(greedy\), or at least"),
    ("checkpoint=$RUN prompt=a sampling.seed=-1", r"sampling\.seed=-1 must be 0 or more"),
    ("checkpoint=$RUN prompt=a sampling.seed=99999999999999999999999", r"sampling\.seed=9+ must be .* below 2\*\*63"),
    ("checkpoint=$RUN prompt=a sampling.top_p=0", r"sampling\.top_p=0\.0"),
    ("checkpoint=$RUN prompt=a sampling.top_k=-2", r"sampling\.top_k=-2 must be 0"),
    ("checkpoint=$RUN prompt=a temperature=1", r"no key temperature; did you mean sampling\.temperature"),
]
EVALUATE = [
    ("", r"checkpoint is not given"),
    ("checkpoint=$RUN threads=0", r"threads=0 must be at least 1"),
    ("checkpoint=$RUN data=nothere", r"data=nothere is unknown; choose one of"),
    ("checkpoint=$RUN --config-dir $DATA data=tiny micro_batch_size=0", r"micro_batch_size=0 must be at least 1"),
    (
        "checkpoint=$RUN --config-dir $DATA data=tiny precision.name=fp8",
        r"precision\.name=fp8 is unknown; choose one of",
    ),
    ("checkpoint=$RUN --config-dir $DATA data=tiny data.seq_len=0", r"data\.seq_len=0 must be at least 1"),
    (
        "checkpoint=$RUN --config-dir $DATA data=tiny data.seq_len=4096",
        r"less than one window of .* 4097; lower data\.seq_len to",
    ),
    (
        "checkpoint=$RUN --config-dir $DATA data=tiny ~data.groups.english ~data.groups.code data.phases=[] "
        "data.groups.multilingual.sources.other.validation=null",
        r"no source has a `validation` file; name one",
    ),
]
CONVERT = [
    ("target=x", r"source is not given.*add source="),
    ("source=$RUN", r"target is not given.*add target="),
    ("source=/nowhere target=x", r"/nowhere does not exist; give a run directory"),
    ("source=$RUN target=", r"target= is the folder that you are in; name a new one"),
    ("source=$RUN target=. to=native", r"target=\. is the folder that you are in; name a new one"),
    ("source=$EMPTY target=x", r"empty is not a checkpoint"),
    ("source=$RUN target=x to=onnx", r"to=onnx is unknown; choose hf or native"),
    ("source=$RUN target=x dtype=int4", r"dtype=int4 is unknown; choose source, fp32"),
    ("source=$RUN target=x max_shard_gb=0", r"max_shard_gb=0\.0 must be above 0"),
    ("source=$RUN target=$DATA", r"exists and is not an empty folder; choose another"),
    ("source=$RUN target=$DATA to=native", r"exists and is not an empty folder; choose another"),
    ("source=$RUN target=$DATA/prose.bin", r"exists and is not an empty folder; choose another"),
    ("source=$RUN target=$DATA/prose.bin to=native", r"exists and is not an empty folder; choose another"),
    ("source=$RUN target=$DATA/prose.bin/x", r"prose\.bin: File exists; .*name another place"),
    (
        "source=$EMPTY target=/proc/a/b",
        r"/proc/a: No such file or directory; .*name another place",
    ),  # before the source is read
]
COMMANDS = {"generate": GENERATE, "evaluate": EVALUATE, "convert": CONVERT}


@pytest.mark.parametrize(
    ("command", "typed", "says"), [(command, *case) for command, cases in COMMANDS.items() for case in cases]
)
def test_a_wrong_command_line_is_refused(tour, straight, command, typed, says):
    (tour.home / "empty").mkdir()
    for name, value in (("$RUN", straight), ("$EMPTY", tour.home / "empty"), ("$DATA", tour.data)):
        typed = typed.replace(name, str(value))
    tour.refused(command, *typed.split(), says=says)


def test_a_model_of_another_tokenizer_is_not_evaluated(tour, straight):
    folder = Path(shutil.copytree(tour.data, tour.home / "data"))
    train_tokenizer(["a b c d e f g h " * 3, "aaaa bbbb cccc"], folder / "other", vocab_size=260)
    typed = [f"checkpoint={straight}", "--config-dir", str(folder), "data=tiny", f"data.tokenizer={folder / 'other'}"]
    tour.refused("evaluate", *typed, says=r"was trained with tokenizer .*tokenize the data with the model's tokenizer")


def test_generate_needs_a_tokenizer(tour, straight):
    run_dir = Path(shutil.copytree(straight, tour.home / "r"))
    shutil.rmtree(run_dir / "tokenizer")
    for checkpoint in (run_dir / "checkpoints").iterdir():  # the folder that the config names would do else
        text = (checkpoint / "manifest.json").read_text()
        assert str(tour.data / "tokenizer") in text
    hf = tour.home / "hf"
    assert tour.call("convert", f"source={run_dir}", f"target={hf}").code == 0
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (hf / name).unlink()
    tour.refused("generate", f"checkpoint={hf}", "prompt=a", says=r"checkpoint=.*put it into a folder `tokenizer`")


FOLDERS = {
    "another model": ("llama", {"model_type": "gpt2"}, r"model_type='gpt2' is not one that can be held"),
    "no model type": ("llama", {"model_type": None}, r"model_type=None"),
    "biases": ("llama", {"attention_bias": True}, r"attention_bias"),
    "scaled positions": (
        "llama",
        {"rope_parameters": {"rope_type": "longrope", "factor": 4.0, "rope_theta": 1e4}},
        r"longrope",
    ),
    "a window of nothing": ("mistral", {"sliding_window": 1}, r"sliding_window=1"),
    "another activation": ("nemotron", {"hidden_act": "gelu"}, r"hidden_act='gelu'"),
    "a size of text": ("llama", {"hidden_size": "big"}, r"hidden_size='big'"),
}


@pytest.mark.parametrize(("kind", "changes", "says"), FOLDERS.values(), ids=FOLDERS)
def test_a_hugging_face_folder_that_cannot_be_held_is_refused(tour, kind, changes, says):
    folder = tour.home / "hf"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIGS[kind]().to_dict() | changes))
    (folder / "model.safetensors").write_bytes(b"")
    tour.refused("convert", f"source={folder}", f"target={tour.home / 'x'}", "to=native", says=says)


def test_a_hugging_face_folder_without_its_tensors_is_refused(tour):
    folder = tour.home / "hf"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIGS["llama"]().to_dict()))
    tour.refused("convert", f"source={folder}", f"target={tour.home / 'x'}", "to=native", says=r"hf.*safetensors")
    (folder / "model.safetensors").write_bytes(b"half a file")
    tour.refused("convert", f"source={folder}", f"target={tour.home / 'x'}", "to=native", says=r"model\.safetensors")
    (folder / "config.json").write_text("{")
    tour.refused(
        "convert", f"source={folder}", f"target={tour.home / 'x'}", "to=native", says=r"config\.json is not JSON"
    )


@pytest.mark.slow
def test_in_processes_of_their_own(tour, tiny_data):
    """The same through the real commands: no traceback, exit code 2; two ranks refuse alike and leave nothing."""
    run_dir = tour.home / "r"
    command = [sys.executable, "-m", "megatron_lite"]
    typed = [*command, "train", *runs.arguments(tiny_data, run_dir, "train.micro_batch_size=8")]
    network = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(20000 + hash(str(run_dir)) % 20000)}
    shell = ["env", *(f"{key}={value}" for key, value in network.items())]
    calls = {
        "there is no command 'trian'": [*command, "trian"],
        "rank 0: train.micro_batch_size=8 x 2 data-parallel ranks = 16": [*shell, "RANK=0", *typed],
        "rank 1: train.micro_batch_size=8 x 2 data-parallel ranks = 16": [*shell, "RANK=1", *typed],
    }
    started = {
        says: subprocess.Popen(
            call, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=Path(__file__).parents[2]
        )
        for says, call in calls.items()
    }
    for says, process in started.items():
        output, _ = process.communicate(timeout=PATIENCE_SECONDS)
        assert process.returncode == 2, output
        assert "Traceback" not in output
        assert says.split(": ")[-1] in output
    assert not run_dir.exists()
