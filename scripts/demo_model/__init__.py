"""Makes the demo model: its corpus, its tokenizer, its weights and its card."""
