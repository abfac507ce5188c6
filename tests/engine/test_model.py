"""The whole decoder: nested weights against dequantized ones, and the answers that must not depend on anything."""

from collections.abc import Sequence

import numpy as np
import pytest

from lilliput.artifact.read import StoredLinear, StoredTensor
from lilliput.core.errors import InputCorrupt
from lilliput.core.spec import ModelSpec, Norm, Rotary
from lilliput.engine import Sampling, native
from support.small_artifact import llama_spec
from support.stored import random_linear, stored

GREEDY = Sampling()


def weights(
    spec: ModelSpec, bits: Sequence[int] = (2, 3, 4, 8), *, head_bits: Sequence[int] | None = None, dtype: str = "F32"
) -> tuple[dict[str, StoredTensor], dict[str, StoredLinear]]:
    """Random weights: block matrices nested, with biases; the embedding nested at `head_bits` or in float."""
    rng = np.random.default_rng(0)
    floats = {"final_norm.weight": stored(rng.uniform(0.5, 1.5, spec.hidden_size))}
    linears = {}
    for layer in range(spec.num_layers):
        for kind in ("attn_norm", "mlp_norm"):
            floats[f"layers.{layer}.{kind}.weight"] = stored(rng.uniform(0.5, 1.5, spec.hidden_size))
        for name, (out, columns) in spec.linears(layer).items():
            linears[name] = random_linear(rng, out, columns, bits, 48, spread=4 / columns**0.5)
            floats[f"{name}.bias"] = stored(0.1 * rng.standard_normal(out), dtype)
    if head_bits:
        linears["embed_tokens"] = random_linear(rng, spec.vocab_size, spec.hidden_size, head_bits, 16)
    else:
        floats["embed_tokens.weight"] = stored(rng.standard_normal((spec.vocab_size, spec.hidden_size)), dtype)
    return floats, linears


def dequantized(linears: dict[str, StoredLinear], bits: int) -> dict[str, StoredTensor]:
    return {f"{name}.weight": stored(linear.dequantize(bits)) for name, linear in linears.items()}


@pytest.mark.parametrize("head_bits", [None, (8,), (4, 8)])
def test_nested_weights_answer_as_their_dequantized_values(head_bits: tuple[int, ...] | None) -> None:
    spec = llama_spec()
    floats, linears = weights(spec, head_bits=head_bits)
    nested = native.Model(spec, floats, linears, threads=2)
    tokens = list(range(40, 80))
    for bits in (2, 3, 4, 8):  # a matrix with a ladder of its own runs at the next width it has
        plain = native.Model(spec, floats | dequantized(linears, bits), {}, threads=2)
        expected = plain.logits(tokens, 0)
        np.testing.assert_allclose(nested.logits(tokens, bits), expected, rtol=0, atol=2e-5 * np.abs(expected).max())


@pytest.mark.parametrize("dtype", ["F16", "BF16"])
def test_halves_answer_as_their_float32_values(dtype: str) -> None:
    spec = llama_spec()
    floats, linears = weights(spec, dtype=dtype)
    wide = {name: stored(tensor.to_float32()) for name, tensor in floats.items()}
    tokens = [5, 6, 7]
    same = native.Model(spec, wide, linears, threads=1).logits(tokens, 4)
    assert np.array_equal(native.Model(spec, floats, linears, threads=1).logits(tokens, 4), same)


def test_threads_and_variants_do_not_change_a_bit() -> None:
    spec = llama_spec()
    floats, linears = weights(spec, head_bits=(8,))
    tokens = [int(t) for t in np.random.default_rng(1).integers(0, 261, 100)]
    reference = native.Model(spec, floats, linears, threads=1, variant="reference").logits(tokens, 3)
    for variant in native.variants("matmul_nested"):
        for threads in (1, 2, 3):
            model = native.Model(spec, floats, linears, threads=threads, variant=variant)
            assert model.threads == threads
            assert np.array_equal(model.logits(tokens, 3), reference)


def greedy(model: native.Model, prompts: Sequence[Sequence[int]], count: int = 20, bits: int = 3) -> list[list[int]]:
    done = model.generate(prompts, bits=bits, max_new_tokens=count, context=1000, eos=(), sampling=GREEDY)
    return [tokens for tokens, *_ in done]


def test_decoding_one_by_one_is_prefill_bit_for_bit() -> None:
    """Longer than a prefill chunk and than a page of the cache, so every boundary is crossed."""
    spec = llama_spec().model_copy(update={"context": 1000})
    floats, linears = weights(spec)
    model = native.Model(spec, floats, linears, threads=2)
    prompt = [int(t) for t in np.random.default_rng(2).integers(0, 261, 250)]
    (answer,) = greedy(model, [prompt], 30)
    logits = model.logits(prompt + answer, 3)
    assert [int(row.argmax()) for row in logits[len(prompt) - 1 : -1]] == answer
    longer = model.logits((prompt + answer)[:270], 3)  # another cut into chunks
    assert np.array_equal(longer, logits[:270])


@pytest.mark.parametrize("sampling", [GREEDY, Sampling(temperature=1.5, top_p=0.9, repetition_penalty=1.2, seed=9)])
def test_neighbours_in_a_batch_do_not_change_a_token(sampling: Sampling) -> None:
    spec = llama_spec()
    floats, linears = weights(spec)
    model = native.Model(spec, floats, linears, threads=2)
    prompts = [[1, 2, 3], [200] * 37, [9], [1, 2, 3]]
    options = {"bits": 4, "max_new_tokens": 15, "context": 48, "eos": [77], "sampling": sampling}
    together = model.generate(prompts, **options)
    for prompt, (tokens, finish, *_) in zip(prompts, together, strict=True):
        assert model.generate([prompt], **options)[0][:2] == (tokens, finish)
    assert len(together[1][0]) <= 48 - 37


def test_a_window_hides_what_lies_before_it() -> None:
    spec = llama_spec(layers=1).model_copy(update={"windows": (4,)})
    floats, linears = weights(spec)
    model = native.Model(spec, floats, linears, threads=1)
    one, other = [1, 2, 3, 4, 5, 6, 7], [200, 100, 50, 4, 5, 6, 7]
    a, b = model.logits(one, 8), model.logits(other, 8)
    assert np.array_equal(a[-1], b[-1])  # the last token sees the last four
    assert not np.array_equal(a[-2], b[-2])


def test_learned_positions_and_rotary_scale_change_the_answer_where_they_should() -> None:
    spec = llama_spec()
    floats, linears = weights(spec)
    rotary = spec.rotary
    assert rotary is not None
    scaled = spec.model_copy(update={"rotary": Rotary(dim=rotary.dim, inv_freq=rotary.inv_freq, scale=1.5)})
    plain, louder = (native.Model(s, floats, linears, threads=1).logits([1, 2], 8) for s in (spec, scaled))
    assert not np.array_equal(plain[1], louder[1])
    learned = spec.model_copy(update={"rotary": None, "position_offset": 2})
    table = stored(np.random.default_rng(3).standard_normal((12, spec.hidden_size)))
    model = native.Model(learned, floats | {"embed_positions.weight": table}, linears, threads=1)
    assert model.logits(list(range(10)), 8).shape == (10, 261)
    with pytest.raises(ValueError, match="position 10 has no row"):
        model.logits(list(range(11)), 8)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layers.1.mlp_norm.weight": None}, r"layers\.1\.mlp_norm\.weight is missing\. "),
        ({"final_norm.weight": stored(np.ones(3))}, r"final_norm has 3 elements instead of 64"),
        ({"embed_tokens.weight": stored(np.ones((261, 32)))}, r"embed_tokens is \(261, 32\) instead of \(261, 64\)"),
        ({"layers.0.attn.q_proj.bias": stored(np.ones(3))}, r"layers\.0\.attn\.q_proj\.bias has 3 elements instead"),
    ],
    ids=["missing", "norm", "matrix", "bias"],
)
def test_weights_that_do_not_fit_the_spec_are_named(change: dict[str, StoredTensor | None], message: str) -> None:
    spec = llama_spec()
    floats, linears = weights(spec)
    given = {name: tensor for name, tensor in (floats | change).items() if tensor is not None}
    with pytest.raises(InputCorrupt, match=rf"^weights of a llama model: {message}"):
        native.Model(spec, given, linears, threads=1)


def test_nan_is_an_error_and_not_a_token() -> None:
    spec = llama_spec(layers=1).model_copy(update={"norm": Norm(kind="rms", eps=1e-5)})
    floats, linears = weights(spec)
    floats["final_norm.weight"] = stored(np.full(spec.hidden_size, np.nan))
    with pytest.raises(InputCorrupt, match=r"^logits: the model computes NaN for this prompt\. "):
        greedy(native.Model(spec, floats, linears, threads=1), [[1]])
