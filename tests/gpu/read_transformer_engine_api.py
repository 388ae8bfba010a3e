"""What Transformer Engine's Python API accepts, read from its wheel without importing it.

    python -m tests.gpu.read_transformer_engine_api > tests/gpu/transformer_engine_api.json

The wheel `transformer-engine` has all of the Python, but it cannot be imported without the compiled packages, which need a GPU's
toolkit. So it is parsed: for each name in `CLASSES` and `FUNCTIONS` the parameters (name, kind, default), public methods with the
inherited ones, and the attributes that are set; and as data what it asks of hardware and sizes. The tests hold every call of ours
against this file, so that a call with a misspelled keyword fails on a machine without a GPU.
"""

from __future__ import annotations

import ast
import functools
import importlib.metadata
import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

CLASSES = {
    "transformer_engine.pytorch.Linear": "pytorch/module/linear.py",
    "transformer_engine.pytorch.autocast": "pytorch/quantization.py",
    **{
        f"transformer_engine.common.recipe.{name}": "common/recipe/__init__.py"
        for name in (
            "DelayedScaling", "Float8CurrentScaling", "Float8BlockScaling", "MXFP8BlockScaling",
            "NVFP4BlockScaling", "Format", "MMParams", "QParams",
        )
    },
}  # fmt: skip
FUNCTIONS = {
    f"transformer_engine.pytorch.{name}": "pytorch/quantization.py"
    for name in (
        "quantized_model_init", "fp8_autocast", "fp8_model_init", "is_fp8_available", "is_mxfp8_available",
        "is_fp8_block_scaling_available", "is_nvfp4_available",
    )
}  # fmt: skip
HARDWARE = {
    "pytorch/quantization.py": (
        "_compute_fp8_support", "_compute_fp8_block_scaling_support", "_compute_mxfp8_support",
        "_compute_nvfp4_support",
    )
}  # fmt: skip
# function -> the file it is in; where `is_quantizable` is asked is in "asked_in"
SIZES = {
    "assert_dim_for_fp8_exec": "pytorch/utils.py",
    "Float8BlockQuantizer.is_quantizable": "pytorch/tensor/float8_blockwise_tensor.py",
    "MXFP8Quantizer.is_quantizable": "pytorch/tensor/mxfp8_tensor.py",
}
# where a class that another one inherits from is defined
BASES = {"TransformerEngineBaseModule": "pytorch/module/base.py", "Recipe": "common/recipe/__init__.py"}


def package() -> Path:
    """The folder of the installed wheel. Raises ModuleNotFoundError if it is not installed."""
    spec = importlib.util.find_spec("transformer_engine")
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError("the wheel transformer-engine is not installed")
    return Path(spec.submodule_search_locations[0])


def read() -> dict[str, Any]:
    """All of it, as it is written to the file."""
    return {
        "version": importlib.metadata.version("transformer-engine"),
        "classes": {name: _class(name.rpartition(".")[2], file) for name, file in CLASSES.items()},
        "functions": {
            name: {"file": file, "parameters": _parameters(_find(file, name.rpartition(".")[2]))}
            for name, file in FUNCTIONS.items()
        },
        "hardware": {
            name: {"file": file, "rules": _returns(_find(file, name))}
            for file, names in HARDWARE.items()
            for name in names
        },
        "sizes": {name: _size_rule(name, file) for name, file in SIZES.items()},
    }


@functools.cache
def _tree(file: str) -> ast.Module:
    return ast.parse((package() / file).read_text())


def _find(file: str, name: str) -> Any:
    """The top-level definition, or with a dot the method of a class."""
    holder, _, member = name.partition(".")
    for node in _tree(file).body:
        if isinstance(node, (ast.ClassDef, ast.FunctionDef)) and node.name == holder:
            return node if not member else next(m for m in node.body if getattr(m, "name", None) == member)
    raise LookupError(f"{name} is not in {file}")


def _parameters(function: ast.FunctionDef, *, skip: int = 0) -> list[dict[str, Any]]:
    """Name, kind and default (as source) of each parameter; `skip` leaves `self` out."""
    spec = function.args
    positional = [*spec.posonlyargs, *spec.args]
    defaults: list[ast.expr | None] = [None] * (len(positional) - len(spec.defaults)) + list(spec.defaults)
    rows = [(a, "positional or keyword", d) for a, d in zip(positional, defaults)][skip:]
    rows += [(spec.vararg, "*", None)] if spec.vararg else []
    rows += [(a, "keyword only", d) for a, d in zip(spec.kwonlyargs, spec.kw_defaults)]
    rows += [(spec.kwarg, "**", None)] if spec.kwarg else []
    return [{"name": a.arg, "kind": k} | ({} if d is None else {"default": ast.unparse(d)}) for a, k, d in rows]


def _class(name: str, file: str) -> dict[str, Any]:
    """Methods with parameters, properties, attributes; what is inherited comes first and is overridden."""
    node = _find(file, name)
    found: dict[str, Any] = {"file": file, "methods": {}, "properties": [], "attributes": []}
    for base in node.bases:
        if isinstance(base, ast.Name) and base.id in BASES:
            inherited = _class(base.id, BASES[base.id])
            found |= {key: inherited[key] for key in ("methods", "properties", "attributes")}
    fields = [f for f in node.body if isinstance(f, ast.AnnAssign) and isinstance(f.target, ast.Name)]
    constants = [t.id for f in node.body if isinstance(f, ast.Assign) for t in f.targets if isinstance(t, ast.Name)]
    if any("dataclass" in ast.unparse(decorator) for decorator in node.decorator_list):
        found["methods"]["__init__"] = [
            {"name": f.target.id, "kind": "positional or keyword"}
            | ({} if f.value is None else {"default": ast.unparse(f.value)})
            for f in fields
            if isinstance(f.target, ast.Name)
        ]
    attributes = {f.target.id for f in fields if isinstance(f.target, ast.Name)} | set(constants)
    for method in (m for m in node.body if isinstance(m, ast.FunctionDef)):
        decorators = {ast.unparse(decorator) for decorator in method.decorator_list}
        if "property" in decorators:
            found["properties"] = sorted({*found["properties"], method.name})
        elif _is_public(method.name) and not any(decorator.endswith(".setter") for decorator in decorators):
            found["methods"][method.name] = _parameters(method, skip="staticmethod" not in decorators)
        attributes |= _assigned(method)
    found["attributes"] = sorted({*found["attributes"], *filter(_is_public, attributes)})
    return found


def _is_public(name: str) -> bool:
    return name == "__init__" or not name.startswith("_")


def _assigned(method: ast.FunctionDef) -> set[str]:
    """Attributes of self that the method sets, also by TE's own `fast_setattr`."""
    names = set()
    for node in ast.walk(method):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and ast.unparse(node.value) == "self":
            names.add(node.attr)
        if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("self.fast_setattr"):
            names |= {a.value for a in node.args[:1] if isinstance(a, ast.Constant) and isinstance(a.value, str)}
    return names


def _returns(function: ast.FunctionDef) -> list[str]:
    """Each `if` with what it returns, and the last return: the whole of a gate."""
    rules = []
    for node in function.body:
        if isinstance(node, ast.If):
            rules.append(f"if {ast.unparse(node.test)}: {ast.unparse(node.body[0])}")
        elif isinstance(node, ast.Return):
            rules.append(ast.unparse(node))
    return rules


def _size_rule(name: str, file: str) -> dict[str, Any]:
    """Every remainder that the function asks for, and where else in the package it is called."""
    found = [
        ast.unparse(n) for n in ast.walk(_find(file, name)) if isinstance(n, ast.BinOp) and isinstance(n.op, ast.Mod)
    ]
    method = name.rpartition(".")[2]
    asked = [
        str(path.relative_to(package()))
        for path in sorted((package() / "pytorch").rglob("*.py"))
        if f"{method}(" in path.read_text().replace(f"def {method}(", "")
    ]
    return {"file": file, "remainders": [r for r in found if "%" in r and "'" not in r], "asked_in": asked}


def text() -> str:
    """The contents of the file."""
    return json.dumps(read(), indent=1) + "\n"


if __name__ == "__main__":
    sys.stdout.write(text())
