"""Trains the classifier of `learned` (torch): keys and values of prompts to one choice a rung.

Source: Chen et al., arXiv 2410.13461, its KV-cache scheduler; what differs is told in engine/schedules/learned.py.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lilliput.engine.schedules.learned import Learned, upright
from lilliput.scheduling.job import ScheduleJob
from lilliput.scheduling.learn import Beginning

EPOCHS, BATCH, RATE, DECAY, DROPOUT, UNITS, HELD = 60, 16, 3e-3, 0.05, 0.2, 64, 0.15


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
    labels: npt.NDArray[np.int64],
    beginnings: Sequence[Beginning],
    inv_freq: npt.NDArray[np.float32],
    ladder: tuple[int, ...],
    grid: tuple[int, ...],
    job: ScheduleJob,
) -> Learned:
    """Return the classifier of the least loss on the first part of the prompts, which it is not trained on.

    labels: (prompts, rungs), places in `grid`. Rare labels weigh more, so that every one of them counts about alike.
    """
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(job.seed)
        pairs = [(upright(one.keys, inv_freq).astype(np.float32), one.values) for one in beginnings]
        plain = torch.tensor(np.stack([values.mean(1).reshape(-1) for _, values in pairs]))
        heads, _, dim = pairs[0][1].shape
        spread = plain.std(0).clamp_min(1e-6)
        model = Reader(heads, dim, len(ladder) - 1, len(grid), plain.mean(0), spread)
        target = torch.from_numpy(labels)
        weight = _weights(target, len(grid))
        held = max(1, round(HELD * len(pairs)))
        optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=DECAY)
        best, kept = float("inf"), {k: v.clone() for k, v in model.state_dict().items()}
        for _ in range(EPOCHS):
            model.train()
            for batch in torch.split(torch.randperm(len(pairs) - held) + held, BATCH):
                optimizer.zero_grad()
                loss = _loss(model(*padded([pairs[i] for i in batch])), target[batch], weight)
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
            model.eval()
            with torch.no_grad():
                now = float(_loss(model(*padded(pairs[:held])), target[:held], weight))
            if now < best:
                best, kept = now, {k: v.clone() for k, v in model.state_dict().items()}
    model.load_state_dict(kept)
    return exported(model, inv_freq, ladder, grid, job)


def exported(
    model: Reader,
    inv_freq: npt.NDArray[np.float32],
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


def padded(pairs: Sequence[tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]]) -> tuple[Tensor, Tensor, Tensor]:
    """Return keys, values and which tokens are real, of prompts of several lengths."""
    longest = max(keys.shape[1] for keys, _ in pairs)
    real = torch.zeros(len(pairs), longest, dtype=torch.bool)
    both = torch.zeros(2, len(pairs), pairs[0][0].shape[0], longest, pairs[0][0].shape[2])
    for i, (keys, values) in enumerate(pairs):
        count = keys.shape[1]
        real[i, :count] = True
        both[0, i, :, :count], both[1, i, :, :count] = torch.from_numpy(keys), torch.from_numpy(values)
    return both[0], both[1], real


def _weights(target: Tensor, steps: int) -> Tensor:
    """(rungs, steps) of the labels, the square root of how much rarer than an even share they are."""
    share = F.one_hot(target, steps).float().mean(0)
    return (1 / (steps * share.clamp_min(1 / len(target)))).sqrt()


def _loss(logits: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    """Cross-entropy of the logits, the mean over rungs."""
    rungs = [F.cross_entropy(logits[:, i], target[:, i], weight[i]) for i in range(logits.shape[1])]
    return torch.stack(rungs).mean()
