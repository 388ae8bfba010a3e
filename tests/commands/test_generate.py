"""The command that continues prompts: transformers' own greedy text, the end token, streaming, files of prompts."""

from __future__ import annotations

import io
import json
import shutil
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, processors
from transformers import AutoModelForCausalLM, AutoTokenizer

from megatron_lite.commands.generate import GenerateConfig, _prompts, stream_text
from megatron_lite.data.tokenizer import load_tokenizer
from megatron_lite.models.huggingface.generation import end_tokens
from megatron_lite.weights import load
from tests.hf_folders import TEXTS, command, make_folder, metaspace_tokenizer


@pytest.fixture(scope="module", params=["nemotron", "llama", "mistral", "nemotron_h"])
def folder(request, tiny_data, tmp_path_factory):
    path = tmp_path_factory.mktemp("hf") / request.param
    return make_folder(path, request.param, tokenizer=tiny_data / "tokenizer")


@pytest.fixture(scope="module")
def metaspace(tmp_path_factory):
    return load_tokenizer(metaspace_tokenizer(tmp_path_factory.mktemp("metaspace")))


@pytest.fixture(scope="module")
def byte_level(tiny_data):
    return load_tokenizer(tiny_data / "tokenizer")


PROMPT = "the model reads"


def with_begin_token(folder):
    """The folder's tokenizer now puts its begin token, id 1, before every text, as Llama's does."""
    path = folder / "tokenizer.json"
    tokenizer = Tokenizer.from_file(str(path))
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{tokenizer.id_to_token(1)} $A", special_tokens=[(tokenizer.id_to_token(1), 1)]
    )
    path.write_text(tokenizer.to_str())


def text_of_transformers(folder, **keys):
    """What transformers makes of the folder as it is: prompt and greedy text, without the end token."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokens = tokenizer(PROMPT, return_tensors="pt")["input_ids"]
    made = model.generate(
        tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=24, do_sample=False, pad_token_id=0, **keys
    )[0, tokens.shape[1] :].tolist()
    ends = model.generation_config.eos_token_id
    ends = ends if isinstance(ends, list) else [ends]
    made = made[: next((i for i, token in enumerate(made) if token in ends), None)]
    known = tokenizer.decode(tokens[0])
    return PROMPT + tokenizer.decode([*tokens[0].tolist(), *made])[len(known) :], made


def set_ends(folder, ends, files=("config.json", "generation_config.json")):
    for name in files:
        path = folder / name
        path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token_id": ends}))


@pytest.mark.parametrize("begin", [False, True])
def test_greedy_text_is_that_of_transformers(begin, folder, tmp_path, capsys):
    copy = shutil.copytree(folder, tmp_path / "hf")
    if begin:
        with_begin_token(copy)
    expected, made = text_of_transformers(copy)
    assert command("generate", f"checkpoint={copy}", f"prompt='{PROMPT}'", "max_new_tokens=24") == 0
    assert capsys.readouterr().out == expected + "\n"
    for ends in ([399, made[6]], made[4]):  # several end tokens, and one that is not the tokenizer's
        set_ends(copy, ends)
        expected, shorter = text_of_transformers(copy)
        assert len(shorter) < len(made)
        native = tmp_path / f"native_{ends}"
        command("convert", f"source={copy}", f"target={native}", "to=native")  # keeps what the folder says
        capsys.readouterr()
        for checkpoint in (copy, native):
            command("generate", f"checkpoint={checkpoint}", f"prompt='{PROMPT}'", "max_new_tokens=24")
            assert capsys.readouterr().out == expected + "\n"


def test_which_file_names_the_end_tokens():
    both = {"config": {"eos_token_id": 1}, "generation_config": {"eos_token_id": [2, 3]}}
    assert end_tokens(both, 0) == {2, 3}
    assert end_tokens({"config": {"eos_token_id": 1}, "generation_config": {"eos_token_id": None}}, 0) == {1}
    assert end_tokens({}, 0) == {0}
    with pytest.raises(ValueError, match=r"generation_config.json: eos_token_id='</s>'"):
        end_tokens({"generation_config": {"eos_token_id": "</s>"}}, 0)


def test_settings_that_are_not_applied_are_named(folder, tmp_path, capsys):
    copy = shutil.copytree(folder, tmp_path / "hf")
    path = copy / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"repetition_penalty": 1.3, "num_beams": 1}))
    command("generate", f"checkpoint={copy}", "prompt=a", "max_new_tokens=1")
    warnings = capsys.readouterr().err
    assert "repetition_penalty=1.3" in warnings
    assert "num_beams" not in warnings


def test_a_run_of_ours_ends_at_its_tokenizers_end_and_gets_no_begin_token(straight, capsys, monkeypatch):
    import megatron_lite.commands.generate as generate

    seen = []
    monkeypatch.setattr(generate, "generate_tokens", lambda model, tokens, **keys: seen.append((tokens, keys)) or [])
    tokenizer = load(straight)[1]
    command("generate", f"checkpoint={straight}", "prompt=''")
    command("generate", f"checkpoint={straight}", "prompt='the'")
    assert [tokens for tokens, _ in seen] == [
        [tokenizer.eos_token_id],
        tokenizer("the", add_special_tokens=False)["input_ids"],
    ]
    assert all(keys["end_tokens"] == {tokenizer.eos_token_id} for _, keys in seen)


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
    prompts.write_bytes(b"\xef\xbb\xbfthe model\n\r\ndef return\r\n")
    command("generate", f"checkpoint={straight}", f"prompt_file={prompts}", "max_new_tokens=4")
    both = capsys.readouterr().out
    command("generate", f"checkpoint={straight}", f"prompt_file={prompts}", "max_new_tokens=4", "batch_size=2")
    assert capsys.readouterr().out == both
    alone = ""
    for prompt in ("the model", "def return"):
        command("generate", f"checkpoint={straight}", f"prompt='{prompt}'", "max_new_tokens=4")
        alone += capsys.readouterr().out
    assert both == alone


def test_a_line_ends_with_a_line_feed_only(tmp_path):
    odd = "a\u2028b\u2029c\x85d\x0ce\x0bf\x1cg\rh"
    (tmp_path / "prompts.txt").write_bytes(f"{odd}\ntwo".encode())
    assert _prompts(GenerateConfig(prompt_file=str(tmp_path / "prompts.txt"))) == [odd, "two"]


def test_prompts_from_standard_input(monkeypatch):
    def given(data):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))

    given("one\u2028 prompt\nof two lines\n".encode())
    assert _prompts(GenerateConfig(prompt="-")) == ["one\u2028 prompt\nof two lines"]
    given(b"one\ntwo\n")
    assert _prompts(GenerateConfig(prompt_file="-")) == ["one", "two"]
    given(b"caf\xe9")
    with pytest.raises(ValueError, match=r"prompt=-.*not UTF-8"):
        _prompts(GenerateConfig(prompt="-"))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ([], "give either prompt"),
        (["prompt=a", "prompt_file=b"], "give either prompt"),
        (["prompt_file=nowhere.txt"], "prompt_file=nowhere.txt does not exist"),
        (["prompt=a", "max_new_tokens=0"], "max_new_tokens=0 must be at least 1"),
        (["prompt=a", "batch_size=0"], "batch_size=0 must be at least 1"),
        (["prompt=a", "max_new_tokens=100000"], "model.max_seq_len"),
        (["prompt=a", "sampling.top_p=0"], "sampling.top_p=0.0"),
    ],
)
def test_wrong_keys(overrides, message, straight):
    with pytest.raises(ValueError, match=message):
        command("generate", f"checkpoint={straight}", *overrides)


def test_nothing_is_printed_before_a_prompt_that_is_too_long(straight, tmp_path, capsys):
    (tmp_path / "prompts").write_text("short\n" + "long " * 1000)
    says = rf"prompt 2 of prompt_file={tmp_path}/prompts: .*model\.max_seq_len"
    with pytest.raises(ValueError, match=says):
        command("generate", f"checkpoint={straight}", f"prompt_file={tmp_path}/prompts")
    assert capsys.readouterr().out == ""


def test_without_a_tokenizer_it_says_what_is_missing(tmp_path):
    folder = make_folder(tmp_path / "hf", "llama")
    with pytest.raises(ValueError, match="no tokenizer beside"):
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


def test_text_that_the_tokenizer_cleans_comes_as_it_decodes_the_whole():
    class Cleaning:
        clean_up_tokenization_spaces = True

        def decode(self, tokens, **keys):
            return " ".join(tokens).replace(" .", ".")

    assert "".join(stream_text(Cleaning(), ["b", ".", "c", "."], before=["a"])) == " b. c."


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
