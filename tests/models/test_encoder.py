"""Encoders in float against transformers, and what padding may not do."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from lilliput.core.spec import PADDING, EncoderSpec
from lilliput.models import Checkpoint, EncoderBlock, load_encoder, load_encoder_block
from support.encoders import write_encoder


def texts() -> tuple[Tensor, Tensor]:
    """Three texts of 12, 7 and 3 tokens, <s> .. </s>, padded; and where they hold something."""
    ids = torch.randint(3, 320, (3, 12), generator=torch.Generator().manual_seed(1))
    seen = torch.arange(12) < torch.tensor([[12], [7], [3]])
    ids[:, 0] = 0
    ids[torch.arange(3), seen.sum(1) - 1] = 1
    return ids.masked_fill(~seen, PADDING), seen


def near(found: Tensor, expected: Tensor) -> None:
    assert found.shape == expected.shape
    assert float((found - expected).abs().max() / expected.abs().max()) < 1e-5


@torch.no_grad()
def test_bert_equals_transformers(tmp_path: Path) -> None:
    theirs = write_encoder(tmp_path, "bert")
    ids, seen = texts()
    states = theirs(ids.clamp(min=0), attention_mask=seen.long()).last_hidden_state
    mean = (states * seen[..., None]).sum(1) / seen.sum(1, keepdim=True)
    ours = load_encoder(Checkpoint.open(tmp_path))
    near(ours(ids), mean)
    (tmp_path / "1_Pooling").mkdir()
    (tmp_path / "1_Pooling" / "config.json").write_text(
        '{"pooling_mode_cls_token": true, "word_embedding_dimension": 64}'
    )
    checkpoint = Checkpoint.open(tmp_path)
    assert checkpoint.notes == ()
    near(load_encoder(checkpoint)(ids), states[:, 0])


@torch.no_grad()
def test_both_towers_of_clip_equal_transformers(tmp_path: Path) -> None:
    theirs = write_encoder(tmp_path, "clip")
    ids, seen = texts()
    said = theirs.text_model(ids.masked_fill(~seen, 1), attention_mask=seen.long()).pooler_output
    near(load_encoder(Checkpoint.open(tmp_path, tower="text"))(ids), theirs.text_projection(said))
    pictures = torch.randn(2, 3, 24, 24, generator=torch.Generator().manual_seed(2))
    said = theirs.visual_projection(theirs.vision_model(pictures).pooler_output)
    patches = pictures.unfold(2, 8, 8).unfold(3, 8, 8).permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2)
    near(load_encoder(Checkpoint.open(tmp_path, tower="vision"))(patches), said)


def test_a_pair_asks_which_tower_is_meant(tmp_path: Path) -> None:
    write_encoder(tmp_path, "clip")
    with pytest.raises(
        ValueError, match=r"config\.json: holds the towers text and vision\. Say which with --tower text"
    ):
        Checkpoint.open(tmp_path)
    (tmp_path / "preprocessor_config.json").unlink()
    Checkpoint.open(tmp_path, tower="text")
    with pytest.raises(ValueError, match=r"preprocessor_config\.json: says how pictures are prepared and is not there"):
        Checkpoint.open(tmp_path, tower="vision")


@torch.no_grad()
@pytest.mark.parametrize(("family", "tower"), [("bert", None), ("clip", "text")])
def test_padding_changes_nothing_and_stays_zero_where_layers_read(
    family: str, tower: str | None, tmp_path: Path
) -> None:
    write_encoder(tmp_path, family)
    checkpoint = Checkpoint.open(tmp_path, tower=tower)
    encoder, (ids, seen) = load_encoder(checkpoint), texts()
    alone = encoder(ids[1:2, :7])
    assert torch.allclose(encoder(ids)[1:2], alone, atol=1e-5 * float(alone.abs().max()))
    block, hidden = load_encoder_block(checkpoint, 0), encoder.embed(ids)
    read: dict[str, Tensor] = {}
    for name, linear in block.linears().items():
        linear.register_forward_pre_hook(lambda _, inputs, name=name: read.update({name: inputs[0]}))
    assert isinstance(block, EncoderBlock)
    read["the next block"] = block(hidden)
    assert len(read) == 7
    for inputs in read.values():
        assert not inputs[~seen].any()
        assert (inputs[seen] != 0).any(-1).all()


def test_what_an_encoder_of_sentences_does_besides_is_served_or_refused(tmp_path: Path) -> None:
    write_encoder(tmp_path, "bert")
    checkpoint = Checkpoint.open(tmp_path)
    assert isinstance(checkpoint.spec, EncoderSpec)
    assert checkpoint.spec.pooling == "mean"
    assert any("mean over its tokens" in note for note in checkpoint.notes)
    (tmp_path / "modules.json").write_text('[{"type": "sentence_transformers.models.Dense"}]')
    with pytest.raises(NotImplementedError, match=r"modules\.json puts Dense behind the encoder"):
        Checkpoint.open(tmp_path)
    (tmp_path / "modules.json").unlink()
    (tmp_path / "1_Pooling").mkdir()
    (tmp_path / "1_Pooling" / "config.json").write_text('{"pooling_mode_max_tokens": true}')
    with pytest.raises(NotImplementedError, match=r"asks for max_tokens"):
        Checkpoint.open(tmp_path)
