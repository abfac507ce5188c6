"""Reading on behind a Past gives the logits of the whole row, in every family; what is written is drawn from them."""

from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch

from lilliput.core.errors import QualityFailed
from lilliput.models import Checkpoint, Decoder, load_decoder
from lilliput.models.decoder import Past
from lilliput.models.writing import SIDE, SIDE_BYTES, side_by_side, write
from support.families import CASES, FAMILIES, VOCAB, Case, each, write_checkpoint

EVERY: list[Case] = [*CASES, ("mistral", {"sliding_window": 5}), ("gemma2", {"sliding_window": 5})]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Decoder:
    folder = tmp_path_factory.mktemp("model")
    FAMILIES["llama"](folder, 7)
    return load_decoder(Checkpoint.open(folder)).eval()


@each(EVERY)
def test_reading_on_gives_the_logits_of_the_whole_row(family: str, changes: dict[str, Any], tmp_path: Path) -> None:
    write_checkpoint(tmp_path, family, seed=7, **changes)
    decoder = load_decoder(Checkpoint.open(tmp_path)).eval()
    tokens = torch.randint(3, VOCAB, (2, 24), generator=torch.Generator().manual_seed(1))
    past, at = Past(24), 0
    with torch.no_grad():
        whole = decoder(tokens)
        for count in (9, 1, 1, 6, 1, 6):  # some at a time, one at a time, some again
            found = decoder.follow(tokens[:, at : at + count], past)
            at += count
            assert past.count == at
            assert (found - whole[:, at - 1]).abs().max() <= 2e-5 * whole.abs().max()


def test_what_is_written_has_the_frequencies_of_the_model(llama: Decoder) -> None:
    opening = torch.tensor([5, 9, 200, 31])
    rows = write(llama, opening.repeat(20000, 1), 5, torch.Generator().manual_seed(3))
    assert torch.equal(rows[:, :4], opening.repeat(20000, 1))
    with torch.no_grad():
        share = torch.softmax(llama(opening[None])[0, -1], -1)
    seen = torch.bincount(rows[:, 4], minlength=VOCAB) / len(rows)
    often = share * len(rows) > 5
    squares = (len(rows) * (seen - share).square() / share)[often].sum()
    assert squares < 1.5 * often.sum()  # chi square: about as much as there are tokens
    assert seen[~often].sum() < 2 * share[~often].sum() + 1e-3


def test_a_row_is_written_from_what_it_says_itself(llama: Decoder) -> None:
    openings = torch.randint(3, VOCAB, (3, 4), generator=torch.Generator().manual_seed(2))
    rows = write(llama, openings, 40, torch.Generator().manual_seed(4))
    with torch.no_grad():
        own = torch.log_softmax(llama(rows), -1)[:, 3:-1].gather(2, rows[:, 4:, None]).mean()
        other = torch.log_softmax(llama(rows.roll(1, 0)), -1)[:, 3:-1].gather(2, rows[:, 4:, None]).mean()
    assert own > other + 0.5
    assert torch.equal(rows, write(llama, openings, 40, torch.Generator().manual_seed(4)))


def test_longer_rows_are_written_fewer_at_a_time(llama: Decoder) -> None:
    spec = llama.spec
    assert side_by_side(llama, 16) == SIDE
    length = 1 << 18
    row = 8 * spec.num_layers * length * spec.num_kv_heads * spec.head_dim + 16 * VOCAB
    assert side_by_side(llama, length) == SIDE_BYTES // row < SIDE
    assert side_by_side(llama, 1 << 30) == 1


def test_a_model_that_says_no_numbers_writes_nothing(llama: Decoder) -> None:
    sick = deepcopy(llama)
    sick.final_norm.weight.data[3] = torch.nan
    with pytest.raises(QualityFailed, match=r"^llama: the model's own logits are not finite at token 5 of a text"):
        write(sick, torch.tensor([[5, 9, 200, 31]]), 8, torch.Generator().manual_seed(3))
