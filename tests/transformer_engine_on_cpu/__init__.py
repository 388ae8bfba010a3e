"""Transformer Engine's own Python on a machine without a GPU, from the wheel alone.

    with transformer_engine_on_cpu():
        import transformer_engine.pytorch as te   # te.Linear, te.autocast, ... compute, on CPU tensors

The wheel holds all of TE's Python; only its kernels are compiled. Here that Python is imported as it is, over `kernels`, which
computes in torch what the kernels do. So modules, recipes, autocast, amax histories, weight caches, size and hardware checks and
the refusal to load a pickle are TE's code and not a copy of it: a call that TE refuses is refused here.

What is changed in its source while it is loaded are the five `REPLACEMENTS`, all of them the word "cuda". `is_current_stream_capturing`
and such things come from `CudaOnCpu`. A test chooses the GPU that TE believes in: its compute capability and its CUDA version.
"""

from __future__ import annotations

import functools
import importlib.abc
import importlib.machinery
import importlib.util
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch

REPLACEMENTS = {
    "torch.cuda.": "cuda_on_cpu.",
    "torch.version.cuda": "cuda_on_cpu.version",
    '"cuda"': '"cpu"',
    ".is_cuda": ".is_cpu",
    ".cuda()": "",
}
# what TE imports and nothing here calls
ABSENT = ("onnx", "onnxscript", *(
    f"transformer_engine.pytorch.triton{name}"
    for name in ("", ".pad", ".permutation", ".cross_entropy", ".grouped_dbias_dscales")
))  # fmt: skip


def wheel_folder() -> Path | None:
    """The folder of the installed wheel; None where it is not installed."""
    found = importlib.machinery.PathFinder.find_spec("transformer_engine")
    return Path(found.submodule_search_locations[0]) if found and found.submodule_search_locations else None


needs_wheel = pytest.mark.skipif(wheel_folder() is None, reason="needs the wheel transformer-engine (see [dev])")


class CudaOnCpu:
    """What TE asks `torch.cuda` for."""

    def __init__(self, capability: tuple[int, int], version: str) -> None:
        self.capability, self.version = capability, version

    def is_available(self) -> bool:
        return True

    def current_device(self) -> int:
        return 0

    def get_device_capability(self, *_: Any) -> tuple[int, int]:
        return self.capability

    def get_device_properties(self, *_: Any) -> SimpleNamespace:
        return SimpleNamespace(major=self.capability[0], minor=self.capability[1], multi_processor_count=132)

    def is_current_stream_capturing(self) -> bool:
        return False

    def synchronize(self) -> None:
        pass

    def __getattr__(self, name: str) -> Any:
        return getattr(torch.cuda, name)


class _Loader(importlib.machinery.SourceFileLoader):
    """Loads a source file with the replacements."""

    cuda: CudaOnCpu

    def get_code(self, fullname: str) -> Any:
        source = Path(self.path).read_text()
        for old, new in REPLACEMENTS.items():
            source = source.replace(old, new)
        return compile(source, self.path, "exec", dont_inherit=True)

    def exec_module(self, module: ModuleType) -> None:
        module.__dict__["cuda_on_cpu"] = self.cuda
        super().exec_module(module)


class _Finder(importlib.abc.MetaPathFinder):
    """Finds TE's modules in the wheel, before anything else does."""

    def __init__(self, cuda: CudaOnCpu) -> None:
        self.loader = type("Loader", (_Loader,), {"cuda": cuda})

    def find_spec(self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None) -> Any:
        if fullname.split(".")[0] != "transformer_engine":
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path)
        if spec is not None and spec.origin:
            spec.loader = self.loader(fullname, spec.origin)
        return spec


@contextmanager
def transformer_engine_on_cpu(capability: tuple[int, int] = (9, 0), cuda: str = "13.0") -> Iterator[ModuleType]:
    """Inside, `import transformer_engine` finds TE on the CPU; gives `transformer_engine.pytorch`. Every entry imports it anew.

    capability: compute capability of the GPU that TE believes in, (9, 0) an H100, (10, 0) a B200. cuda: torch.version.cuda.
    """
    undo = install(capability, cuda)
    try:
        yield sys.modules["transformer_engine.pytorch"]
    finally:
        undo()


def install(capability: tuple[int, int] = (9, 0), cuda: str = "13.0") -> Any:
    """The same for a process of its own; the function that is returned takes it out again."""
    import torch._dynamo  # it looks for the modules that are absent, so it comes before they are filled in

    from tests.transformer_engine_on_cpu import kernels

    hidden = {name: sys.modules.pop(name) for name in list(sys.modules) if name.split(".")[0] == "transformer_engine"}
    finder = _Finder(CudaOnCpu(capability, cuda))
    sys.meta_path.insert(0, finder)
    sys.modules |= {name: mock.MagicMock(name=name) for name in ABSENT}
    environment = {
        "NVTE_PROJECT_BUILDING": "1",  # do not look for the compiled library
        "NVTE_TORCH_COMPILE": "0",
        "NVTE_UNFUSED_FP8_UPDATE": "1",  # histories and scales advance in TE's Python
    }
    patch = mock.patch.dict(os.environ, environment)
    patch.start()

    def undo() -> None:
        patch.stop()
        sys.meta_path.remove(finder)
        for name in list(sys.modules):
            if name.split(".")[0] in ("transformer_engine", "transformer_engine_torch") or name in ABSENT:
                del sys.modules[name]
        sys.modules.update(hidden)

    try:
        sys.modules["transformer_engine_torch"] = kernels.Kernels("transformer_engine_torch")
        _root()
        common = importlib.import_module("transformer_engine.common")
        common.load_framework_extension = lambda framework: None  # type: ignore[attr-defined]
        importlib.import_module("transformer_engine.pytorch")
        gemm = importlib.import_module("transformer_engine.pytorch.cpp_extensions.gemm")
        gemm.get_cublas_workspace = functools.cache(lambda *_: torch.empty(0))  # type: ignore[attr-defined]
    except BaseException:
        undo()
        raise
    return undo


def _root() -> None:
    """The package itself without its `__init__`, which imports for JAX too."""
    spec = importlib.util.find_spec("transformer_engine")
    assert spec is not None
    spec.loader = None
    sys.modules["transformer_engine"] = importlib.util.module_from_spec(spec)
