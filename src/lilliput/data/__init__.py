"""Text to token windows: the tokenizer, the readers of documents, and seeded streams. NumPy only."""
