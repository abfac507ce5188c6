"""The cache, long contexts, prefill in chunks, and which bytes of the artifact become resident."""

import mmap
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from lilliput.artifact.read import Artifact
from lilliput.core.errors import ConfigError, OutOfResource
from lilliput.engine import Engine, Sampling, engine, load, native
from support.small_artifact import llama_spec, small_plan, write_small_artifact

WARM = Sampling(temperature=2.0, seed=3)
LONG = llama_spec(layers=1).model_copy(update={"context": 32768})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("runtime") / "long.lilliput"
    write_small_artifact(path, LONG)
    return path


@pytest.fixture(scope="module", params=["float", "int8", "int4"])
def long(folder: Path, request: pytest.FixtureRequest) -> Engine:
    return load(folder, threads=2, kv=request.param)


def tokens_of(count: int, seed: int = 0) -> list[int]:
    return [int(t) for t in np.random.default_rng(seed).integers(0, 261, count)]


def test_a_prompt_of_thousands_of_tokens_is_read_in_chunks_that_are_told(long: Engine) -> None:
    heard: list[tuple[int, int]] = []
    done = long.generate(tokens_of(4000), max_new_tokens=5, on_prefill=lambda *now: heard.append(now))
    assert len(done.tokens) == 5
    assert [total for _, total in heard] == [4000] * len(heard)
    counts = [count for count, _ in heard]
    assert counts == sorted(set(counts))
    assert counts[-1] == 4000
    assert len(counts) > 10


def test_how_a_prompt_is_cut_does_not_change_a_bit(long: Engine) -> None:
    """Prefilled alone, with others, and token by token: the same continuation."""
    prompts = [tokens_of(count, count) for count in (700, 3, 130, 1, 65)]
    heard: list[tuple[int, int]] = []
    together = long.generate_batch(
        prompts, max_new_tokens=12, bits=3, sampling=WARM, on_prefill=lambda *now: heard.append(now)
    )
    assert heard[-1] == (899, 899)
    for prompt, done in zip(prompts, together, strict=True):
        alone = long.generate(prompt, max_new_tokens=12, bits=3, sampling=WARM)
        assert (alone.tokens, alone.text) == (done.tokens, done.text)
    greedy = long.generate(prompts[2], max_new_tokens=40)
    path = [*prompts[2], *greedy.tokens]
    best = [int(row.argmax()) for row in long.logits(path)[len(prompts[2]) - 1 : -1]]
    assert best == list(greedy.tokens)


def test_threads_and_variants_agree_on_a_long_prompt(folder: Path) -> None:
    artifact = Artifact.open(folder)
    floats = {name: artifact.tensor(name) for name in artifact.manifest.floats}
    linears = {name: artifact.linear(name) for name in artifact.quantized}
    tokens = tokens_of(600)
    for window in (0, 100):
        spec = LONG.model_copy(update={"windows": (window,)})
        for kv in ("float", "int8", "int4"):
            made = [
                native.Model(spec, floats, linears, threads=threads, kv=kv, variant=variant).logits(tokens, 2)
                for variant in native.variants("attention")
                for threads in (1, 3)
            ]
            assert all(np.array_equal(rows, made[0]) for rows in made)


def test_int8_keys_and_values_are_close_and_a_quarter_of_the_size(folder: Path) -> None:
    plain, small = load(folder), load(folder, kv="int8")
    exact, rounded = (e.logits(tokens_of(300)).astype(np.float64) for e in (plain, small))
    assert not np.array_equal(exact, rounded)
    noise = 10 * np.log10(np.square(exact).sum() / np.square(exact - rounded).sum())
    assert noise > 30  # dB; rounding to 8 bits with a scale a head and token leaves about 40
    # one page of 64 positions: 2 heads of 16 channels, keys and values, and for int8 a scale of 4 bytes each
    assert plain.kv_bytes(64) == 64 * 2 * 2 * 16 * 4
    assert small.kv_bytes(65) == 2 * 64 * 2 * 2 * (16 + 4)
    with pytest.raises(
        ConfigError, match=r"^kv: 'int3' is no way to keep keys and values\. Give \"float\", \"int8\" or \"int4\""
    ):
        load(folder, kv="int3")  # type: ignore[arg-type]


def test_int4_takes_exactly_the_groups_that_are_rounded_and_a_page_of_float(folder: Path) -> None:
    plain, small = load(folder), load(folder, kv="int4")
    # two heads of 16 channels; for each group of 32 positions codes in 4 bits, a float16 scale and minimum for each
    # channel of keys, and for each position of values, whose 16 channels take the bytes of a block of 32
    group = 2 * ((32 * 16 // 2 + 4 * 16) + 32 * (32 // 2 + 4))
    for tokens in (1, 64, 65, 96, 97, 160, 161, 1000, 30000):
        rounded = max(0, (tokens - 1) // 32) if tokens > 64 else 0
        assert small.kv_bytes(tokens) == plain.kv_bytes(64) + -(-rounded // 2) * 2 * group
    assert small.kv_bytes(0) == 0
    assert small.kv_bytes(30000) < 0.24 * plain.kv_bytes(30000)  # 0.16 with heads of 32 channels or more


def test_int4_is_close_and_until_something_is_rounded_the_same(folder: Path) -> None:
    plain, small = load(folder), load(folder, kv="int4")
    tokens = tokens_of(400)
    exact, rounded = (e.logits(tokens).astype(np.float64) for e in (plain, small))
    assert np.array_equal(exact[:64], rounded[:64])
    assert not (exact[64:] == rounded[64:]).all(axis=1).any()
    noise = 10 * np.log10(np.square(exact[64:]).sum() / np.square(exact[64:] - rounded[64:]).sum())
    assert noise > 12  # dB


@pytest.mark.parametrize("window", [0, 50])
def test_int4_rounds_by_position_however_the_tokens_come(folder: Path, window: int) -> None:
    """Prefixes alone, and token after token, end in the logits of the whole, which is read 256 at a time."""
    artifact = Artifact.open(folder)
    floats = {name: artifact.tensor(name) for name in artifact.manifest.floats}
    linears = {name: artifact.linear(name) for name in artifact.quantized}
    spec = LONG.model_copy(update={"windows": (window,)})
    model = native.Model(spec, floats, linears, threads=2, kv="int4")
    tokens = tokens_of(420)
    whole = model.logits(tokens, 4)
    for count in (1, 31, 32, 33, 63, 64, 65, 96, 97, 128, 200, 257, 300):
        assert np.array_equal(model.logits(tokens[:count], 4), whole[:count])
    options = {"bits": 4, "context": 1000, "eos": [], "sampling": Sampling()}
    (path, *_), *_ = model.generate([tokens[:29]], max_new_tokens=200, **options)
    best = model.logits([*tokens[:29], *path], 4).argmax(axis=1)
    assert path == best[28:-1].tolist()


def test_a_cache_that_does_not_fit_is_refused_with_numbers(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, middle, small = (load(folder, kv=kv) for kv in ("float", "int8", "int4"))
    monkeypatch.setattr(engine, "available_bytes", lambda: 1_500_000)
    says = r'^30010 tokens of context: 0\.01 GB .* 0\.00 GB are free\. Ask for fewer .*kv="int8" or "int4", or free'
    with pytest.raises(OutOfResource, match=says):
        plain.generate([1] * 10, max_new_tokens=30000)
    with pytest.raises(OutOfResource, match=r'at a time, open the artifact with kv="int4", or free some memory\.$'):
        middle.generate([1] * 10, max_new_tokens=30000)
    with pytest.raises(OutOfResource, match=r"at a time, or free some memory\.$"):
        small.generate([1] * 10, max_new_tokens=30000)
    assert small.generate([1] * 10, max_new_tokens=5).tokens


def test_false_gives_a_prompt_up(long: Engine) -> None:
    calls: list[int] = []

    def listen(done: int, total: int) -> bool:
        calls.append(done)
        return done < 1000

    done = long.generate(tokens_of(30000), max_new_tokens=5, on_prefill=listen)
    assert (done.tokens, done.text, done.finish_reason) == ((), "", "cancelled")
    assert 1000 <= calls[-1] < 2000
    assert long.generate([1], max_new_tokens=3).tokens  # and the engine goes on


def test_what_a_prefill_listener_raises_comes_through(long: Engine) -> None:
    def fail(done: int, total: int) -> None:
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        long.generate([1, 2], on_prefill=fail)


def test_an_interrupt_ends_a_prefill(long: Engine) -> None:
    threading.Timer(0.3, signal.raise_signal, [signal.SIGINT]).start()
    with pytest.raises(KeyboardInterrupt):
        long.generate(tokens_of(32000), max_new_tokens=1)


def test_more_threads_than_cores_and_work_still_answer(folder: Path) -> None:
    expected = load(folder, threads=1).generate([1, 2, 3], max_new_tokens=40, sampling=WARM).tokens
    for threads in (2, 5, 16):
        assert load(folder, threads=threads).generate([1, 2, 3], max_new_tokens=40, sampling=WARM).tokens == expected


RESIDENT = """
import sys
from pathlib import Path
from lilliput.engine import load

def resident():
    sizes, at = {}, ""
    for line in Path("/proc/self/smaps").read_text().splitlines():
        words = line.split()
        if "-" in words[0] and not words[0].endswith(":"):
            at = words[-1].rpartition("/")[2]
        elif words[0] == "Rss:":
            sizes[at] = sizes.get(at, 0) + int(words[1]) * 1024
    print(*(sizes.get(f"bits-{bits}.safetensors", 0) for bits in (2, 3, 8)))

engine = load(sys.argv[1], threads=2)
for bits in (2, 8):
    engine.generate("Once", max_new_tokens=5, bits=bits)
    engine.logits([1] * 100, bits=bits)
    resident()
"""


def _python(code: str, *arguments: object) -> str:
    """Run in a process of its own, which has not written the artifact, and return what it prints."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=True).stdout


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="asks the Linux kernel")
def test_a_narrow_width_never_touches_the_bytes_of_a_wider_one(tmp_path: Path) -> None:
    plan = small_plan(llama_spec(hidden=256, inter=512), ladders={"embed_tokens": (2, 3, 4, 8)})
    write_small_artifact(tmp_path / "a", plan=plan)
    narrow, wide = (list(map(int, line.split())) for line in _python(RESIDENT, tmp_path / "a").splitlines())
    assert narrow[0] >= (tmp_path / "a" / "bits-2.safetensors").stat().st_size // 2
    assert narrow[1:] == [0, 0]
    assert min(wide) > 0


@pytest.mark.skipif(not hasattr(mmap, "MADV_WILLNEED"), reason="the system takes no such advice")
def test_read_ahead_asks_for_the_tensors_of_a_width_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fresh, asked = load(folder), list[str]()
    for file in ("float.safetensors", *(f"bits-{bits}.safetensors" for bits in (2, 3, 4, 8))):
        container = fresh.artifact._container(file)
        monkeypatch.setattr(container, "read_ahead", asked.append)
    fresh.logits([1], bits=3)
    assert "layers.0.mlp.down_proj.plane.1" in asked
    assert "layers.0.mlp.down_proj.scale.3" in asked
    assert not {name for name in asked if name.endswith((".plane.2", ".plane.3", ".scale.2", ".scale.4", ".scale.8"))}
    before = len(asked)
    fresh.logits([1], bits=3)
    assert len(asked) == before


def test_workers_rest_between_calls(folder: Path) -> None:
    """A pool that spins would use up the core of somebody else."""
    code = (
        "import sys, time; from lilliput.engine import load; e = load(sys.argv[1], threads=4);"
        "e.generate([1], max_new_tokens=3); a = time.process_time(); time.sleep(0.5); print(time.process_time() - a)"
    )
    assert float(_python(code, folder)) < 0.05
