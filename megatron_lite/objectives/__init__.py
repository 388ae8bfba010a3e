"""What is minimized. An objective wraps the decoder; the engine wraps the objective, so heads and losses see whole weights."""
