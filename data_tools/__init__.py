"""From raw text anywhere to a clean, deduplicated, tokenised, blendable corpus (needs the `[data]` extra)."""
