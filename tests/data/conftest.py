"""Small tokenizers of the kinds in use, built here so that tests need no files."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors

BOS = "<s>"


def byte_level() -> tokenizers.Tokenizer:
    """GPT-2's kind: bytes as letters, a few merges."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {letter: i for i, letter in enumerate(alphabet)} | {"th": 256, "the": 257, "Ġt": 258}
    core = tokenizers.Tokenizer(models.BPE(vocab, [("t", "h"), ("th", "e"), ("Ġ", "t")]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    return core


def sentencepiece() -> tokenizers.Tokenizer:
    """Llama 2's kind: "▁" for space, one put in front, bytes for what has no piece."""
    pieces = [*(f"<0x{i:02X}>" for i in range(256)), "▁", "t", "h", "e", "th", "the", "▁the", "l", "o", "▁▁"]
    merges = [("t", "h"), ("th", "e"), ("▁", "the"), ("▁", "▁")]
    model = models.BPE({p: i for i, p in enumerate(pieces)}, merges, byte_fallback=True)
    core = tokenizers.Tokenizer(model)
    core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    core.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return core


KINDS: dict[str, Callable[[], tokenizers.Tokenizer]] = {"byte_level": byte_level, "sentencepiece": sentencepiece}


@pytest.fixture
def save(tmp_path: Path) -> Callable[..., Path]:
    """save(kind, adds_bos=.., **tokenizer_config) writes a model folder's tokenizer files and returns the folder."""

    def write(
        kind: str = "byte_level",
        *,
        adds_bos: bool = True,
        template: list[str] | None = None,
        generation: dict[str, Any] | None = None,
        special: dict[str, Any] | None = None,
        jinja: str | None = None,
        **config: Any,
    ) -> Path:
        core = KINDS[kind]()
        core.add_special_tokens([AddedToken(t, normalized=False) for t in (BOS, "</s>", "<|end|>")])
        if adds_bos or template:
            items = template or [BOS, "$A"]
            used = {t: core.token_to_id(t) for t in items if t != "$A"}
            core.post_processor = processors.TemplateProcessing(single=items, special_tokens=list(used.items()))
        core.save(str(tmp_path / "tokenizer.json"))
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"bos_token": BOS, "eos_token": "</s>"} | config))
        if generation is not None:
            (tmp_path / "generation_config.json").write_text(json.dumps(generation))
        if special is not None:
            (tmp_path / "special_tokens_map.json").write_text(json.dumps(special))
        if jinja is not None:
            (tmp_path / "chat_template.jinja").write_text(jinja)
        return tmp_path

    return write
