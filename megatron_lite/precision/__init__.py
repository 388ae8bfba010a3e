"""Number formats of training: the dtype of computation and the dtype of stored state."""
