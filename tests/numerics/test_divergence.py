import numpy as np
import pytest

from lilliput.numerics.divergence import divergence


def test_divergence_is_that_of_the_two_distributions() -> None:
    p, q = np.array([0.5, 0.25, 0.25]), np.array([0.25, 0.5, 0.25])
    kl, same = divergence(np.log(p)[None].astype(np.float32), np.log(q)[None].astype(np.float32) + 7)
    assert kl == pytest.approx([float((p * np.log(p / q)).sum())], rel=1e-6)
    assert not same[0]


def test_a_model_does_not_diverge_from_itself() -> None:
    logits = np.random.default_rng(0).normal(size=(5, 11)).astype(np.float32) * 40
    kl, same = divergence(logits, logits)
    assert (kl == 0).all()
    assert same.all()
