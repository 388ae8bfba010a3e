"""What is wrong with a command line, for the user who typed it: the override, the reason, the way out.

Notable features:
- Hydra's and OmegaConf's messages are cut down to their reason; the override that caused them is named as it was typed.
- An unknown key or choice comes with the near ones, or all of them where they are few.
- `check_values` finds what the typed tree lets through: a key that `+` added, and numbers that are not finite.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException, MissingConfigException
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, MissingMandatoryValue
from yaml import MarkedYAMLError

from megatron_lite.config.renamed import renamed_key

_SCHEMA = "_schema"  # how the names of the schemas end, which are not choices


KnownKeys = Callable[[], Mapping[str, bool]]
"""Every dotted key that exists -> whether it is a mapping to which `+key.name=value` adds a name."""


class ConfigError(ValueError):
    """An invalid configuration: the message names the key, the value and the way out."""


def explain(
    error: BaseException,
    overrides: list[str],
    known_keys: KnownKeys,
    *,
    own_folder: Path | None = None,
) -> str:
    """One line about Hydra's, OmegaConf's or YAML's `error`. known_keys: asked for when needed.

    own_folder: that of `--config-dir`.
    """
    chain = list(_chain(error))
    for part in chain:
        if isinstance(part, MissingConfigException) and part.options:
            return _unknown_choice(part, own_folder)
    if isinstance(error, MarkedYAMLError):
        where = error.problem_mark or error.context_mark
        return f"{where.name}, line {where.line + 1}: not YAML: {error.problem or error.context}"
    unreadable = _unreadable(overrides)
    if unreadable:
        return unreadable
    text, reason = str(error), str(chain[-1]).split("\n")[0]
    renamed = _renamed(text, overrides)
    if renamed:
        return renamed
    in_file = _in_file(text, overrides, known_keys)
    if in_file:
        return in_file
    if isinstance(chain[-1], MissingMandatoryValue):
        stated = re.search(r"full_key: (\S+)", str(chain[-1]))
        key = stated[1] if stated else reason.rsplit(": ", 1)[-1]
        return f"{key} is not given, and it has no default: add {key}=..."
    override = _culprit(text, overrides)
    if override is None and "Config group override" in text:  # it does not say which
        parser = OverridesParser.create()
        override = next(
            o for o in overrides if "." not in key_of(o) and not isinstance(parser.parse_override(o).value(), str)
        )
        reason = "a group's choice is a name"
    if override is None:
        return " ".join(line.strip() for line in text.split("\n") if "object_type" not in line)
    key = key_of(override)
    if isinstance(chain[-1], ConfigAttributeError | ConfigKeyError) or "does not exist" in text:
        known = known_keys()
        if key not in known:
            return f"{override}: {_new_entry(override, known) or unknown_key(key, known)}"
    return f"{override}: {reason}; `mlite <command> --help` shows {key} as it is without overrides"


def unknown_key(key: str, known_keys: Iterable[str]) -> str:
    """That `key` does not exist, with keys of similar spelling, or of the same last name elsewhere."""
    renamed = renamed_key(key)
    if renamed:
        return renamed
    known = list(known_keys)
    section, _, last = key.rpartition(".")
    near = (
        difflib.get_close_matches(key, known, n=3, cutoff=0.85)
        or [other for other in known if other.rsplit(".", 1)[-1] == last]
        or difflib.get_close_matches(key, [other for other in known if not key.startswith(f"{other}.")], n=3)
        or [other for other in known if section and other.rpartition(".")[0] == section]
    )
    hint = f"did you mean {' or '.join(near[:3])}?" if near else "--help lists all keys"
    return f"there is no key {key}; {hint}"


def _new_entry(override: str, known: Mapping[str, bool]) -> str | None:
    """How a name is added to a mapping that has no such name yet; None where the key is not of one, or the override has a sign."""
    key = key_of(override)
    mapping = key
    while mapping not in known and mapping:
        mapping = mapping.rpartition(".")[0]
    if not known.get(mapping) or not override.startswith(key):
        return None
    name = key.removeprefix(f"{mapping}.").partition(".")[0]
    there = ", ".join(other.rpartition(".")[2] for other in known if other.rpartition(".")[0] == mapping)
    return f"{mapping} has no {name}{f', only {there}' if there else ''}; a new name is added with a +: +{override}"


def key_of(override: str) -> str:
    """The key of `key=value`, without the signs that add or delete it."""
    return override.lstrip("+~").split("=")[0]


def check_values(config: Any, *, key: str = "") -> str | None:
    """What the types do not forbid: a key that the class of a section lacks (`+optim.x=1`), nan and infinity. None when all is well."""
    if isinstance(config, float) and not math.isfinite(config):
        return f"{key}={config} is not a finite number; give one, or drop the override"
    if is_dataclass(config):
        known = [item.name for item in fields(config)]
        extra = next((name for name in vars(config) if name not in known), None)
        if extra is not None:
            place = f"{key}." if key else ""
            return unknown_key(f"{place}{extra}", [f"{place}{name}" for name in known])
    return next((found for name, value in _items(config, key) if (found := check_values(value, key=name))), None)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the machine or an accelerator ran out of memory; on a CPU torch says so by a plain RuntimeError."""
    return isinstance(error, MemoryError) or "out of memory" in str(error) or "can't allocate memory" in str(error)


def out_of_memory(error: BaseException) -> str:
    """What to do about it, on one line."""
    reason = " ".join(str(error).split()) or "the machine has no more"
    return (
        f"not enough memory: {reason[:300]}; lower train.micro_batch_size or data.seq_len, set parallel.recompute=full, make the "
        "model smaller, or shard it over more processes (parallel.tp, engine.shard=full)"
    )


def _items(config: Any, key: str) -> Iterator[tuple[str, Any]]:
    if isinstance(config, list):
        yield from ((f"{key}[{index}]", value) for index, value in enumerate(config))
        return
    inside = vars(config) if is_dataclass(config) else config if isinstance(config, dict) else {}
    for name, value in inside.items():
        yield f"{key}.{name}".lstrip("."), value


def _chain(error: BaseException) -> Iterator[BaseException]:
    part: BaseException | None = error
    while part is not None:
        yield part
        part = part.__cause__


def _unknown_choice(error: MissingConfigException, own_folder: Path | None) -> str:
    group, _, choice = (error.missing_cfg_file or "").rpartition("/")
    choices = [option for option in error.options or [] if not option.endswith(_SCHEMA)]
    return f"{group}={choice} is unknown; choose one of {', '.join(choices)}{_in_own_folder(own_folder, group, choice)}"


def _in_own_folder(folder: Path | None, group: str, choice: str) -> str:
    """What is wrong with the folder of `--config-dir`, if something is: choices are in a folder with the name of their group."""
    if folder is None or (folder / group).is_dir():
        return ""
    if not (folder / f"{choice}.yaml").is_file():
        return f"; --config-dir {folder} has no folder {group} to add choices to"
    way_out = f"give --config-dir {folder.parent}" if folder.name == group else f"move it to {folder / group}"
    return f"; {folder / choice}.yaml is not in a folder of its group's name: {way_out}"


def _renamed(text: str, overrides: list[str]) -> str | None:
    """The new name of an old key, typed or in a YAML file, which Hydra's message then names."""
    file = re.match(r"In '([^']*)'", text)
    stored = re.search(r"full_key: (\S+)", text)
    keys = [key_of(override) for override in overrides] + ([stored[1]] if stored else [])
    for key in keys:
        answer = renamed_key(key)
        if answer:
            return f"{file[1]}.yaml: {answer}" if file else answer
    return None


def _in_file(text: str, overrides: list[str], known_keys: KnownKeys) -> str | None:
    """What is wrong in a YAML file that Hydra's message names: a name in its defaults, a key, or a value."""
    missing = re.match(r"In '([^']*)': Could not load '([^']*)'", text)
    if missing:
        group, _, choice = missing[2].rpartition("/")
        typed = next((override for override in overrides if key_of(override) == group and choice in override), None)
        if typed:  # one of a list of choices
            return f"{typed}: {choice} is unknown; `mlite <command> --help` lists the choices of {group}"
        return f"{missing[1]}.yaml: its defaults name {missing[2]}, and there is no {missing[2]}.yaml"
    found = re.match(r"In '([^']*)': \w+ raised while composing config:\n(.*)\n\s*full_key: (\S+)", text)
    if found is None:
        return None
    file, reason, key = f"{found[1]}.yaml", found[2], found[3]
    if " not in " not in reason:
        return f"{file}: {key}: {reason}"
    if key == found[1].partition("/")[0]:  # Hydra puts a file's keys below its folder's name unless told otherwise
        return f"{file}: its keys are taken for keys of {key}; begin the file with the line # @package _global_"
    choice = next((override for override in overrides if key_of(override) == key.partition(".")[0]), None)
    if choice is None:
        return f"{file}: {unknown_key(key, known_keys())}"
    return f"{file} sets {key}, which {choice} does not have; drop {choice}, or use a copy of {file} without {key}"


def _unreadable(overrides: list[str]) -> str | None:
    parser = OverridesParser.create()
    for override in overrides:
        if not key_of(override):
            return f"{override} has no key; overrides are written key=value"
        try:
            parser.parse_override(override)
        except HydraException as error:
            reason = str(error).split("\n")[0]
            return f"{override} cannot be read as key=value ({reason}); quote what has spaces or signs in it: key='\"...\"'"
    return None


def _culprit(text: str, overrides: list[str]) -> str | None:
    """The override that the message is about: it is quoted there as it was typed, or by its key."""
    named = [override for override in overrides if override in text]
    if not named:
        named = [o for o in overrides if f"'{key_of(o)}'" in text or f"'{key_of(o).rsplit('.', 1)[-1]}'" in text]
    return max(named, key=len) if named else None
