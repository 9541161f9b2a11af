"""The embedded target: its corpora, tokenizer, recipe and report."""
