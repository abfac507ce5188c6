from lilliput.artifact.consistency import inconsistencies
from lilliput.artifact.entries import FloatEntry, QuantEntry
from lilliput.core.spec import EncoderSpec, Norm, TokenInputs


def encoder() -> tuple[EncoderSpec, dict[str, FloatEntry]]:
    """One post-norm layer, and every tensor it needs, in float."""
    spec = EncoderSpec(
        kind="encoder", family="bert", inputs=TokenInputs(vocab_size=20, types=2), hidden_size=8, num_layers=1,
        num_heads=2, intermediate_size=12, context=16, norm=Norm(kind="layer", eps=1e-12), activation="gelu",
        norm_first=False, embed_norm=True, final_norm=False, pooling="mean",
    )  # fmt: skip
    shapes: dict[str, tuple[int, ...]] = {f"{name}.weight": shape for name, shape in spec.matrices().items()}
    shapes |= {"embed_positions.weight": (16, 8), "embed_types.weight": (2, 8), "embed_norm.weight": (8,)}
    shapes |= {f"layers.0.{part}_post_norm.{kind}": (8,) for part in ("attn", "mlp") for kind in ("weight", "bias")}
    return spec, {name: FloatEntry(dtype="F32", shape=shape) for name, shape in shapes.items()}


def test_an_encoder_is_whole_or_refused() -> None:
    spec, floats = encoder()
    assert list(inconsistencies(spec, {}, floats, ())) == []
    for absent in ("embed_types.weight", "layers.0.mlp_post_norm.weight", "layers.0.attn.v_proj.weight"):
        left = {name: entry for name, entry in floats.items() if name != absent}
        assert any(absent.removesuffix(".weight") in problem for problem in inconsistencies(spec, {}, left, ()))
    strange = floats | {"lm_head.weight": FloatEntry(dtype="F32", shape=(20, 8))}
    assert list(inconsistencies(spec, {}, strange, ())) == ["lm_head.weight is stored but the spec has no such tensor"]
    wrong = floats | {"embed_norm.weight": FloatEntry(dtype="F32", shape=(9,))}
    assert list(inconsistencies(spec, {}, wrong, ())) == ["embed_norm.weight is (9,) but the spec says (8,)"]
    many = spec.model_copy(update={"num_layers": 10**9})
    assert list(inconsistencies(many, {}, floats, ())) == [
        f"spec has {10**9} layers but there are {len(floats)} tensors"
    ]


def test_only_matrices_of_blocks_have_outliers() -> None:
    spec, floats = encoder()
    left = {name: entry for name, entry in floats.items() if name != "embed_tokens.weight"}
    plain = QuantEntry(out=20, columns=8, bits=(4,), group_size=-1, sym=False)
    assert list(inconsistencies(spec, {"embed_tokens": plain}, left, (4,))) == []
    kept = plain.model_copy(update={"outliers": 3})
    assert list(inconsistencies(spec, {"embed_tokens": kept}, left, (4,))) == [
        "embed_tokens has outliers, which only the matrices of blocks have"
    ]
