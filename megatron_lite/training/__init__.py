"""A training run: its config, how it is built or resumed, the loop, and what watches it."""
