"""Tensor, sequence and data parallelism, applied from outside to models that know nothing about it."""
