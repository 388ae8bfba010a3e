"""Takes an existing tokenizer, in Hugging Face form: from a folder, a `tokenizer.json`, or a SentencePiece `.model`."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from megatron_lite.data.indexed import best_dtype
from megatron_lite.data.tokenizer import encode_documents, vocabulary_size

_PROBES = (
    "Hello, world 2024!",
    "  two spaces\tand a tab\n",
    "naïve café, Привет мир, 你好, नमस्ते",
    "def f(x):\n    return x ** 2\n",
)


def require_tokenizer(path: Path) -> None:
    """Raises ValueError if nothing is at the path."""
    if not path.exists():
        raise ValueError(
            f"data_recipe.tokenizer.path={path} does not exist; name a folder with tokenizer.json, that file, or a "
            "SentencePiece .model (a hub name is not looked up: download it first)"
        )


def take_tokenizer(path: Path, folder: Path) -> None:
    """Copy or convert the tokenizer at `path` into `folder`.

    Raises:
        ValueError: there is no usable tokenizer, or the converted tokenizer does not give the ids of the original.
    """
    require_tokenizer(path)
    if path.is_dir():
        for file in sorted(path.iterdir()):
            if file.is_file() and file.suffix in (".json", ".model", ".txt", ".jinja"):
                shutil.copyfile(file, folder / file.name)
    elif path.suffix == ".model":
        _convert_sentencepiece(path, folder)
    else:
        shutil.copyfile(path, folder / "tokenizer.json")
        neighbor = path.with_name("tokenizer_config.json")
        if neighbor.is_file():
            shutil.copyfile(neighbor, folder / neighbor.name)
    if not (folder / "tokenizer.json").is_file():
        from megatron_lite.data.tokenizer import load_tokenizer

        load_tokenizer(folder).save_pretrained(str(folder))
    if not (folder / "tokenizer.json").is_file():
        raise ValueError(
            f"data_recipe.tokenizer.path={path} has no fast form (tokenizer.json), which encoding in parallel needs"
        )


def _convert_sentencepiece(path: Path, folder: Path) -> None:
    """BPE or unigram `.model` to `tokenizer.json`, checked against sentencepiece itself on a few texts."""
    import sentencepiece

    processor = sentencepiece.SentencePieceProcessor(model_file=str(path))
    backend = _backend(path)
    backend.save(str(folder / "tokenizer.json"))
    end = processor.id_to_piece(processor.eos_id()) if processor.eos_id() >= 0 else None
    if end is None:
        raise ValueError(
            f"data_recipe.tokenizer.path={path} has no end-of-sentence piece, which is needed to end every document"
        )
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": end, "clean_up_tokenization_spaces": False}
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    for text in _PROBES:
        theirs, ours = processor.encode(text), backend.encode(text, add_special_tokens=False).ids
        if theirs != ours:
            raise ValueError(
                f"data_recipe.tokenizer.path={path}: converted to Hugging Face form it encodes {text!r} as {ours}, sentencepiece "
                f"gives {theirs}; its normalization has no equivalent there; train a tokenizer, or use one with a tokenizer.json"
            )


def _backend(path: Path) -> Any:
    from sentencepiece import sentencepiece_model_pb2
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers

    schema: Any = sentencepiece_model_pb2  # generated: its classes are made at import
    proto = schema.ModelProto()
    proto.ParseFromString(path.read_bytes())
    pieces = [(piece.piece, piece.score) for piece in proto.pieces]
    kinds = [piece.type for piece in proto.pieces]
    fallback = proto.trainer_spec.byte_fallback
    unknown = proto.trainer_spec.unk_id
    model: Any
    if proto.trainer_spec.model_type == schema.TrainerSpec.UNIGRAM:
        model = models.Unigram(pieces, unk_id=unknown, byte_fallback=fallback)
    else:
        vocabulary = {piece: index for index, (piece, _) in enumerate(pieces)}
        model = models.BPE(
            vocabulary, _merges(pieces, vocabulary), unk_token=pieces[unknown][0], fuse_unk=True, byte_fallback=fallback
        )
    tokenizer = Tokenizer(model)
    steps: list[Any] = []
    if proto.normalizer_spec.precompiled_charsmap:
        steps.append(normalizers.Precompiled(proto.normalizer_spec.precompiled_charsmap))
    if proto.normalizer_spec.remove_extra_whitespaces:
        steps += [normalizers.Strip(), normalizers.Replace(_spaces(), " ")]
    if proto.normalizer_spec.add_dummy_prefix:
        steps.append(normalizers.Prepend("▁"))
    steps.append(normalizers.Replace(" ", "▁"))
    tokenizer.normalizer = normalizers.Sequence(steps)
    if proto.trainer_spec.model_type == schema.TrainerSpec.UNIGRAM:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="never")
    tail = [decoders.Strip(" ", 1, 0)] if proto.normalizer_spec.add_dummy_prefix else []
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *tail])
    special = (schema.ModelProto.SentencePiece.CONTROL, schema.ModelProto.SentencePiece.UNKNOWN)
    tokenizer.add_special_tokens(
        [AddedToken(p, special=True, normalized=False) for (p, _), k in zip(pieces, kinds) if k in special]
    )
    return tokenizer


def _spaces() -> Any:
    from tokenizers import Regex

    return Regex(" {2,}")


def _merges(pieces: list[tuple[str, float]], vocabulary: dict[str, int]) -> list[tuple[str, str]]:
    """A SentencePiece BPE model holds scores, not merges: every split of a piece into two pieces, best score first."""
    found = []
    for index, (piece, score) in enumerate(pieces):
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in vocabulary and right in vocabulary:
                found.append((-score, index, vocabulary[left], vocabulary[right], (left, right)))
    return [pair for *_, pair in sorted(found)]


class FastTokenizer:
    """The Rust tokenizer of a folder without the seconds and hundreds of megabytes that importing transformers takes."""

    def __init__(self, folder: Path, end: int | None = None) -> None:
        from tokenizers import Tokenizer

        self.backend_tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self.eos_token_id = 0 if end is None else end
        self.dtype = best_dtype(vocabulary_size(self.backend_tokenizer))

    def encode(self, texts: list[str]) -> Iterator[np.ndarray]:
        """Token ids of each text followed by the end token, in the smallest dtype that holds the vocabulary."""
        return encode_documents(self, texts, chunk=len(texts), dtype=self.dtype)  # type: ignore[arg-type]


def tokenizer_identity(folder: Path) -> dict[str, Any]:
    """The identity that a finished tokenizer step has written: fingerprint, name, eod, vocab_size."""
    return json.loads((folder / "identity.json").read_text(encoding="utf-8"))
