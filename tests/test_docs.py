"""The pages say what is there: links and paths exist, prose is at most 120 wide."""

from __future__ import annotations

import io
import re
import tokenize
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
WIDTH = 120
PAGES = [
    path
    for path in ROOT.rglob("*.md")
    if not {".venv", "runs", "data", "node_modules"} & set(path.relative_to(ROOT).parts)
]


def prose(page: Path) -> list[tuple[int, str]]:
    """(number, line) outside code blocks and tables."""
    found, code = [], False
    for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), 1):
        if line.lstrip().startswith("```"):
            code = not code
        elif not code and not line.startswith(("|", "    ")):
            found.append((number, line))
    return found


def anchors(page: Path) -> set[str]:
    """What GitHub calls the headings of a page."""
    titles = [line.lstrip("#").strip().lower() for _, line in prose(page) if line.startswith("#")]
    return {re.sub(r"[^\w\- ]", "", title).replace(" ", "-") for title in titles}


def tree(text: str) -> list[str]:
    """The paths that ARCHITECTURE.md's tree names: an entry's folder is the one that the indentation puts it under."""
    block = text.split("## Packages and modules", 1)[1].split("```", 2)[1]
    paths, folders = [], [""]
    for line in block.splitlines():
        words = re.match(r"\s*\S+", line)
        if words is None:
            continue
        depth = (len(line) - len(line.lstrip())) // 2
        names = re.findall(r"(?<![\w./])[\w.]+(?:/|\.(?:py|md|sh|sbatch|yaml))(?![\w/])", line)
        if line.lstrip().split()[0].endswith("/"):
            folder = folders[depth] + names.pop(0)
            folders[depth + 1 :] = [folder]
            paths.append(folder)
        here = folders[-1] if line.lstrip().split()[0].endswith("/") else folders[min(depth, len(folders) - 1)]
        paths += [here + name for name in names]
    return paths


def code_lines(path: Path) -> int:
    """Lines that hold code: no comments, docstrings or empty lines."""
    text = path.read_text(encoding="utf-8")
    nothing = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
    lines: set[int] = set()
    before = tokenize.NEWLINE
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        docstring = token.type == tokenize.STRING and before in nothing
        if token.type not in nothing and not docstring:
            lines.update(range(token.start[0], token.end[0] + 1))
        before = token.type
    return len(lines)


def test_the_readme_counts_the_code():
    said = re.search(
        r"The models are ([\d,]+) lines.*?whole framework ([\d,]+)", (ROOT / "README.md").read_text(), re.DOTALL
    )
    assert said is not None
    models, framework = (int(number.replace(",", "")) for number in said.groups())
    package = ROOT / "megatron_lite"
    assert models == pytest.approx(sum(map(code_lines, (package / "models").glob("*.py"))), rel=0.05)
    assert framework == pytest.approx(sum(map(code_lines, package.rglob("*.py"))), rel=0.05)


def test_the_tree_of_architecture_is_there():
    paths = tree((ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8"))
    assert len(paths) > 100
    assert [path for path in paths if not (ROOT / path).exists()] == []


def test_every_module_is_in_the_tree():
    named = set(tree((ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")))
    files = [
        path.relative_to(ROOT).as_posix()
        for name in ("megatron_lite", "data_tools")
        for path in (ROOT / name).rglob("*.py")
    ]
    assert sorted(path for path in files if not path.endswith("__init__.py") and path not in named) == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_and_widths_of_a_page(page: Path):
    assert [number for number, line in prose(page) if len(line) > WIDTH and line[0] != "#"] == []
    for target in re.findall(
        r"\]\(([^)\s]+)\)", "\n".join(line for line in page.read_text(encoding="utf-8").splitlines())
    ):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        linked = (page.parent / path).resolve() if path else page
        assert linked.exists(), target
        assert not anchor or anchor in anchors(linked), target


def test_the_commands_of_the_pages_exist():
    """A line `mlite <command>` in a code block."""
    from megatron_lite.cli import COMMANDS

    used = {
        word for page in PAGES for word in re.findall(r"^mlite (\w+)", page.read_text(encoding="utf-8"), re.MULTILINE)
    }
    assert used <= set(COMMANDS)
