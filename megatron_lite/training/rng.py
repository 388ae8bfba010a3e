"""The states of the random generators as JSON: Python's, NumPy's, torch's, and every visible GPU's."""

from __future__ import annotations

import base64
import random
from typing import Any

import numpy as np
import torch


def rng_state() -> dict[str, Any]:
    """This process's generators, as a JSON object."""
    python_version, python_words, python_gauss = random.getstate()
    numpy_state: Any = np.random.get_state(legacy=False)
    gpus = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return {
        "python": [python_version, _pack(np.array(python_words, dtype="<u4")), python_gauss],
        "numpy": {
            "key": _pack(numpy_state["state"]["key"].astype("<u4")),
            "pos": int(numpy_state["state"]["pos"]),
            "has_gauss": int(numpy_state["has_gauss"]),
            "gauss": float(numpy_state["gauss"]),
        },
        "torch": _pack(torch.get_rng_state().numpy()),
        "cuda": [_pack(state.numpy()) for state in gpus],
    }


def set_rng_state(state: dict[str, Any]) -> None:
    """Put the generators back. GPU states are set when this process sees as many GPUs as the one that saved.

    Raises ValueError when the object is not one that `rng_state` made.
    """
    try:
        python_version, python_words, python_gauss = state["python"]
        words = tuple(int(word) for word in _unpack(python_words, "<u4"))
        random.setstate((python_version, words, python_gauss))
        legacy = state["numpy"]
        key = _unpack(legacy["key"], "<u4").astype(np.uint32)
        np.random.set_state(("MT19937", key, legacy["pos"], legacy["has_gauss"], legacy["gauss"]))
        torch.set_rng_state(torch.from_numpy(_unpack(state["torch"], "u1").copy()))
        gpus = [torch.from_numpy(_unpack(packed, "u1").copy()) for packed in state["cuda"]]
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"this is not a state of random generators: {error!r}") from error
    if gpus and torch.cuda.is_available() and torch.cuda.device_count() == len(gpus):
        torch.cuda.set_rng_state_all(gpus)


def _pack(array: np.ndarray) -> str:
    return base64.b64encode(array.tobytes()).decode()


def _unpack(text: str, dtype: str) -> np.ndarray:
    return np.frombuffer(base64.b64decode(text, validate=True), dtype=dtype)
