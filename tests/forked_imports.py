"""What the server of `tests.forked` imports before it forks: all that runs and tests import, also what they import late."""

import matplotlib.figure  # noqa: F401
import torch
import transformers

import megatron_lite.commands.train  # noqa: F401
import tests.distributed
import tests.hf_folders  # noqa: F401

transformers.AutoTokenizer, transformers.PreTrainedTokenizerFast  # noqa: B018  (transformers imports them when they are named)
torch.set_num_threads(1)
