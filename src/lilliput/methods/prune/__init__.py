"""Pruning: which weights become zero."""
