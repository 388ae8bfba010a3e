"""From raw text anywhere to a clean, deduplicated, tokenized, blendable corpus (needs the `[data]` extra)."""
