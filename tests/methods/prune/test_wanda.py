import pytest
import torch

from lilliput.methods.prune.wanda import Wanda


def test_rows_share_the_sparsity_and_survivors_keep_their_bits() -> None:
    weight = torch.randn(8, 12, generator=torch.Generator().manual_seed(0))
    pruned = Wanda(sparsity=0.25).solve(weight, torch.linspace(0.1, 2, 12))
    assert ((pruned == 0).sum(dim=1) == 3).all()
    assert torch.equal(pruned[pruned != 0], weight[pruned != 0])


def test_a_small_weight_on_a_loud_input_outlives_a_large_one_on_a_quiet_input() -> None:
    pruned = Wanda(sparsity=0.5).solve(torch.tensor([[0.1, 1.0]]), torch.tensor([100.0, 1.0]))
    assert pruned.tolist() == [[pytest.approx(0.1), 0.0]]


def test_a_percentage_is_refused_with_a_fix() -> None:
    with pytest.raises(ValueError, match=r"^wanda\.sparsity: .* not a percentage\.$"):
        Wanda(sparsity=50)


def test_the_embedding_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^wanda\.embeddings: an embedding has no inputs"):
        Wanda(embeddings=True)
