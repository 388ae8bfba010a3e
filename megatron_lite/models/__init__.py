"""Plain single-device PyTorch models: read them top to bottom beside the paper.

Nothing here knows about processes, engines or config frameworks; parallelism is applied from outside.
"""

from megatron_lite.models.decoder import Decoder, ModelConfig

__all__ = ["Decoder", "ModelConfig"]
