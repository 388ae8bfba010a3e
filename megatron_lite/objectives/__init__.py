"""Training objectives. An objective wraps the decoder and the engine wraps the objective, so head and loss see whole
weights."""
