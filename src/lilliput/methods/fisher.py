"""How much the loss of the model feels every weight: squared gradients summed over rows of text (needs torch).

The value of a weight is the sum, over calibration rows taken one at a time, of the square of the gradient of the row's
mean cross-entropy: the diagonal of the empirical Fisher information, times the number of rows. Rows taken together
would square the sum of their gradients instead. Sums are float32; in bfloat16 small squares vanish beside large sums.
A matrix used twice, such as a tied embedding, has one gradient, the sum of its two uses, and is counted once.

Source: Kim et al., "SqueezeLLM", ICML 2024, section 4.1; Park et al., "Any-Precision LLM", ICML 2024, section 3.2.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from lilliput.artifact.disk import replacing, sync
from lilliput.core.errors import InputCorrupt
from lilliput.core.progress import Progress
from lilliput.data.streams import I32, Batches
from lilliput.methods.base import LayerMethod, Statistic
from lilliput.methods.sources import Source
from lilliput.models import Decoder


class Fisher:
    """The sums in their file, read a matrix at a time."""

    def __init__(self, file: Path) -> None:
        self._file = file

    def value(self, name: str, rows: slice = slice(None)) -> Tensor:
        """The sums of some rows of one matrix, by its canonical name: (rows, in) float32, not negative."""
        with safe_open(self._file, framework="pt") as file:
            found: Tensor = file.get_slice(name)[rows]
        return found

    @property
    def rows(self) -> int:
        """Rows of text summed so far; 0 where there is no file. Raises InputCorrupt for a damaged one."""
        if not self._file.exists():
            return 0
        try:
            with safe_open(self._file, framework="pt") as file:
                return int(file.metadata()["rows"])
        except (SafetensorError, ValueError, KeyError, TypeError) as error:
            fix = "Give --no-resume to start anew"
            raise InputCorrupt(f"was damaged ({error})", where=str(self._file), fix=fix) from None


def gather(
    decoder: Decoder, names: Iterable[str], rows: I32, file: Path, progress: Progress, keep_every: int = 16
) -> Fisher:
    """Sum the squared gradients of the matrices named over `rows`, (samples, length) token ids of 2 or more.

    decoder: float32; its gradients are used and cleared, its weights stay. file: where the sums are kept, after every
    `keep_every` rows, so that a killed run goes on from there.
    Raises InputCorrupt, naming the matrix, for gradients that are not finite.
    """
    kept = Fisher(file)
    done = kept.rows
    weights = {name: decoder.get_parameter(f"{name}.weight") for name in names}
    sums = {n: kept.value(n) if done else torch.zeros(w.shape, dtype=torch.float32) for n, w in weights.items()}
    progress.begin("sensitivity", len(rows), done=done)
    with torch.enable_grad(), _squaring(decoder, weights, sums):
        for index in range(done, len(rows)):
            tokens = torch.tensor(rows[index : index + 1], dtype=torch.int64)
            torch.autograd.backward(F.cross_entropy(decoder(tokens)[0, :-1].float(), tokens[0, 1:]))
            if (index + 1) % keep_every == 0 or index + 1 == len(rows):
                _keep(sums, index + 1, file)
            progress.advance(1)
    return kept


def gather_for(
    source: Source,
    methods: Mapping[str, Sequence[LayerMethod]],
    data: Batches | None,
    file: Path,
    progress: Progress,
) -> Fisher | None:
    """What those methods of a sweep over `source` need, gathered now unless it is there; None where they need none."""
    names = [name for name, chain in methods.items() if any(m.needs is Statistic.FISHER for m in chain)]
    if not names:
        return None
    assert data is not None, "planning refuses a recipe that lacks its calibration text"
    kept = Fisher(file)
    return kept if kept.rows == len(data.rows) else gather(source.whole(), names, data.rows, file, progress)


def _keep(sums: dict[str, Tensor], rows: int, file: Path) -> None:
    for name, total in sums.items():
        if not bool(torch.isfinite(total).all()):
            fix = "Check the model and the calibration text, or use a method that does not need gradients"
            raise InputCorrupt("its gradients are NaN or infinite on the calibration text", where=name, fix=fix)
    with replacing(file) as fresh:
        save_file(sums, fresh, metadata={"rows": str(rows)})
    sync(file.parent)


@contextmanager
def _squaring(decoder: Decoder, weights: dict[str, nn.Parameter], sums: dict[str, Tensor]) -> Iterator[None]:
    """While the context lasts, gradients of `weights`, and of nothing else, go squared into `sums` and are dropped."""

    def hook(total: Tensor) -> Callable[[Tensor], None]:
        def add(weight: Tensor) -> None:  # runs once a backward pass, however often the weight was used
            assert weight.grad is not None, "the hook follows the accumulation of the gradient"
            total.addcmul_(weight.grad, weight.grad)
            weight.grad = None

        return add

    before = {parameter: parameter.requires_grad for parameter in decoder.parameters()}
    for parameter in before:
        parameter.requires_grad_(False)
    for weight in weights.values():
        weight.requires_grad_(True)
        weight.grad = None
    handles = [
        weight.register_post_accumulate_grad_hook(hook(sums[name]))  # type: ignore[no-untyped-call]
        for name, weight in weights.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for parameter, required in before.items():
            parameter.requires_grad_(required)
