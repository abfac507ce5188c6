"""The public engine on a complete artifact: text, stops, streams, limits and messages."""

import signal
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lilliput.artifact.read import Artifact
from lilliput.core.errors import ConfigError, OutOfResource, Unsupported
from lilliput.engine import Engine, Sampling, engine, load, machine, native
from lilliput.engine.native import arrays
from support.small_artifact import llama_spec, small_plan, write_small_artifact

WARM = Sampling(temperature=2.0, seed=3)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("engine") / "small.lilliput"
    write_small_artifact(path)
    return path


@pytest.fixture(scope="module")
def small(folder: Path) -> Engine:
    return load(folder, threads=2)


def test_an_engine_says_what_it_is(small: Engine, folder: Path) -> None:
    assert (small.bits, small.context, small.threads) == ((2, 3, 4, 8), 128, 2)
    assert small.spec == llama_spec()
    assert load(folder, context=50).context == 50
    assert load(folder, context=500).context == 128
    assert Engine(Artifact.open(folder)).bits == small.bits


def test_logits_are_one_row_a_token_and_each_width_answers_differently(small: Engine) -> None:
    tokens = np.array([257, 10, 20, 30], dtype=np.int32)
    rows = {bits: small.logits(tokens, bits=bits) for bits in small.bits}
    assert all(row.shape == (4, 261) and row.dtype == np.float32 for row in rows.values())
    assert np.array_equal(rows[8], small.logits(tokens))
    assert np.array_equal(rows[3], small.logits(tokens.tolist(), bits=3))
    assert not np.array_equal(rows[2], rows[3])


def test_a_narrow_copy_serves_the_same_bits(small: Engine, folder: Path, tmp_path: Path) -> None:
    for file in folder.iterdir():
        if file.name not in ("bits-4.safetensors", "bits-8.safetensors"):
            (tmp_path / file.name).write_bytes(file.read_bytes())
    narrow = load(tmp_path)
    assert narrow.bits == (2, 3)
    assert np.array_equal(narrow.logits([1, 2, 3], bits=3), small.logits([1, 2, 3], bits=3))
    assert narrow.weight_bytes(3) == small.weight_bytes(3)


def test_text_gets_one_bos_and_ids_are_taken_as_they_are(small: Engine) -> None:
    assert small.generate("abc", max_new_tokens=1).prompt_tokens == 4
    ids = small.tokenizer.encode("abc")
    one, other = (small.generate(p, max_new_tokens=9, bits=3, sampling=WARM) for p in ("abc", ids))
    assert (one.tokens, one.text) == (other.tokens, other.text)
    assert one.finish_reason == "length"
    assert one.prefill_s > 0
    assert one.decode_s > 0


def test_pieces_joined_are_the_text_and_the_text_is_the_tokens(small: Engine) -> None:
    pieces: list[str] = []
    done = small.generate("Once", max_new_tokens=60, sampling=WARM, on_token=pieces.append)
    assert "".join(pieces) == done.text
    assert done.text == small.tokenizer.decode(done.tokens)
    assert len(pieces) >= len(done.tokens)


def test_a_stop_string_is_never_shown(small: Engine) -> None:
    free = small.generate("Once", max_new_tokens=60, sampling=WARM)
    assert "\ufffd" not in free.text[10:14] or len(free.text) > 14
    stop = free.text[10:14]
    pieces: list[str] = []
    stopped = small.generate(
        "Once", max_new_tokens=60, sampling=WARM, stop=["never there", stop], on_token=pieces.append
    )
    assert stopped.text == free.text[: free.text.index(stop)] == "".join(pieces)
    assert stopped.finish_reason == "stop"
    assert free.tokens[: len(stopped.tokens)] == stopped.tokens
    assert small.generate("Once", max_new_tokens=60, sampling=WARM, stop=stop).text == stopped.text


def test_text_held_back_for_a_stop_that_never_comes_is_given_at_the_end(small: Engine) -> None:
    free = small.generate("Once", max_new_tokens=20, sampling=WARM)
    same = small.generate("Once", max_new_tokens=20, sampling=WARM, stop=[free.text[-3:] + "\x00never"])
    assert same.text == free.text


def test_an_end_of_sequence_token_stops_and_is_not_shown(small: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    free = small.generate("Once", max_new_tokens=20, sampling=WARM)
    monkeypatch.setattr(small.tokenizer, "eos_ids", (free.tokens[7],))
    first = free.tokens.index(free.tokens[7])
    done = small.generate("Once", max_new_tokens=20, sampling=WARM)
    assert (done.tokens, done.finish_reason) == (free.tokens[:first], "stop")


def test_false_cancels_and_none_goes_on(small: Engine) -> None:
    seen: list[str] = []

    def listen(piece: str) -> bool | None:
        seen.append(piece)
        return False if len(seen) == 5 else None

    done = small.generate("Once", max_new_tokens=20, sampling=WARM, on_token=listen)
    assert (len(done.tokens), done.finish_reason, done.text) == (5, "cancelled", "".join(seen))


def test_what_a_listener_raises_comes_through(small: Engine) -> None:
    def fail(piece: str) -> None:
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        small.generate("Once", on_token=fail)


def test_a_batch_answers_as_each_alone(small: Engine) -> None:
    prompts: list[Any] = ["a", "Once upon a time", [1, 2, 3]]
    heard: dict[int, str] = {0: "", 1: "", 2: ""}

    def listen(index: int, piece: str) -> bool | None:
        heard[index] += piece
        return False if index == 0 and len(heard[0]) > 3 else None

    together = small.generate_batch(prompts, max_new_tokens=25, bits=2, sampling=WARM, on_token=listen)
    assert [done.text for done in together] == list(heard.values())
    assert together[0].finish_reason == "cancelled"
    for prompt, done in zip(prompts[1:], together[1:], strict=True):
        alone = small.generate(prompt, max_new_tokens=25, bits=2, sampling=WARM)
        assert (alone.tokens, alone.text) == (done.tokens, done.text)
    assert small.generate_batch([]) == []


def test_an_answer_ends_with_the_context(small: Engine) -> None:
    done = small.generate([5] * 120, max_new_tokens=100)
    assert (len(done.tokens), done.finish_reason) == (8, "length")


def test_threads_may_share_an_engine(small: Engine) -> None:
    expected = small.generate("Once", max_new_tokens=30, sampling=WARM).tokens
    results: list[tuple[int, ...]] = []
    workers = [
        threading.Thread(target=lambda: results.append(small.generate("Once", max_new_tokens=30, sampling=WARM).tokens))
        for _ in range(4)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert results == [expected] * 4


def test_an_interrupt_ends_a_long_answer(folder: Path, tmp_path: Path) -> None:
    spec = llama_spec(layers=8).model_copy(update={"context": 100_000})
    write_small_artifact(tmp_path / "long", spec)
    long = load(tmp_path / "long", threads=1)
    threading.Timer(0.3, signal.raise_signal, [signal.SIGINT]).start()
    with pytest.raises(KeyboardInterrupt):
        long.generate([1], max_new_tokens=99_000)
    assert long.generate([1], max_new_tokens=2).tokens  # and the engine goes on


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": 5}, r"^bits: 5 bits are not in this artifact, which has 2, 3, 4, 8\. Ask for 2 or 3 or 4 or 8\.$"),
        ({"max_new_tokens": 0}, r"^max_new_tokens: 0 is no answer\. Give 1 or more\.$"),
        ({"stop": ["a", ""]}, r"^stop: an empty string would stop every text at once\. Leave it out\.$"),
        ({"prompt": []}, r"^prompt: \(0,\) of .* is not a list of one or more token ids\. "),
        ({"prompt": [0.5]}, r"^prompt: \(1,\) of float64 is not a list of one or more token ids\. "),
        ({"prompt": [1, 261]}, r"^prompt: token 261 is outside the vocabulary of 261\. "),
        ({"prompt": [-1]}, r"^prompt: token -1 is outside the vocabulary of 261\. "),
    ],
    ids=lambda v: None if isinstance(v, str) else next(iter(v)),
)
def test_options_without_sense_are_refused_with_a_fix(small: Engine, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        small.generate(**{"prompt": "x"} | options)


def test_what_does_not_fit_is_refused_with_a_fix(small: Engine, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fits = r"^prompt: 128 tokens do not fit the context of 128 with room for an answer\. Shorten it\.$"
    with pytest.raises(OutOfResource, match=fits):
        small.generate([1] * 128)
    with pytest.raises(OutOfResource, match=r"^tokens: 129 tokens exceed the context of 128\. "):
        small.logits([1] * 129)
    with pytest.raises(ConfigError, match=r"^context: 0 tokens hold nothing\. Give 2 or more\.$"):
        load(folder, context=0)
    with pytest.raises(ConfigError, match=r"^threads: 0 threads cannot work\. Give 1 or more\.$"):
        load(folder, threads=0)
    monkeypatch.setattr(engine, "available_bytes", lambda: 1000)
    with pytest.raises(OutOfResource, match=r"^3 tokens of context: .* GB are free\. Ask for fewer tokens or prompts"):
        small.generate([1], max_new_tokens=2)


def test_an_artifact_without_widths_answers_in_float(tmp_path: Path) -> None:
    write_small_artifact(tmp_path / "float", plan=small_plan(llama_spec(), (), float_dtype="BF16"))
    plain = load(tmp_path / "float")
    assert plain.bits == ()
    assert plain.logits([1, 2]).shape == (2, 261)
    assert plain.weight_bytes() == sum(t.data.nbytes for t in plain._floats.values())
    with pytest.raises(ConfigError, match=r"^bits: 4 bits .* has no quantized weights\. Leave the width out\.$"):
        plain.logits([1], bits=4)


def test_weight_bytes_count_what_a_width_reads(small: Engine) -> None:
    spec = small.spec
    weights = 0
    for layer in range(spec.num_layers):
        for out, columns in spec.linears(layer).values():
            tiles = -(-out // 16)
            # 3 bits of codes in tiles of 16 x 32; a float16 scale and zero for each group of 32
            weights += tiles * -(-columns // 32) * 64 * 3 + 2 * tiles * 16 * -(-columns // 32) * 2
    floats = 4 * (spec.vocab_size * 64 + (2 * spec.num_layers + 1) * 64)
    assert small.weight_bytes(3) == weights + floats
    page = spec.num_layers * spec.num_kv_heads * 64 * 32 * 4
    assert (small.kv_bytes(1), small.kv_bytes(64), small.kv_bytes(65)) == (page, page, 2 * page)


def test_missing_kernels_are_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> Any:
        raise ImportError("no such file")

    arrays.kernels.cache_clear()
    monkeypatch.setattr(arrays, "import_module", absent)
    with pytest.raises(Unsupported, match=r"^lilliput\.engine: the compiled kernels do not load \(no such file\)\. "):
        native.variants("norm")


def test_cores_and_memory_heed_the_control_group(tmp_path: Path) -> None:
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal: 9 kB\nMemAvailable: 8 kB\n")
    assert machine.available_bytes(tmp_path, meminfo) == 8192
    assert machine.available_bytes(tmp_path, tmp_path / "absent") is None
    (tmp_path / "memory.max").write_text("5000\n")
    (tmp_path / "memory.current").write_text("1000\n")
    assert machine.available_bytes(tmp_path, meminfo) == 4000
    (tmp_path / "cpu.max").write_text("max 100000\n")
    free = machine.usable_cores(tmp_path)
    (tmp_path / "cpu.max").write_text("100000 100000\n")
    assert machine.usable_cores(tmp_path) == 1 <= free
