"""The command that continues prompts: transformers' own greedy text, the end token, streaming, files of prompts."""

from __future__ import annotations

import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer

from megatron_lite.commands.generate import stream_text
from megatron_lite.data.tokenizer import load_tokenizer
from megatron_lite.models.sampling import generate_tokens
from megatron_lite.weights import load
from tests.hf_folders import TEXTS, command, make_folder, metaspace_tokenizer


@pytest.fixture(scope="module", params=["nemotron", "llama", "mistral"])
def folder(request, tiny_data, tmp_path_factory):
    path = tmp_path_factory.mktemp("hf") / request.param
    return make_folder(path, request.param, tokenizer=tiny_data / "tokenizer")


@pytest.fixture(scope="module")
def metaspace(tmp_path_factory):
    return load_tokenizer(metaspace_tokenizer(tmp_path_factory.mktemp("metaspace")))


@pytest.fixture(scope="module")
def byte_level(tiny_data):
    return load_tokenizer(tiny_data / "tokenizer")


def test_greedy_text_is_that_of_transformers(folder, capsys):
    prompt = "the model reads"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokens = tokenizer(prompt, add_special_tokens=False, return_tensors="pt")["input_ids"]
    # eos_token_id=0 is the tokenizer's, the one end that the command knows of; the folder's config names others
    expected = theirs.generate(
        tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=24, do_sample=False, eos_token_id=0, pad_token_id=0
    )[0, tokens.shape[1] :].tolist()  # fmt: skip
    model, _ = load(folder)
    assert list(generate_tokens(model, tokens[0].tolist(), max_new_tokens=24, eod=0)) == [t for t in expected if t != 0]
    assert command("generate", f"checkpoint={folder}", f"prompt='{prompt}'", "max_new_tokens=24") == 0
    text = tokenizer.decode([*tokens[0].tolist(), *(t for t in expected if t != 0)], clean_up_tokenization_spaces=False)
    assert capsys.readouterr().out == text + "\n"


def test_it_stops_at_the_end_token(tiny_data, tmp_path, capsys):
    folder = make_folder(tmp_path / "hf", "nemotron", tokenizer=tiny_data / "tokenizer")
    model, tokenizer = load(folder)
    prompt = tokenizer("the model", add_special_tokens=False)["input_ids"]
    without = list(generate_tokens(model, prompt, max_new_tokens=30))
    end = without[6]
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(end)  # what it would say anyway now ends the document
    tokenizer.save_pretrained(folder)
    assert load(folder)[1].eos_token_id == end
    command("generate", f"checkpoint={folder}", "prompt='the model'", "max_new_tokens=30")
    assert capsys.readouterr().out == tokenizer.decode([*prompt, *without[: without.index(end)]]) + "\n"


def test_the_seed_fixes_what_is_drawn(straight, capsys):
    texts = []
    for seed in (1, 1, 2):
        command(
            "generate", f"checkpoint={straight}", "prompt='the '", "sampling.temperature=1", f"sampling.seed={seed}",
            "sampling.top_p=0.95", "sampling.top_k=50",
        )  # fmt: skip
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] != texts[2]


def test_a_file_of_prompts(straight, tmp_path, capsys):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("the model\n\ndef return\n", encoding="utf-8")
    command("generate", f"checkpoint={straight}", f"prompt_file={prompts}", "max_new_tokens=4")
    both = capsys.readouterr().out
    alone = ""
    for prompt in ("the model", "def return"):
        command("generate", f"checkpoint={straight}", f"prompt='{prompt}'", "max_new_tokens=4")
        alone += capsys.readouterr().out
    assert both == alone


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ([], "give either prompt"),
        (["prompt=a", "prompt_file=b"], "give either prompt"),
        (["prompt_file=nowhere.txt"], "prompt_file=nowhere.txt does not exist"),
        (["prompt=a", "max_new_tokens=0"], "max_new_tokens=0 must be at least 1"),
        (["prompt=a", "max_new_tokens=100000"], "pass model.max_seq_len"),
        (["prompt=a", "sampling.top_p=0"], "sampling.top_p=0.0"),
    ],
)
def test_wrong_keys(overrides, message, straight):
    with pytest.raises(ValueError, match=message):
        command("generate", f"checkpoint={straight}", *overrides)


def test_without_a_tokenizer_it_says_what_is_missing(tmp_path):
    folder = make_folder(tmp_path / "hf", "llama")
    with pytest.raises(ValueError, match="no tokenizer lies beside"):
        command("generate", f"checkpoint={folder}", "prompt=a")


def test_text_is_written_while_tokens_are_made(straight, monkeypatch):
    """Every piece is on the terminal before the next token is computed."""
    import megatron_lite.commands.generate as generate

    events = []
    original = generate.generate_tokens

    def watched(*arguments, **keys):
        for token in original(*arguments, **keys):
            events.append("token")
            yield token

    class Terminal:
        def write(self, text):
            events.append("text")

        def flush(self):
            events.append("flush")

    monkeypatch.setattr(generate, "generate_tokens", watched)
    monkeypatch.setattr(sys, "stdout", Terminal())
    command("generate", f"checkpoint={straight}", "prompt='the model'", "max_new_tokens=6")
    assert events[0] == "text"  # the prompt
    assert events.index("flush") < len(events) - 1 - events[::-1].index("token")


@pytest.mark.parametrize("kind", ["byte_level", "metaspace"])
@given(text=st.lists(st.sampled_from([*TEXTS, " ", "🙂", "é", "\n", "  a"])).map("".join), cut=st.integers(0, 20))
@settings(max_examples=60)
def test_pieces_add_up_to_the_whole_text(kind, byte_level, metaspace, text, cut):
    tokenizer = {"byte_level": byte_level, "metaspace": metaspace}[kind]
    before, new = (tokenizer(part, add_special_tokens=False)["input_ids"] for part in (text[:cut], text[cut:]))
    pieces = list(stream_text(tokenizer, new, before=before))
    whole, known = tokenizer.decode(before + new), tokenizer.decode(before)
    assert known + "".join(pieces) == whole
    assert "\ufffd" not in "".join(pieces)


@given(tokens=st.lists(st.integers(0, 383), max_size=40))
@settings(max_examples=100)
def test_bytes_that_are_no_text_add_up_too(byte_level, tokens):
    assert "".join(stream_text(byte_level, tokens)) == byte_level.decode(tokens)


def test_spaces_between_words_survive(metaspace):
    tokens = metaspace("the model reads", add_special_tokens=False)["input_ids"]
    alone = "".join(metaspace.decode([token]) for token in tokens)
    assert alone != "the model reads"  # this is why tokens are not decoded one by one
    assert "".join(stream_text(metaspace, tokens)) == "the model reads"


def test_streaming_costs_what_the_text_costs(metaspace):
    class Counting:
        decoded = 0

        def decode(self, tokens, **keys):
            self.decoded += len(tokens)
            return metaspace.decode(tokens, **keys)

    tokens = metaspace("the model reads every word " * 40, add_special_tokens=False)["input_ids"]
    counting = Counting()
    list(stream_text(counting, tokens))
    assert counting.decoded <= 4 * len(tokens)  # two pieces and one: decoding everything anew would be half the square
