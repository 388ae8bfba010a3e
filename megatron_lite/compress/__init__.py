"""Pruning: importance of channels, heads, neurons and layers, cutting a model to the kept ones, search under a budget."""
