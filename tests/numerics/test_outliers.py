import torch

from lilliput.numerics.grids import nearest
from lilliput.numerics.nested import Quantized
from lilliput.numerics.outliers import Outliers
from lilliput.numerics.trainable import Trainable

DRAW = torch.Generator().manual_seed(0)
WEIGHT = torch.randn(7, 40, generator=DRAW)
CHOSEN = torch.rand(7, 40, generator=DRAW) < 0.1
CHOSEN[3] = False
SOME = Outliers.at(CHOSEN, 3 * WEIGHT)


def test_added_and_taken_away_is_what_it_was() -> None:
    dense = torch.where(CHOSEN, (3 * WEIGHT).half().float(), torch.zeros(7, 40))
    assert torch.equal(SOME.added(torch.zeros(7, 40)), dense)
    assert torch.equal(SOME.taken_from(WEIGHT), WEIGHT - dense)
    assert SOME.counts[3] == 0
    assert int(SOME.counts.sum()) == len(SOME.values) == int(CHOSEN.sum())


def test_rows_by_slice_and_by_number_are_those_of_the_matrix() -> None:
    made = nearest(WEIGHT, (2, 4), 16, sym=False)
    whole = Quantized(made.codes, made.bits, 16, made.scale, made.zero, outliers=SOME)
    assert not torch.equal(whole.dequantize(2), made.dequantize(2))
    for bits in (2, 4):
        for index in (slice(2, 5), slice(3, 4), torch.tensor([6, 3, 3, 0])):
            assert torch.equal(whole.rows(index).dequantize(bits), whole.dequantize(bits)[index])
        parts = [whole.rows(slice(at, at + 3)) for at in (0, 3, 6)]
        assert torch.equal(Quantized.stack(parts).dequantize(bits), whole.dequantize(bits))


def test_training_starts_from_the_matrix_with_its_outliers_and_keeps_them() -> None:
    made = nearest(SOME.taken_from(WEIGHT), (2, 4), 16, sym=False)
    coded = Quantized(made.codes, made.bits, 16, made.scale, made.zero, outliers=SOME)
    for codes in (False, True):
        layer = Trainable(WEIGHT, coded, codes)
        for bits in (2, 4):
            assert torch.allclose(layer.at(bits), coded.dequantize(bits), atol=1e-6)
        left = (layer.weight.detach() - made.dequantize(4))[CHOSEN].abs()  # not what the outliers have taken away
        assert not codes or float(left.max()) < 0.51 * float(made.scale[4].max())
        layer.at(4).square().sum().backward()
        assert all(value.grad is not None for name, value in layer.named() if name.endswith(".4"))
        assert layer.quantized(4).outliers is SOME
        assert torch.equal(layer.quantized(4).codes, coded.codes)
