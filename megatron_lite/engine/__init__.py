"""Engines run a step: forward, backward, reduction, clipping, update. FSDP2 and DeepSpeed ZeRO behind the same few methods."""
