import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lilliput.core.errors import ConfigError, InputCorrupt, InputMissing, OutOfResource, Unsupported
from lilliput.data import tokenizer as module
from lilliput.data.tokenizer import Tokenizer

KINDS = ["byte_level", "sentencepiece"]
Save = Callable[..., Path]

quick = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("adds_bos", "config", "expected"),
    [
        (True, {}, True),
        (True, {"add_bos_token": True}, True),  # said twice, still once
        (False, {"add_bos_token": True}, True),
        (False, {}, False),
        (False, {"add_bos_token": False}, False),
        (True, {"add_bos_token": False}, True),  # tokenizer.json decides, as in Transformers 5
        (False, {"add_bos_token": True, "bos_token": None}, False),
        (False, {"add_bos_token": True, "bos_token": {"content": "<s>", "lstrip": False}}, True),
    ],
)
def test_bos_stands_in_front_exactly_once_or_never(
    save: Save, kind: str, adds_bos: bool, config: dict[str, object], expected: bool
) -> None:
    tokenizer = Tokenizer.open(save(kind, adds_bos=adds_bos, **config))
    bos = tokenizers.Tokenizer.from_file(str(tokenizer._folder / "tokenizer.json")).token_to_id("<s>")
    assert tokenizer.bos_id == (bos if expected else None)
    for text in ("the", "", "<s>the", " the"):
        assert tokenizer.encode(text).count(bos) == (1 if expected or "<s>" in text else 0)
        assert tokenizer.encode(text, bos=False).count(bos) == text.count("<s>")
        if expected:
            assert tokenizer.encode(text)[0] == bos


def test_bos_only_in_special_tokens_map_is_found(save: Save) -> None:
    folder = save(adds_bos=False, special={"bos_token": "<s>"})
    (folder / "tokenizer_config.json").write_text('{"add_bos_token": true}')
    known = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    assert Tokenizer.open(folder).bos_id == known.token_to_id("<s>")


def test_an_eos_the_post_processor_puts_behind_is_not_a_bos_and_is_not_added(save: Save) -> None:
    tokenizer = Tokenizer.open(save(template=["$A", "</s>"]))
    assert tokenizer.bos_id is None
    assert tokenizer.eos_ids[0] not in tokenizer.encode("the")
    both = Tokenizer.open(save(template=["<s>", "$A", "</s>"]))
    assert both.encode("the") == [both.bos_id, *tokenizer.encode("the")]


def test_two_tokens_in_front_are_refused(save: Save) -> None:
    with pytest.raises(Unsupported, match=r"puts 2 tokens in front of every text \(<s> <\|end\|>\)"):
        Tokenizer.open(save(template=["<s>", "<|end|>", "$A"]))


def test_truncation_and_padding_left_in_the_file_do_not_apply(save: Save) -> None:
    folder = save()
    core = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    core.enable_truncation(4)
    core.enable_padding(length=64)
    core.save(str(folder / "tokenizer.json"))
    tokenizer = Tokenizer.open(folder)
    assert tokenizer.decode(tokenizer.encode("one two three")) == "one two three"
    assert len(tokenizer.encode("one")) == 4


@pytest.mark.parametrize(
    ("generation", "expected"),
    [
        (None, ["</s>"]),
        ({}, ["</s>"]),
        ({"eos_token_id": "</s>"}, ["</s>"]),
        ({"eos_token_id": ["<|end|>", "</s>"]}, ["<|end|>", "</s>"]),
        ({"eos_token_id": "<|end|>"}, ["<|end|>", "</s>"]),
    ],
)
def test_every_end_of_text_is_known(save: Save, generation: dict[str, object] | None, expected: list[str]) -> None:
    core = tokenizers.Tokenizer.from_file(str(save() / "tokenizer.json"))
    if generation and "eos_token_id" in generation:
        given = generation["eos_token_id"]
        ids = [core.token_to_id(t) for t in given] if isinstance(given, list) else core.token_to_id(given)
        generation = {"eos_token_id": ids}
    tokenizer = Tokenizer.open(save(generation=generation))
    assert tokenizer.eos_ids == tuple(core.token_to_id(t) for t in expected)


def test_an_eos_that_is_no_id_is_refused(save: Save) -> None:
    with pytest.raises(InputCorrupt, match=r"generation_config\.json: eos_token_id 'x' is no token id\."):
        Tokenizer.open(save(generation={"eos_token_id": ["x"]}))


def test_vocab_size_counts_up_to_the_largest_id(save: Save) -> None:
    tokenizer = Tokenizer.open(save())
    assert tokenizer.vocab_size == 1 + max(tokenizer._core.get_vocab().values())
    assert tokenizer.decode([tokenizer.vocab_size, tokenizer.vocab_size + 1000]) == ""


@pytest.mark.parametrize("kind", KINDS)
@quick
@given(text=st.text(alphabet=st.sampled_from("the lo the  é日本😀👩‍🚀\n\ufffd"), max_size=40))
def test_streaming_gives_what_decoding_gives(save: Save, kind: str, text: str) -> None:
    tokenizer = Tokenizer.open(save(kind))
    ids = tokenizer.encode(text)
    stream = tokenizer.stream()
    pieces = [stream.put(i) for i in ids]
    tail = stream.flush()
    assert "".join(pieces) + tail == tokenizer.decode(ids) == tokenizer._core.decode(ids) == text
    if "\ufffd" not in text:
        assert all("\ufffd" not in piece for piece in pieces)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("skip", [True, False])
@quick
@given(ids=st.lists(st.integers(0, 272), max_size=60))
def test_streaming_any_ids_gives_what_decoding_gives(save: Save, kind: str, skip: bool, ids: list[int]) -> None:
    tokenizer = Tokenizer.open(save(kind))
    stream = tokenizer.stream(skip_special=skip)
    streamed = "".join([*map(stream.put, ids), stream.flush()])
    assert streamed == tokenizer.decode(ids, skip_special=skip)
    assert stream.flush() == ""


@pytest.mark.parametrize("kind", KINDS)
def test_a_character_comes_out_whole_and_at_once(save: Save, kind: str) -> None:
    tokenizer = Tokenizer.open(save(kind))
    stream = tokenizer.stream()
    pieces = [stream.put(i) for i in tokenizer.encode("日😀", bos=False)]
    assert [p for p in pieces if p] == ["日", "😀"]
    assert pieces[-1] == "😀"  # not held back until something follows


def test_a_character_cut_short_ends_as_a_replacement(save: Save) -> None:
    tokenizer = Tokenizer.open(save())
    ids = tokenizer.encode("a😀", bos=False)[:-1]
    stream = tokenizer.stream()
    assert "".join(map(stream.put, ids)) == "a"
    assert stream.flush() == "\ufffd"


def test_a_special_token_in_the_middle_keeps_the_space_behind_it(save: Save) -> None:
    tokenizer = Tokenizer.open(save("sentencepiece"))
    the = tokenizer.encode("the", bos=False)
    stream = tokenizer.stream()
    ids = [*the, tokenizer.eos_ids[0], *the]
    assert "".join(map(stream.put, ids)) == tokenizer.decode(ids) == "the the"
    assert tokenizer.decode(ids, skip_special=False) == "the</s> the"


def test_numpy_ids_decode_and_negative_ones_do_not(save: Save) -> None:
    tokenizer = Tokenizer.open(save())
    ids = np.array(tokenizer.encode("the"), dtype=np.int32)
    assert tokenizer.decode(ids) == "the"  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"^ids to decode: -1 is no token id\. Ids count from 0\.$"):
        tokenizer.decode([-1])


def test_long_and_ill_formed_texts_are_refused(save: Save, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = Tokenizer.open(save())
    with pytest.raises(ConfigError, match="half of a surrogate pair"):
        tokenizer.encode("\ud800")
    monkeypatch.setattr(module, "MAX_CHARACTERS", 10)
    with pytest.raises(OutOfResource, match="text to tokenize: 11 characters, above the limit of 10"):
        tokenizer.encode("x" * 11)


def test_missing_and_broken_files_say_so(save: Save, tmp_path: Path) -> None:
    with pytest.raises(InputMissing, match=r"tokenizer\.json is not there"):
        Tokenizer.open(tmp_path / "nowhere")
    folder = save()
    for name, bad, said in [
        ("generation_config.json", "[1]", "not a JSON object"),
        ("tokenizer_config.json", "[" * 100_000, "not JSON"),
        ("special_tokens_map.json", "{", "not JSON"),
        ("tokenizer.json", '{"version": 1}', "not a tokenizer"),
        ("tokenizer.json", "", "not a tokenizer"),
    ]:
        (folder / name).write_text(bad)
        with pytest.raises(InputCorrupt, match=f"{name}: {said}"):
            Tokenizer.open(folder)
    (folder / "tokenizer.json").write_bytes(b'{"\xff')
    with pytest.raises(InputCorrupt, match="not UTF-8 at byte 2"):
        Tokenizer.open(folder)


def test_the_template_file_wins_over_the_config(save: Save) -> None:
    folder = save(chat_template="config {{ bos_token }}")
    assert Tokenizer.open(folder).render_chat([]) == "config <s>"
    (folder / "chat_template.jinja").write_text("file")
    assert Tokenizer.open(folder).render_chat([]) == "file"
    named = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": "yes"}]
    (folder / "chat_template.jinja").unlink()
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": named}))
    assert Tokenizer.open(folder).render_chat([]) == "yes"


def test_a_model_without_template_is_not_given_another(save: Save) -> None:
    with pytest.raises(ConfigError, match=r"this model has no chat template\. Add chat_template\.jinja to the folder"):
        Tokenizer.open(save()).render_chat([{"role": "user", "content": "hi"}])


def test_a_rendered_bos_is_not_doubled(save: Save) -> None:
    tokenizer = Tokenizer.open(save(jinja="{{ bos_token }}{{ messages[0].content }}"))
    ids = tokenizer.encode(tokenizer.render_chat([{"role": "user", "content": "the"}]))
    assert ids.count(tokenizer.bos_id or -1) == 1


@pytest.mark.parametrize("template", [["<s>", "$A", "</s>"], ["<s>", "$A"], ["$A", "</s>"]])
def test_a_text_for_an_encoder_has_what_the_model_puts_around_it_and_loses_its_own_end(
    save: Save, template: list[str]
) -> None:
    tokenizer = Tokenizer.open(save(template=template))
    core = tokenizers.Tokenizer.from_file(str(tokenizer._folder / "tokenizer.json"))
    assert tokenizer.whole("the oak", 99) == core.encode("the oak").ids
    assert tokenizer.whole("the oak", 4) == core.encode("the oak"[: {3: 4, 2: 5}[len(template)]]).ids


def test_data_needs_no_torch() -> None:
    code = "import sys, lilliput.data.tokenizer, lilliput.data.streams, lilliput.data.documents; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
