"""Keys that have been renamed: old dotted key -> new dotted key, for old checkpoints, old YAML files and old habits.

Pure data and pure functions. A stored config is brought up to date silently (`upgraded`); a user who types an old key gets
an error with the new one (`renamed_key`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

RENAMED: dict[str, str] = {
    "model.num_heads": "model.attention.heads",
    "model.num_kv_heads": "model.attention.kv_heads",
    "model.head_dim": "model.attention.head_dim",
    "model.rope_base": "model.rope.base",
    "model.rotary_fraction": "model.rope.fraction",
    "model.ffn_size": "model.mlp.ffn_size",
    "model.activation": "model.mlp.activation",
    **{f"tracking.{key}": f"tracking.wandb.{key}" for key in ("project", "entity", "name", "mode", "tags")},
}
# The same for recipes of `mlite prepare`; `*` is any name. A section comes after the keys in it that have changed too.
RENAMED_IN_RECIPES: dict[str, str] = {
    "data_recipe.tokenise": "data_recipe.tokenize",
    "data_recipe.normalise.strip_licence_headers": "data_recipe.normalize.strip_license_headers",
    "data_recipe.normalise": "data_recipe.normalize",
    "data_recipe.normalize.strip_licence_headers": "data_recipe.normalize.strip_license_headers",
    "data_recipe.filter.prose.max_licence_share": "data_recipe.filter.prose.max_license_share",
    "data_recipe.sources.*.licence": "data_recipe.sources.*.license",
    "data_recipe.sources.*.columns.licence": "data_recipe.sources.*.columns.license",
}
# Old dotted key -> what to do instead.
DROPPED: dict[str, str] = {
    "engine.kind": "choose the engine by its group: engine=fsdp or engine=deepspeed",
    "objective.kind": "choose the objective by its group: objective=next_token",
    "objective.options": "an objective's settings are keys of its own: objective.<setting>",
    "tracking.kind": "tracking=console, wandb or tensorboard, or several: 'tracking=[wandb,tensorboard]'",
    "model.unit": "model.num_layers counts blocks of '*-', and model.pattern spells the layers of any other model",
}


def upgraded(tree: Mapping[str, Any]) -> dict[str, Any]:
    """A whole config as an older version stored it, under the current keys; `tree` itself is not changed."""
    new = _copied(tree)
    for old, name in RENAMED.items():
        section, key = _section(new, old)
        if section is not None and key in section:
            value = section.pop(key)
            *path, last = name.split(".")
            target = new
            for part in path:
                target = target.setdefault(part, {})
            target[last] = value
    model = new.get("model")
    unit = model.pop("unit", None) if isinstance(model, dict) else None
    if unit not in (None, "*-") and model.get("pattern") is None:
        model |= {"pattern": unit * model["num_layers"], "num_layers": None}
    return new


def renamed_key(key: str) -> str | None:
    """What became of a dotted key, in a sentence; None for a key that was never renamed."""
    for old, new in (RENAMED | RENAMED_IN_RECIPES).items():
        found = re.match(re.escape(old).replace(r"\*", r"([^.]+)") + r"(?=\.|$)", key)
        if found:
            return f"{key} is now {new.replace('*', ''.join(found.groups()))}{key[found.end() :]}"
    return f"{key} is gone: {DROPPED[key]}" if key in DROPPED else None


def _copied(tree: Any) -> Any:
    return {key: _copied(value) for key, value in tree.items()} if isinstance(tree, Mapping) else tree


def _section(tree: dict[str, Any], dotted: str) -> tuple[dict[str, Any] | None, str]:
    """The innermost dict that would hold the dotted key, None where it is missing, and the key's last part."""
    *path, last = dotted.split(".")
    for part in path:
        inner = tree.get(part)
        if not isinstance(inner, dict):
            return None, last
        tree = inner
    return tree, last
