"""Quantization: which few values the weights may take."""
