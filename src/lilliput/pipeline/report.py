"""What `compress` says when it is done, or, after a dry run, what it would do."""

from pydantic import BaseModel


class WidthRow(BaseModel):
    """One width. bits_per_weight: what a quantized weight costs to read, scales and zeros counted; None without codes.

    size_bytes: files a copy needs to serve this width. kl (mean nats) and top1_agreement against the original, on the
    probe text; of an encoder instead the mean cosine to the original's vectors of the probe, and their mean relative
    error. None in a dry run.
    """

    bits: int
    size_bytes: int
    bits_per_weight: float | None = None
    kl: float | None = None
    top1_agreement: float | None = None
    cosine: float | None = None
    error: float | None = None


class LayerPlan(BaseModel):
    """What is done to one matrix: its methods joined by "+", or "-" with the reason it stays as it is."""

    name: str
    shape: tuple[int, int]
    method: str
    bits: tuple[int, ...] = ()


class BudgetRow(BaseModel):
    """One point of the frontier: the least loss predicted for its size.

    size_bytes: of all tensor files. predicted_kl: mean nats a token, the sum of what each layer loses alone.
    uniform: the width all layers have, for a row that is there to compare with. chosen: what was made. rung: of several
    budgets, the width that the artifact serves this one under; bits and bytes are then what a copy that serves it holds.
    """

    bits_per_weight: float
    size_bytes: int
    predicted_kl: float
    uniform: int | None = None
    chosen: bool = False
    rung: int | None = None


class CompressReport(BaseModel):
    """path: the artifact, None after a dry run. resumed: work of an earlier run was used. warnings: one line each.

    expected_ram_bytes: the planner's estimate of peak memory; work_bytes: disk needed beside the artifact while working.
    """

    path: str | None
    source: str
    recipe: list[dict[str, dict[str, object]]]
    source_bytes: int
    size_bytes: int
    rows: list[WidthRow]
    layers: list[LayerPlan]
    expected_ram_bytes: int
    work_bytes: int
    frontier: list[BudgetRow] = []
    """By size, when widths were chosen for a budget; for several, only what was chosen and one width for all."""
    resumed: bool = False
    warnings: list[str] = []
