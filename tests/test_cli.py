"""`mlite <command>` as a process: what its imports leave to Python's garbage collector."""

from __future__ import annotations

import gc
import sys

import pytest

from megatron_lite import cli

COMMAND = """
import gc
found = [gc.isenabled()]
def main():
    found.append(gc.isenabled())
"""


@pytest.mark.parametrize("fails", [False, True])
def test_imports_are_not_searched_for_garbage_and_the_work_is(tmp_path, monkeypatch, fails):
    (tmp_path / "own_command.py").write_text(COMMAND + fails * "import no_such_package")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setitem(cli.COMMANDS, "own", ("own_command", "looks at the collector"))
    monkeypatch.setattr(sys, "argv", ["mlite", "own"])
    gc.unfreeze()
    try:
        if fails:
            with pytest.raises(ModuleNotFoundError):
                cli.main()
        else:
            cli.main()
            assert sys.modules["own_command"].found == [False, True]
        assert gc.isenabled()
        assert gc.get_freeze_count() > 10_000
    finally:
        sys.modules.pop("own_command", None)
        gc.freeze()
