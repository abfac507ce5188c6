import torch

from lilliput.numerics.statistics import Gram, InputNorm, InputPeak


def test_statistics_do_not_depend_on_how_the_tokens_were_batched() -> None:
    x = torch.randn(100, 6, generator=torch.Generator().manual_seed(0))
    norm, gram, peak = InputNorm(6), Gram(6), InputPeak(6)
    for part in x.split(17):
        norm.add(part)
        gram.add(part)
        peak.add(part)
    assert torch.allclose(norm.value(), x.double().norm(dim=0).float(), rtol=1e-6)
    assert torch.allclose(gram.value(), (x.double().T @ x.double()).float(), rtol=1e-5, atol=1e-4)
    assert torch.allclose(gram.value(), gram.value().T)
    assert torch.equal(peak.value(), x.abs().amax(0))
    assert gram.tokens == peak.tokens == 100
