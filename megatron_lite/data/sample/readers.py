"""Readers of the sample corpus: from an installed package to documents.

Notable features:
- four kinds of text: docstrings (one document each), package descriptions, translated messages (`.po`
  catalogues, runs of messages of one language) and code files (long ones cut at blank lines)
- files are taken in the order of a hash of their path until a source has its bytes, so the pick is spread
  over a package, is the same on every machine with the same versions, and the rest is never read
- packages are found without importing them
"""

from __future__ import annotations

import ast
import contextlib
import functools
import hashlib
import importlib.metadata
import importlib.util
import os
import platform
import re
import sysconfig
import warnings
from collections.abc import Iterator
from email.message import Message
from pathlib import Path
from typing import cast

from megatron_lite.data.sample.sources import SOURCES, Document, Source

# Documents longer than this many characters are cut at blank lines: one huge file would make the held-out
# share lumpy.
_LONGEST = 8_000
_SHORTEST = 200
# Folders that hold tests, generated or foreign files, or that differ between installations of one version.
_SKIPPED_FOLDERS = re.compile(
    r"__pycache__|_vendor|bin|config-.*|demo|distutils|dist-packages|encodings|ensurepip|idlelib|lib-dynload"
    r"|lib2to3|pydoc_data|site-packages|test|testing|tests|third_party|tkinter|turtledemo|vendor"
)
_SKIPPED_FILES = re.compile(r"^(_sysconfigdata|sitecustomize|usercustomize|_?version|__config__|test_)")
# Descriptions of the core dependencies and of what they bring along; one that is absent is left out.
_DESCRIBED = """
    Django Jinja2 MarkupSafe PyYAML Pygments aiohttp annotated-types anyio attrs certifi
    charset-normalizer click contourpy cycler datasets dill filelock fonttools frozenlist fsspec gitpython
    h11 httpcore httpx huggingface-hub hydra-core idna kiwisolver markdown-it-py matplotlib mpmath
    multidict multiprocess networkx numpy omegaconf packaging pandas pillow platformdirs propcache
    protobuf pyarrow pydantic pydantic_core pyparsing python-dateutil regex requests rich safetensors
    sentry-sdk sympy tokenizers torch tqdm transformers typer typing_extensions tzdata urllib3 wandb
    xxhash yarl
"""
_PROGRAMMING_LANGUAGES = {
    ".py": "python",
    ".h": "cpp",
    ".cuh": "cuda",
    ".pyx": "cython",
    ".pxd": "cython",
    ".pxi": "cython",
    ".html": "html",
    ".css": "css",
    ".js": "javascript",
}


def versions() -> dict[str, str]:
    """Version of every package that gives text; the corpus is a pure function of them.

    Raises ValueError naming a missing package and how to install it.
    """
    found = {"python": platform.python_version()}
    for package in sorted({source.package for source in SOURCES} - {""}):
        _root(package)
        found[package] = importlib.metadata.version(package)
    for name in _DESCRIBED.split():
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name.lower()] = importlib.metadata.version(name)
    return found


def read_source(source: Source, limit: int) -> Iterator[Document]:
    """Documents of one source until `limit` bytes, in an order that only the packages' versions decide."""
    total = 0
    for document in _READERS[source.kind](source):
        text = document.text
        if len(text) < _SHORTEST or "\0" in text:
            continue
        yield document
        total += len(text.encode())
        if total >= limit:
            return


def _root(package: str) -> Path:
    """Folder of an installed package ("" is the standard library), found without importing it."""
    if not package:
        return Path(sysconfig.get_paths()["stdlib"])
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise ValueError(
            f"the sample corpus takes text from the package {package!r}, which is not installed; "
            f"run `pip install {package}`, or choose other data with data=..."
        )
    return Path(next(iter(spec.submodule_search_locations)))


def _files(source: Source) -> Iterator[tuple[str, str]]:
    """(relative path, text) of the source's files by the hash of the path; undecodable ones are left out."""
    root = _root(source.package).as_posix()
    paths: list[str] = []
    seen: set[tuple[int, int]] = set()  # a file that is there twice through links counts once
    for folder, folders, names in os.walk(root):
        inside = f"{Path(folder).as_posix()}/".removeprefix(f"{root}/")  # strings: thousands of Paths take seconds
        folders[:] = [
            f for f in folders if not _SKIPPED_FOLDERS.fullmatch(f) and not _within(inside + f, source.without)
        ]
        folders.sort()
        for name in sorted(names):
            path = inside + name
            if not name.endswith(source.suffixes) or _SKIPPED_FILES.match(name) or not _within(path, source.areas):
                continue
            file = os.stat(f"{root}/{path}")
            if not _within(path, source.without) and (file.st_dev, file.st_ino) not in seen:
                seen.add((file.st_dev, file.st_ino))
                paths.append(path)
    for path in sorted(paths, key=_hash):
        try:
            yield path, Path(root, path).read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue


def _within(path: str, areas: tuple[str, ...]) -> bool:
    return any(not area or path in (area, area + ".py") or path.startswith(area + "/") for area in areas)


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def pieces(text: str) -> Iterator[str]:
    """The text cut at blank lines into parts of about `_LONGEST` characters; short texts stay whole."""
    if len(text) <= _LONGEST:
        yield text
        return
    part: list[str] = []
    size = 0
    for block in re.split(r"(?<=\n)(?=\n)", text):
        if part and size + len(block) > _LONGEST:
            yield "".join(part).lstrip("\n")
            part, size = [], 0
        part.append(block)
        size += len(block)
    yield "".join(part).lstrip("\n")


def _topics(source: Source) -> Iterator[Document]:
    try:
        topics = importlib.import_module("pydoc_data.topics").topics
    except ImportError as error:
        raise ValueError(
            "the sample corpus needs Python's own help texts (module pydoc_data.topics), which this Python "
            "was installed without; use a full Python (Debian: apt install libpython3-stdlib)"
        ) from error
    for key in sorted(topics):
        for text in pieces(topics[key].strip("\n")):
            yield Document(text, f"python:pydoc_data/topics.py#{key}", "en", source.license)


def _docstrings(source: Source) -> Iterator[Document]:
    for path, text in _files(source):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # SyntaxWarnings about other people's escapes
            try:
                tree = ast.parse(text) if '"""' in text else ast.Module([], [])
            except (SyntaxError, ValueError, RecursionError):
                continue
        for node in _documented(tree):
            origin = f"{source.package or 'python'}:{path}#{getattr(node, 'name', '')}"
            for part in pieces(ast.get_docstring(node) or ""):
                yield Document(part, origin, "en", source.license)


_Documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def _documented(node: _Documented) -> Iterator[_Documented]:
    """The node, its classes and functions and theirs. Quicker than `ast.walk`, which visits expressions."""
    yield node
    for child in node.body:
        if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield from _documented(child)


def _descriptions(source: Source) -> Iterator[Document]:
    for name in _DESCRIBED.split():
        try:
            metadata = cast(Message, importlib.metadata.metadata(name))
        except importlib.metadata.PackageNotFoundError:
            continue
        text = metadata.get_payload() or metadata.get("Description") or ""
        for part in pieces(str(text).strip()):
            yield Document(part, f"{name}:METADATA", "en", _license(metadata))


def _license(metadata: Message) -> str:
    """The package's own words: SPDX expression, else classifier, else the first line of `License`."""
    if expression := metadata.get("License-Expression"):
        return str(expression)
    classifiers = [c for c in metadata.get_all("Classifier") or [] if c.startswith("License ::")]
    if classifiers:
        return str(classifiers[0]).rsplit(" :: ", 1)[-1]
    return str(metadata.get("License") or "see package").split("\n")[0][:60]


def _messages_of(source: Source) -> Iterator[Document]:
    """Runs of translated messages of one catalogue, as documents of about 700 characters."""
    root = _root(source.package)
    catalogues = [path for locale in _locales(root) for path in locale.glob("*/LC_MESSAGES/*.po")]
    for path in sorted(catalogues, key=lambda path: _hash(path.relative_to(root).as_posix())):
        language = path.parts[-3]
        if language not in source.areas:
            continue
        origin = f"{source.package}:{path.relative_to(root).as_posix()}"
        run: list[str] = []
        for message in [*_translations(path.read_text(encoding="utf-8")), ""]:
            if run and (not message or sum(map(len, run)) > 700):
                yield Document("\n".join(run), origin, language, source.license)
                run = []
            run.append(message)


@functools.cache
def _locales(root: Path) -> tuple[Path, ...]:
    return tuple(sorted(path for path in root.glob("**/locale") if path.is_dir()))


_ENTRY = re.compile(r'^(msgid|msgid_plural|msgstr(?:\[\d\])?)[ \t]+((?:"(?:[^"\\\n]|\\.)*"\s*)+)', re.MULTILINE)


def _translations(catalogue: str) -> Iterator[str]:
    """Translations of more than a word in a `.po` file; no fuzzy, obsolete or untranslated ones."""
    for entry in re.split(r"\n[ \t]*\n", catalogue):
        if re.search(r"^#,.*\bfuzzy\b", entry, re.MULTILINE):
            continue
        fields = [
            (key, "".join(ast.literal_eval(line.strip()) for line in value.strip().split("\n")))
            for key, value in _ENTRY.findall(entry)
        ]
        originals = {text for key, text in fields if key.startswith("msgid")}
        if "" in originals:
            continue  # the header
        for key, text in fields:
            if key.startswith("msgstr") and len(text) >= 12 and text not in originals:
                yield text.strip()


def _code(source: Source) -> Iterator[Document]:
    for path, text in _files(source):
        for part in pieces(text):
            language = _PROGRAMMING_LANGUAGES[os.path.splitext(path)[1]]
            yield Document(part, f"{source.package or 'python'}:{path}", language, source.license)


_READERS = {
    "topics": _topics,
    "docstrings": _docstrings,
    "descriptions": _descriptions,
    "messages": _messages_of,
    "code": _code,
}
