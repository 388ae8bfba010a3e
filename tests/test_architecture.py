"""The rules of ARCHITECTURE.md that import-linter cannot check: who imports which library, what the models know, no hidden circles."""

import ast
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent / "megatron_lite"
FILES = sorted(ROOT.rglob("*.py"))


@cache
def imports(path):
    """Every imported module of a file, with whether it stands under `if TYPE_CHECKING`."""
    tree, found = ast.parse(path.read_text()), []
    guarded = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                found.append((alias.name, id(node) in guarded))
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                found.append((f"{node.module}.{alias.name}", id(node) in guarded))
    return found


def importers(module):
    return [
        str(path.relative_to(ROOT))
        for path in FILES
        if any(name == module or name.startswith(module + ".") for name, _ in imports(path))
    ]


@pytest.mark.parametrize("module", ["transformer_engine", "deepspeed", "fla", "mamba_ssm", "wandb", "tensorboard"])
def test_an_engine_is_imported_in_one_file(module):
    assert len(importers(module)) <= 1


@pytest.mark.parametrize("package", ["models", "data", "optim", "precision", "tracking"])
def test_the_lowest_packages_never_communicate(package):
    assert [name for name in importers("torch.distributed") if name.startswith(package + "/")] == []


def test_the_environment_is_read_in_one_file():
    readers = [
        str(path.relative_to(ROOT))
        for path in FILES
        if any(
            isinstance(node, ast.Attribute) and node.attr in ("environ", "getenv")
            for node in ast.walk(ast.parse(path.read_text()))
        )
    ]
    assert readers == ["runtime.py"]


def test_nothing_of_ours_hides_under_type_checking():
    hidden = [
        (str(path.relative_to(ROOT)), name)
        for path in FILES
        for name, guarded in imports(path)
        if guarded and name.startswith("megatron_lite")
    ]
    assert hidden == []


def test_no_pickle_is_ever_loaded():
    assert importers("pickle") == []
    for path in FILES:
        assert "torch.load(" not in path.read_text(), path


def test_lines_end_with_a_line_feed_only():
    """`str.splitlines` also cuts at form feeds, NEL and U+2028, which are part of people's text."""
    files = [*FILES, *(ROOT.parent / "data_tools").rglob("*.py")]
    assert [path for path in files if ".splitlines(" in path.read_text()] == []
