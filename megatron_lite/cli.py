"""`mlite <command> [overrides]`, the one entry; `python -m megatron_lite <command>` is the same."""

from __future__ import annotations

import gc
import importlib
import os
import sys
from contextlib import redirect_stdout
from io import StringIO
from types import ModuleType

from megatron_lite.kept_help import keep_help, kept_help

# command -> (its module, what it does); modules are imported by name, so that no command waits for another's libraries
COMMANDS = {
    "train": ("megatron_lite.commands.train", "pretrain a model, or continue a run"),
    "evaluate": ("megatron_lite.commands.evaluate", "loss and perplexity by source on held-out data"),
    "generate": ("megatron_lite.commands.generate", "continue a prompt"),
    "convert": ("megatron_lite.commands.convert", "to and from Hugging Face folders"),
    "prune": ("megatron_lite.commands.prune", "cut a smaller model out of a trained one"),
    "preflight": ("megatron_lite.commands.preflight", "check the nodes of a run before it starts"),
    "plan": ("megatron_lite.commands.plan", "how large a model is, and what it costs to train"),
    "launch": ("megatron_lite.commands.launch", "start a run here, on Slurm, on a list of hosts or on Kubernetes"),
    "prepare": ("data_tools.prepare", "from raw text to a tokenized corpus"),
    "inspect": ("data_tools.inspect", "what a run will read: shares, epochs, decoded samples"),
}
EXTRAS = {"prepare": "data"}  # command -> the extra of the package that it needs


def main() -> None:
    """Run the command that the first word names with the rest of the command line."""
    asked = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if asked in COMMANDS:
        del sys.argv[1]
        # launch imports no torch, and looks at its other words
        if asked != "launch" and {"-h", "--help"} & set(sys.argv[1:]):
            _show(kept_help(asked) or _composed_help(asked))
        else:
            _run(asked)
        return
    if asked == "--version":
        print(f"megatron_lite {_version()}")
        return
    known = "\n".join(f"  mlite {name:10} {purpose}" for name, (_, purpose) in COMMANDS.items())
    usage = f"usage:\n{known}\n\n`mlite <command> --help` lists groups and keys, `mlite --version` prints the version."
    if asked in ("-h", "--help"):
        print(usage)
        return
    print(f"error: there is no command {asked!r}\n{usage}", file=sys.stderr)
    sys.exit(2)


def _composed_help(command: str) -> str:
    printed = StringIO()
    with redirect_stdout(printed):
        _run(command)
    keep_help(command, printed.getvalue())
    return printed.getvalue()


def _show(text: str) -> None:
    try:
        print(text, end="", flush=True)
    except BrokenPipeError:  # `--help | head` has read what it wanted; Python would flush once more at its end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _run(command: str) -> None:
    try:
        _imported(COMMANDS[command][0]).main()
    except ModuleNotFoundError as error:
        package = (error.name or "").split(".")[0]
        if command not in EXTRAS or package in ("", "megatron_lite", "data_tools"):
            raise
        print(
            f"error: mlite {command} needs {package}, which is not installed: pip install 'megatron-lite[{EXTRAS[command]}]'",
            file=sys.stderr,
        )
        sys.exit(2)


def _imported(name: str) -> ModuleType:
    """The module. What imports make stays: Python's collector does not search it for garbage, neither meanwhile, which takes a fifth
    of a start, nor later between steps."""
    gc.disable()
    try:
        return importlib.import_module(name)
    finally:
        gc.freeze()
        gc.enable()


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version  # late: no command needs it

    try:
        return version("megatron-lite")
    except PackageNotFoundError:  # run from a source tree that was never installed
        return "(not installed)"
