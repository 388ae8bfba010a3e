"""How the bad-input tour calls the product: a command's own `main` with a command line, and what must be true of a refusal."""

from __future__ import annotations

import hashlib
import re
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from megatron_lite import cli


@dataclass(frozen=True)
class Ended:
    """What a person sees of a call."""

    code: int
    out: str
    err: str


def snapshot(*folders: Path) -> dict[str, str]:
    """Every path below `folders` and the hash of its bytes; lock files, which hold nothing, are left out."""
    return {
        str(path): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "no file"
        for folder in folders
        for path in [folder, *sorted(folder.rglob("*"))]
        if path.exists() and path.name != "run.lock"
    }


@dataclass
class Tour:
    """Calls commands in this process, in an empty directory of the test's own."""

    home: Path
    data: Path
    monkeypatch: pytest.MonkeyPatch
    capsys: pytest.CaptureFixture[str]

    def call(self, command: str, *arguments: str) -> Ended:
        """`mlite <command> <arguments>`. Any other exception than SystemExit would be a traceback: it is raised."""
        self.monkeypatch.setattr(sys, "argv", ["mlite", command, *arguments])
        self.capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            cli.main()
        said = self.capsys.readouterr()
        return Ended(ended.value.code, said.out, said.err)  # type: ignore[arg-type]

    def refused(self, command: str, *arguments: str, says: str) -> Ended:
        """The call ends with code 2 and one line that matches `says`, and everything on the disk is as it was."""
        before = snapshot(self.home, self.data)
        ended = self.call(command, *arguments)
        assert ended.code == 2, ended
        assert re.fullmatch(r"error: [^\n]*\n", ended.err), ended.err
        assert re.search(says, ended.err), ended.err
        assert snapshot(self.home, self.data) == before
        return ended
