"""Where the sample corpus takes its text: files that installed packages ship anyway.

Notable features:
- a fixed table of sources in the three groups of Nemotron-4's blend (english, multilingual, code); the names
  depend on no machine, so a config may list them
- no file serves two sources: a docstring held out for validation in one source must not be seen in the
  training code of another
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Document:
    """One text and where it came from. `language` is a tag ("en", "pt_BR") or a programming language."""

    text: str
    origin: str
    language: str
    license: str


@dataclass(frozen=True)
class Source:
    """One line of the table.

    package: "" is Python's standard library. megabytes: of text, at most. areas: the parts of the package
    that may be read (for `messages`: language tags). without: the parts of them that must not.
    """

    name: str
    group: str
    kind: str
    package: str
    license: str
    megabytes: float
    areas: tuple[str, ...] = ("",)
    without: tuple[str, ...] = ()
    suffixes: tuple[str, ...] = (".py",)


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


def _messages(name: str, languages: str) -> Source:
    return Source(name, "multilingual", "messages", "django", "BSD-3-Clause", 0.5, areas=_words(languages))


_PYTHON_CODE = _words("""
    asyncio collections concurrent dbm email html http importlib json logging multiprocessing re sqlite3
    tomllib unittest urllib wsgiref xml xmlrpc zoneinfo
""")
_TORCH_CODE = _words("_dynamo _functorch _inductor _prims _refs fx jit onnx")
_TORCH_HEADERS = tuple(f"include/{part}" for part in ("ATen", "c10", "torch/csrc"))
_BSD3 = "BSD-3-Clause"

SOURCES: tuple[Source, ...] = (
    Source("python_topics", "english", "topics", "", "PSF-2.0", 0.8),
    Source("python_docs", "english", "docstrings", "", "PSF-2.0", 1.0, without=_PYTHON_CODE),
    Source("package_readmes", "english", "descriptions", "", "", 0.6),
    Source("torch_docs", "english", "docstrings", "torch", _BSD3, 1.2, without=(*_TORCH_CODE, "include")),
    Source("numpy_docs", "english", "docstrings", "numpy", _BSD3, 1.0),
    Source("pandas_docs", "english", "docstrings", "pandas", _BSD3, 1.0),
    Source("sympy_docs", "english", "docstrings", "sympy", _BSD3, 1.0),
    Source("networkx_docs", "english", "docstrings", "networkx", _BSD3, 0.8),
    Source("transformers_docs", "english", "docstrings", "transformers", "Apache-2.0", 0.8),
    Source("matplotlib_docs", "english", "docstrings", "matplotlib", "LicenseRef-Matplotlib", 0.8),
    _messages("romance", "es fr it pt pt_BR ca ro gl"),
    _messages("germanic", "de nl sv da nb is af"),
    _messages("central_european", "pl cs sk sl hr hu fi et lt lv sq"),
    _messages("turkish_malay_vietnamese", "tr az id ms vi"),
    _messages("celtic_basque", "ga gd cy eu"),
    _messages("cyrillic", "ru uk be bg sr mk mn ky"),
    _messages("greek_caucasian", "el hy ka"),
    _messages("arabic_hebrew", "ar fa ckb ug he"),
    _messages("indic", "hi bn mr ne ta te ml kn pa"),
    _messages("east_asian", "zh_Hans zh_Hant ja ko"),
    Source("python_stdlib", "code", "code", "", "PSF-2.0", 1.2, areas=_PYTHON_CODE),
    Source("python_django", "code", "code", "django", _BSD3, 1.2),
    Source("python_torch", "code", "code", "torch", _BSD3, 1.0, areas=_TORCH_CODE),
    Source(
        "cpp_torch",
        "code",
        "code",
        "torch",
        _BSD3,
        1.2,
        areas=_TORCH_HEADERS,
        without=("include/ATen/ops",),
        suffixes=(".h", ".cuh"),
    ),
    Source("cython_arrow", "code", "code", "pyarrow", "Apache-2.0", 0.8, suffixes=(".pyx", ".pxd", ".pxi")),
    Source("web_django", "code", "code", "django", _BSD3, 0.4, suffixes=(".html", ".css", ".js")),
)
