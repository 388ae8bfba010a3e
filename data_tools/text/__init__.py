"""Pure functions on text: normalization, filters, language, hashes."""
