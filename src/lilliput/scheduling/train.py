"""Trains the classifier of `learned` (torch): keys and values of prompts to one choice a rung.

Source: Chen et al., arXiv 2410.13461, its KV-cache scheduler; what differs is told in engine/schedules/learned.py.
Deviation: not labels are learned, the cheapest steps within the tolerance on each prompt, but what every choice costs
there, its loss and its bits at a price. A label says nothing of how bad its neighbours are, and a classifier that errs
towards few bits loses much more than one that errs towards many gains. The price is that at which prompts left out of
the training come out within the tolerance together.
"""

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lilliput.engine.schedules.learned import Learned, upright
from lilliput.scheduling.job import ScheduleJob
from lilliput.scheduling.learn import Beginning, Table

EPOCHS, BATCH, RATE, DECAY, DROPOUT, UNITS, HELD = 60, 16, 3e-3, 0.05, 0.2, 64, 0.15
FOLDS, HALVINGS = 3, 5
"""Parts of the prompts, each left out once for a price; prices that are tried."""
F32 = npt.NDArray[np.float32]
F64 = npt.NDArray[np.float64]
Pairs = Sequence[tuple[F32, F32]]


class Reader(nn.Module):
    """The classifier as it is trained."""

    def __init__(self, heads: int, dim: int, rungs: int, steps: int, mean: Tensor, spread: Tensor) -> None:
        super().__init__()
        self.rungs, self.steps = rungs, steps
        self.query = nn.Parameter(torch.zeros(heads, dim))  # at first every token counts alike
        self.hidden = nn.Linear(heads * dim, UNITS)
        self.out = nn.Linear(UNITS, rungs * steps)
        self.drop = nn.Dropout(DROPOUT)
        self.mean: Tensor
        self.spread: Tensor
        self.register_buffer("mean", mean)
        self.register_buffer("spread", spread)

    def forward(self, keys: Tensor, values: Tensor, real: Tensor) -> Tensor:
        """keys, values: (batch, heads, tokens, head_dim), keys upright; real: (batch, tokens), False where padded.

        Returns logits (batch, rungs, steps).
        """
        score = torch.einsum("bhtd,hd->bht", keys, self.query) / self.query.shape[1] ** 0.5
        share = score.masked_fill(~real[:, None], float("-inf")).softmax(-1)
        gathered = torch.einsum("bht,bhtd->bhd", share, values).flatten(1)
        hidden = F.relu(self.hidden(self.drop((gathered - self.mean) / self.spread)))
        made: Tensor = self.out(self.drop(hidden)).unflatten(1, (self.rungs, self.steps))
        return made


def train(
    table: Table,
    rows: Sequence[int],
    beginnings: Sequence[Beginning],
    inv_freq: F32,
    job: ScheduleJob,
    allowed: float,
) -> Learned:
    """Return the classifier whose choices lose at most `allowed` on average, on prompts it was not trained on.

    rows: of the table, one for each beginning.
    """
    pairs = [(upright(one.keys, inv_freq).astype(np.float32), one.values) for one in beginnings]
    loss, bits, places = table.loss[rows], table.bits[rows], places_of(table)
    price = _price(pairs, loss, bits, places, allowed, job.seed)
    model = fit(pairs, loss + price * bits, places, job.seed)
    return exported(model, inv_freq, table.ladder, table.grid, job)


def places_of(table: Table) -> npt.NDArray[np.int64]:
    """Return (steps,) * rungs, which of the table's choices a choice at every rung comes to: none before the last."""
    shape = (len(table.grid),) * (len(table.ladder) - 1)
    found = np.empty(shape, dtype=np.int64)
    for at in np.ndindex(shape):
        found[at] = table.choices.index(tuple(table.grid[i] for i in np.maximum.accumulate(at)))
    return found


def fit(pairs: Pairs, cost: F64, places: npt.NDArray[np.int64], seed: int) -> Reader:
    """Return the classifier of the least expected cost on the first part of the prompts, which it is not trained on.

    pairs: keys turned upright and values of each prompt, (heads, tokens, head_dim). cost: (prompts, choices). places: see
    `places_of`.
    """
    regret = cost - cost.min(1, keepdims=True)
    wide = torch.from_numpy((regret / (regret.std() or 1.0)).astype(np.float32)[:, places])
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(seed)
        plain = torch.tensor(np.stack([values.mean(1).reshape(-1) for _, values in pairs]))
        heads, _, dim = pairs[0][1].shape
        spread = plain.std(0).clamp_min(1e-6)
        model = Reader(heads, dim, places.ndim, len(places), plain.mean(0), spread)
        held = max(1, round(HELD * len(pairs)))
        optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=DECAY)
        best, kept = float("inf"), {k: v.clone() for k, v in model.state_dict().items()}
        for _ in range(EPOCHS):
            model.train()
            for batch in torch.split(torch.randperm(len(pairs) - held) + held, BATCH):
                optimizer.zero_grad()
                loss = expected(model(*padded([pairs[i] for i in batch])), wide[batch])
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
            model.eval()
            with torch.no_grad():
                now = float(expected(model(*padded(pairs[:held])), wide[:held]))
            if now < best:
                best, kept = now, {k: v.clone() for k, v in model.state_dict().items()}
    model.load_state_dict(kept)
    return model.eval()


def expected(logits: Tensor, cost: Tensor) -> Tensor:
    """Return the mean cost of steps drawn for each rung by itself from the softmax of its logits.

    logits: (batch, rungs, steps). cost: (batch, steps, .., steps), one axis a rung.
    """
    for rung in reversed(range(logits.shape[1])):
        cost = torch.einsum("b...s,bs->b...", cost, logits[:, rung].softmax(-1))
    return cost.mean()


def _price(pairs: Pairs, loss: F64, bits: F64, places: npt.NDArray[np.int64], allowed: float, seed: int) -> float:
    """Return the highest price tried at which choices for prompts left out lose at most `allowed` on average."""
    parts = np.array_split(np.arange(len(pairs)), FOLDS)

    def within(price: float) -> bool:
        lost = 0.0
        for part in parts:
            others = np.setdiff1d(np.arange(len(pairs)), part)
            model = fit([pairs[i] for i in others], (loss + price * bits)[others], places, seed)
            with torch.no_grad():
                made = model(*padded([pairs[i] for i in part])).argmax(-1).numpy()
            lost += float(loss[part, places[tuple(made.T)]].sum())
        return lost <= allowed * len(pairs)

    return highest(within, slope_at(bits.mean(0), loss.mean(0), allowed))


def highest(within: Callable[[float], bool], around: float) -> float:
    """Return the highest of the prices tried from a quarter of `around` to twice it that is within, 0 where none is."""
    low, high, found = around / 4, around * 2, 0.0
    for _ in range(HALVINGS):
        price = (low * high) ** 0.5
        if within(price):
            low = found = price
        else:
            high = price
    return found


def slope_at(bits: F64, loss: F64, allowed: float) -> float:
    """Return what a bit less costs where choices that are the same for all prompts reach a loss of `allowed`.

    bits, loss: (choices,). The price is that of the lower hull of these points.
    """
    order = np.lexsort((loss, -bits))
    at, slope = order[0], 0.0
    while True:
        cheaper = [i for i in order if bits[i] < bits[at]]
        if not cheaper or (slope and loss[at] > allowed):
            return slope or 1.0
        rates = [(loss[i] - loss[at]) / (bits[at] - bits[i]) for i in cheaper]
        best = int(np.argmin(rates))
        slope, at = max(float(rates[best]), 1e-9), cheaper[best]


def exported(
    model: Reader,
    inv_freq: F32,
    ladder: tuple[int, ...],
    grid: tuple[int, ...],
    job: ScheduleJob,
) -> Learned:
    """Return the schedule with the model's weights."""
    state = {name: value.detach().numpy().astype(np.float32) for name, value in model.state_dict().items()}
    names = {"hidden": "hidden.weight", "hidden_bias": "hidden.bias", "out": "out.weight", "out_bias": "out.bias"}
    weights = {name: state[names.get(name, name)] for name in Learned.shapes if name != "inv_freq"}
    return Learned(
        ladder=ladder,
        prefill=None if job.prefill == ladder[0] else job.prefill,
        horizon=job.max_new_tokens,
        grid=grid,
        weights={**weights, "inv_freq": inv_freq},
    )


def padded(pairs: Pairs) -> tuple[Tensor, Tensor, Tensor]:
    """Return keys, values and which tokens are real, of prompts of several lengths."""
    longest = max(keys.shape[1] for keys, _ in pairs)
    real = torch.zeros(len(pairs), longest, dtype=torch.bool)
    both = torch.zeros(2, len(pairs), pairs[0][0].shape[0], longest, pairs[0][0].shape[2])
    for i, (keys, values) in enumerate(pairs):
        count = keys.shape[1]
        real[i, :count] = True
        both[0, i, :, :count], both[1, i, :, :count] = torch.from_numpy(keys), torch.from_numpy(values)
    return both[0], both[1], real
