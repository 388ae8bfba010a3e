import json
import random

import numpy as np
import pytest
import torch

from megatron_lite.training.rng import rng_state, set_rng_state


def draw():
    return random.random(), random.gauss(0, 1), np.random.rand(3).tolist(), np.random.randn(), torch.rand(3).tolist()


def test_the_same_draws_after_a_trip_through_json():
    random.gauss(0, 1)  # leaves a second normal number waiting
    np.random.randn()
    state = json.loads(json.dumps(rng_state()))
    first = draw()
    draw()
    set_rng_state(state)
    assert draw() == first


@pytest.mark.parametrize("state", [{}, {"python": 3}, {**rng_state(), "torch": "!"}, {**rng_state(), "torch": "AA=="}])
def test_no_state(state):
    with pytest.raises(ValueError, match="state of random generators"):
        set_rng_state(state)
