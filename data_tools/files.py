"""Which files a path, folder or glob names.

Notable features:
- a folder is read like the glob `folder/**`: one walk serves both
- hidden files and folders and those that tools leave behind (`.git`, `.cache`, `__pycache__`) are left out at any depth, unless the
  path names them itself
- links are followed; a file that several names lead to is read once, and a link to a folder above itself ends there
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase
from pathlib import Path

from data_tools.forms import known_name

TOOL_NAMES = {
    "__pycache__", "__MACOSX", "node_modules", "CVS", "lost+found", "@eaDir", "$RECYCLE.BIN", "System Volume Information",
    "Thumbs.db", "desktop.ini",
}  # fmt: skip


def find_files(path: Path) -> list[Path]:
    """The files at `path`, sorted; with them links that lead nowhere, and folders that a glob without `**` names at its end."""
    if path.is_file():
        return [path]
    parts = path.parts
    fixed = len(parts) if path.is_dir() else next((i for i, part in enumerate(parts) if set(part) & set("*?[")), -1)
    root = Path(*parts[:fixed])
    if fixed < 0 or not root.is_dir():
        return []
    pattern = parts[fixed:] or ("**",)
    found = dict(_walk(root, pattern, frozenset(), linked=False))
    if "**" in pattern:
        found = {path: linked for path, linked in found.items() if not path.is_dir()}
    if not any(found.values()):
        return sorted(found)
    by_content: dict[str, list[Path]] = {}
    for file in found:
        by_content.setdefault(os.path.realpath(file), []).append(file)
    return sorted(
        min(names, key=lambda file: (not known_name(file), found[file], file)) for names in by_content.values()
    )


def _walk(folder: Path, parts: Sequence[str], above: frozenset[str], *, linked: bool) -> Iterator[tuple[Path, bool]]:
    """(path, whether a link led to it) of what matches `parts` below `folder`; `above`: the real folders that led here."""
    real = os.path.realpath(folder)
    if real in above:
        return
    with os.scandir(folder) as opened:
        entries = sorted(opened, key=lambda entry: entry.name)
    pattern, rest = parts[0], parts[1:]
    deep = pattern == "**"
    if deep and rest:
        yield from _walk(folder, rest, above, linked=linked)
    for entry in entries:
        if not _matches(entry.name, "*" if deep else pattern):
            continue
        path, is_link = folder / entry.name, linked or entry.is_symlink()
        if entry.is_dir():
            if deep or rest:
                yield from _walk(path, parts if deep else rest, above | {real}, linked=is_link)
            else:
                yield path, is_link
        elif not rest and (entry.is_file() or entry.is_symlink()):
            yield path, is_link


def _matches(name: str, pattern: str) -> bool:
    if name.startswith("."):
        return pattern.startswith(".") and fnmatchcase(name, pattern)
    return fnmatchcase(name, pattern) and (name not in TOOL_NAMES or name == pattern)
