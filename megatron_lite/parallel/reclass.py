"""Changing what a module does from outside: its class is replaced, in place, by a subclass.

FSDP2 does the same. The module keeps its name, its parameters and their names, so checkpoints, optimizer and engines see
no difference; only methods are overridden. Tensor parallelism and recompute go through here.
"""

from __future__ import annotations

import functools
from typing import Any

from torch import nn


def reclass(module: nn.Module, mixin: type[nn.Module], **attributes: Any) -> None:
    """Give `module` the class (mixin, its own class) and the attributes, in place.

    Mixins stack: the last one added runs first and calls the others through `super()`.
    """
    module.__class__ = _subclass(mixin, type(module))  # type: ignore[arg-type]
    for name, value in attributes.items():
        setattr(module, name, value)


@functools.cache
def _subclass(mixin: type[nn.Module], original: type[nn.Module]) -> type[nn.Module]:
    return type(f"{mixin.__name__}[{original.__name__}]", (mixin, original), {"__doc__": mixin.__doc__})
