"""Artifact to embeddings, in torch: the runner of encoders."""

from lilliput.embedding.embedder import Embedder

__all__ = ["Embedder"]
