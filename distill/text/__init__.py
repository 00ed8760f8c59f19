"""Text for language models: where it is read from, how it becomes tokens, and how tokens become training sequences."""
