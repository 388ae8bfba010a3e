from __future__ import annotations

import pytest

from data_tools.recipe import NormalizeConfig
from data_tools.stages.normalize import dataset_name
from data_tools.text.normalize import Normalizer, line_key, mask_pii, strip_license_header


def prose(text: str, **changes) -> str:
    return Normalizer(NormalizeConfig(**changes)).normalize(text, kind="prose")[0]


def code(text: str) -> str:
    return Normalizer(NormalizeConfig()).normalize(text, kind="code")[0]


def test_mojibake_is_repaired_and_names_are_told() -> None:
    text, repairs = Normalizer(NormalizeConfig()).normalize("schÃ¶n, naÃ¯ve, â€œquotedâ€\x9d\r\n", kind="prose")
    assert text == "schön, naïve, “quoted”"
    assert "mojibake" in repairs
    assert "line_ends" in repairs


@pytest.mark.parametrize("text", ["Ãœber das Ã in der Übersetzung", "Ð и Ñ", "São Paulo, naïve, ÂNGELA", "नमस्ते दुनिया"])
def test_right_text_is_not_broken(text: str) -> None:
    import ftfy

    assert prose(text) in (text, ftfy.fix_encoding(text))


def test_terminal_codes_and_controls_go() -> None:
    assert prose("\x1b[1mbold\x1b[0m and o\x08ov\x08ve\x08erstruck\x00 \ufeffword\u200b") == "bold and overstruck word"


def test_decomposed_letters_are_composed_but_not_in_code() -> None:
    assert prose("cafe\u0301") == "caf\u00e9"
    assert code("s = 'cafe\u0301'  \n") == "s = 'cafe\u0301'  \n"


def test_indentation_and_single_blank_lines_stay() -> None:
    poem = "  Shall I compare thee\n    to a summer's day?\n\n  Thou art more lovely"
    assert prose(poem + "   \n\n\n\n\n\n") == poem
    assert code("def f():\n\n\n\n\n    return 1\n") == "def f():\n\n\n\n\n    return 1\n"


def test_frequent_blocks_go_whole_and_frequent_lines_inside_stay() -> None:
    frequent = {line_key("Prev Up Home Next"), line_key("And the LORD spake, saying,")}
    text = "Prev Up Home Next\n\nAnd the LORD spake, saying,\nthese are the words.\n\n  Prev Up Home Next"
    after, repairs = Normalizer(NormalizeConfig()).normalize(text, kind="prose", frequent=frequent)
    assert after == "And the LORD spake, saying,\nthese are the words."
    assert repairs == ["boilerplate"]


def test_short_frequent_lines_are_a_menu_only_in_a_row() -> None:
    frequent = {line_key(line) for line in ("- Home", "- About", "- Search", "- News", "- Mail", "Syntax", "Example")}
    menu = "\n\n".join(["- Home", "- About\n- Search", "", "- News", "- Mail"])
    body = "How to put\n\nSyntax\n\nput x\n\nExample\n\nput 1"
    after = Normalizer(NormalizeConfig()).normalize(f"{menu}\n\n{body}\n\n- Home", kind="prose", frequent=frequent)[0]
    assert after == f"{body}\n\n- Home"


def test_the_word_mark_of_scripts_without_spaces_stays() -> None:
    assert prose("a\u200bb ការ\u200bប្រើ\u200b\u200bអត្ថបទ") == "ab ការ\u200bប្រើ\u200bអត្ថបទ"


def test_policy_lines_go_and_paragraphs_about_policies_stay() -> None:
    long = "A paragraph that explains what a privacy policy is. " * 10
    assert prose(f"Text.\nPlease enable JavaScript to go on.\n{long.strip()}") == f"Text.\n{long.strip()}"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("/* Copyright 2001 A. License: MIT */\nint x;\n", "int x;\n"),
        ("#!/bin/sh\n# Copyright (c) B\n# All rights reserved\n\necho 1\n", "#!/bin/sh\necho 1\n"),
        ("// SPDX-License-Identifier: MIT\npackage main\n", "package main\n"),
        ("# How to use this module\nx = 1\n", "# How to use this module\nx = 1\n"),
        ("#include <stdio.h>\n/* Copyright */\n", "#include <stdio.h>\n/* Copyright */\n"),
        ("x = 1  # license\n", "x = 1  # license\n"),
        ("(***)\n(* The license *)\n(***)\n\n(* Sets. *)\nlet x = 1\n", "(* Sets. *)\nlet x = 1\n"),
        (
            ";;; a.el --- Lists  -*- lexical-binding: t -*-\n;; Keywords: x\n\n;; Under the\n;; GNU license.\n\n;;; Code:\n(f)\n",
            ";;; a.el --- Lists  -*- lexical-binding: t -*-\n;; Keywords: x\n\n;;; Code:\n(f)\n",
        ),
        ("/* Trees. */\n\n/* Copyright C */\nint x;\n", "/* Trees. */\nint x;\n"),
        ('"""Licensed under X."""\nx = 1\n', '"""Licensed under X."""\nx = 1\n'),
    ],
)
def test_license_headers(text: str, expected: str) -> None:
    assert strip_license_header(text) == expected


def test_pii() -> None:
    text = "Write to jane.doe+x@mail.example.org from 8.8.8.8 or 192.168.0.1, call +49 30 1234567, version 1.2.3.4.5"
    assert mask_pii(text) == "Write to <email> from <ip> or 192.168.0.1, call <phone>, version 1.2.3.4.5"
    assert prose("a@b.org stays") == "a@b.org stays"


def test_names_of_datasets_are_safe_as_file_names() -> None:
    def name(language: str, template: str = "{language}") -> str:
        return dataset_name(template, "wiki", "english", language)

    assert name("zh-Hant") == "zh-Hant"
    assert name("../a b") == "_a_b"
    assert name("") == name("...") == "und"
    long, other = name("x" * 300), name("x" * 299 + "y")
    assert len(f".{long}.validation.json.tmp-4194304") < 255  # what file systems allow
    assert long != other
    assert name("x" * 300) == long
    # recipe.json, report.json ... are other files of a corpus, and x.validation is the held-out part of x
    assert {name(taken) for taken in ("recipe", "report", "corpus", "timing", "x.validation")} == {
        "recipe_", "report_", "corpus_", "timing_", "x.validation_",
    }  # fmt: skip
