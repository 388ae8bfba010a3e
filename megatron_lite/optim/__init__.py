"""The optimizer over plain local tensors, and what changes over the steps: learning rate and batch size."""
