"""What the server of `tests.forked` imports before it forks: all that runs and tests import, also what they import late."""

import contextlib
import gc

import matplotlib.figure  # noqa: F401
import torch
import torch._inductor.compile_fx  # the compiler, which torch's optimizers and DeepSpeed import
import transformers

import megatron_lite.commands.train  # noqa: F401
import tests.distributed
import tests.hf_folders  # noqa: F401
from megatron_lite.engine.deepspeed import DeepSpeedConfig

transformers.AutoTokenizer, transformers.PreTrainedTokenizerFast  # noqa: B018  (transformers imports them when they are named)
with contextlib.suppress(ValueError):  # not installed
    DeepSpeedConfig().validate()
torch.set_num_threads(1)
gc.freeze()  # no fork has to search all this for garbage
