"""Plain single-device PyTorch models, to be read side by side with the papers.

Nothing here knows about processes, engines or config frameworks; parallelism is applied from outside.
"""

from megatron_lite.models.decoder import Decoder, ModelConfig

__all__ = ["Decoder", "ModelConfig"]
