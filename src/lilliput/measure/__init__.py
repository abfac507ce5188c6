"""A runner to numbers, with the conditions they were taken under."""

from lilliput.core.registry import Registry

__all__ = ["METRICS"]

METRICS = Registry(
    "metric",  # what a schedule is judged by
    agreement="lilliput.measure.metrics:Agreement",
    kl="lilliput.measure.metrics:KL",
    nll="lilliput.measure.metrics:NLL",
    rouge_l="lilliput.measure.metrics:RougeL",
)
