"""What the soak's server imports before it forks: all that a job would import itself, also what it imports late."""

import matplotlib.figure  # noqa: F401
import torch
import transformers

import megatron_lite.commands.train  # noqa: F401

transformers.AutoTokenizer, transformers.PreTrainedTokenizerFast  # noqa: B018  (transformers imports them when they are named)
torch.set_num_threads(1)
