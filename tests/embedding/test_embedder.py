"""The runner of encoders: texts in, vectors out."""

from pathlib import Path

import numpy as np
import pytest

from lilliput.embedding import Embedder
from lilliput.pipeline import compress
from support.encoders import write_encoder
from support.small_artifact import write_small_artifact


def test_a_text_has_the_same_vector_alone_and_among_others(tmp_path: Path) -> None:
    write_encoder(tmp_path / "model", "bert")
    compress(tmp_path / "model", tmp_path / "out", recipe=[{"rtn": {"bits": [4, 8], "group_size": 32}}], gate=False)
    embedder = Embedder(tmp_path / "out")
    texts = ["the sea", "and the wind went on and on", "a", "x" * 500]
    for bits in (4, 8):
        together = embedder.texts(texts, bits=bits)
        assert together.shape == (4, 64)
        assert np.allclose(np.linalg.norm(together, axis=1), 1, atol=1e-6)
        for text, row in zip(texts, together, strict=True):
            assert np.allclose(embedder.texts([text], bits=bits)[0], row, atol=1e-5)
    assert np.array_equal(embedder.texts(texts), embedder.texts(texts, bits=8))
    assert embedder.texts([]).shape == (0, 64)
    with pytest.raises(ValueError, match=r"3 is not one of the widths \[4, 8\]"):
        embedder.texts(["a"], bits=3)
    with pytest.raises(ValueError, match=r"takes texts, not pictures"):
        embedder.pictures(["a.png"])


def test_a_decoder_is_refused(tmp_path: Path) -> None:
    write_small_artifact(tmp_path / "llama")
    with pytest.raises(NotImplementedError, match=r"holds a llama decoder, which generates text"):
        Embedder(tmp_path / "llama")
