"""Folds a recipe over a model and hands the result to the artifact; checks what it saved before it calls it done."""

from lilliput.pipeline.compress import compress
from lilliput.pipeline.report import CompressReport

__all__ = ["CompressReport", "compress"]
