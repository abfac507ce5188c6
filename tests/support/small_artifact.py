"""A complete artifact of random numbers, in milliseconds and without torch: for tests of whatever reads one."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

from lilliput.artifact.entries import FloatEntry, QuantEntry, SourceInfo
from lilliput.artifact.publish import partial_of, publish
from lilliput.artifact.schema import Manifest
from lilliput.artifact.stored import StoredOutliers
from lilliput.artifact.write import ArtifactWriter, Plan
from lilliput.core.spec import ModelSpec, Norm, Rotary
from lilliput.numerics.packing import zero_step

BYTES = pre_tokenizers.ByteLevel.alphabet()


def llama_spec(*, layers: int = 2, hidden: int = 64, heads: int = 4, kv_heads: int = 2, inter: int = 112) -> ModelSpec:
    """A Llama of a few thousand weights; 261 tokens and 112 channels leave the last tiles partly empty."""
    dim = hidden // heads
    return ModelSpec(
        family="llama",
        vocab_size=261,
        hidden_size=hidden,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=dim,
        intermediate_size=inter,
        context=128,
        norm=Norm(kind="rms", eps=1e-5),
        activation="silu",
        rotary=Rotary(dim=dim, inv_freq=tuple(float(10000.0 ** (-2 * j / dim)) for j in range(dim // 2))),
        attn_scale=dim**-0.5,
        windows=(0,) * layers,
        tied_head=True,
    )


def write_tokenizer(folder: Path) -> None:
    """Byte-level tokenizer of 261 tokens: the bytes, then <unk>, <s>, </s> and two more special ones."""
    special = ["<unk>", "<s>", "</s>", "<|user|>", "<|assistant|>"]
    vocab = {token: index for index, token in enumerate(sorted(BYTES) + special)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", vocab["<s>"])]
    )
    tokenizer.add_special_tokens(special)
    (folder / "tokenizer.json").write_text(tokenizer.to_str(pretty=False))
    (folder / "tokenizer_config.json").write_text(
        '{"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "add_bos_token": true, '
        '"tokenizer_class": "PreTrainedTokenizerFast"}\n'
    )
    (folder / "config.json").write_text(
        f'{{"model_type": "llama", "bos_token_id": {vocab["<s>"]}, "eos_token_id": {vocab["</s>"]}}}\n'
    )


def small_plan(
    spec: ModelSpec,
    bits: Sequence[int] = (2, 3, 4, 8),
    *,
    group_size: int = 32,
    sym: bool = False,
    ladders: Mapping[str, Sequence[int]] | None = None,
    float_dtype: str = "F32",
    tables: Sequence[int] = (),
    shared: bool = False,
    grid_bits: Literal[8, 16] = 16,
    outliers: float = 0,
) -> Plan:
    """Plan with every block matrix quantized, the embedding too where `ladders` names it.

    tables: widths at which the matrices that have them have tables. shared: those with several widths share a grid.
    grid_bits: of scales and zeros where a row has several groups. outliers: their share in blocks.
    """
    ladders = dict(ladders or {})
    shapes = {"embed_tokens": (spec.vocab_size, spec.hidden_size)}
    shapes |= {} if spec.tied_head else {"lm_head": (spec.vocab_size, spec.hidden_size)}
    for layer in range(spec.num_layers):
        shapes |= spec.linears(layer)
    entries: dict[str, QuantEntry] = {}
    floats: dict[str, FloatEntry] = {}
    for name, (out, columns) in shapes.items():
        if bits and (name in ladders or name.startswith("layers.")):
            own = tuple(ladders.get(name, bits))
            entries[name] = QuantEntry(
                out=out, columns=columns, bits=own, group_size=group_size, sym=sym,
                tables=tuple(b for b in own if b in tables), shared=shared and len(own) > 1,
                grid_bits=16 if group_size == -1 or columns <= group_size else grid_bits,
                outliers=round(outliers * out * columns) if name.startswith("layers.") else 0,
            )  # fmt: skip
        else:
            floats[f"{name}.weight"] = FloatEntry(dtype=float_dtype, shape=(out, columns))
    norms = [f"layers.{layer}.{kind}.weight" for layer in range(spec.num_layers) for kind in ("attn_norm", "mlp_norm")]
    if spec.qk_norm:
        wide = (spec.num_heads, spec.head_dim) if spec.qk_norm.per_head else (spec.head_dim,)
        thin = (spec.num_kv_heads, spec.head_dim) if spec.qk_norm.per_head else (spec.head_dim,)
        for layer in range(spec.num_layers):
            floats[f"layers.{layer}.attn.q_norm.weight"] = FloatEntry(dtype="F32", shape=wide)
            floats[f"layers.{layer}.attn.k_norm.weight"] = FloatEntry(dtype="F32", shape=thin)
    floats |= {name: FloatEntry(dtype="F32", shape=(spec.hidden_size,)) for name in (*norms, "final_norm.weight")}
    return Plan(spec, entries, floats, tuple(bits))


def random_linear(
    entry: QuantEntry, rng: np.random.Generator
) -> tuple[np.ndarray, dict[int, np.ndarray], dict[int, np.ndarray]]:
    """Codes, scales and zeros of one matrix whose widths approximate the same weights, of std about 0.1."""
    widest = entry.bits[-1]
    codes = rng.integers(0, 1 << widest, (entry.out, entry.columns), dtype=np.uint8)
    base = rng.uniform(0.2, 0.4, (entry.out, entry.groups))
    own = [b for b in entry.bits if "scale" in entry.grids(b)]
    levels = {b: 128 if b in entry.tables else 1 << b for b in own}  # that the scale's steps are cut into
    scale = {b: (base / count).astype(np.float16) for b, count in levels.items()}
    middle = rng.uniform(-0.1, 0.1, (entry.out, entry.groups))
    zero = {} if entry.sym else {b: (middle * count).astype(np.float16) for b, count in levels.items()}
    if entry.grid_bits == 8:
        scale = {b: _coarse(s) for b, s in scale.items()}
        steps = {b: zero_step(7 if b in entry.tables else b) for b in zero}
        zero = {b: (np.round(z / steps[b]) * steps[b]).astype(np.float16) for b, z in zero.items()}
    return codes, scale, zero


def _coarse(scale: np.ndarray) -> np.ndarray:
    """Scales with six bits behind the first one, which is what a byte can say of those near the largest of a row."""
    mantissa, exponent = np.frexp(scale.astype(np.float64))
    return np.ldexp(np.round(mantissa * 128) / 128, exponent).astype(np.float16)


def random_tables(entry: QuantEntry, rng: np.random.Generator) -> dict[int, np.ndarray]:
    """Tables whose rows lie within a few levels of the even ones, so that the widths approximate the same weights."""
    found = {}
    for b in entry.tables:
        even = np.linspace(0, 127, 1 << b) + rng.uniform(-0.4, 0.4, (entry.out, 1 << b)) * 127 / (1 << b)
        found[b] = np.sort(even.clip(0, 127), axis=1).astype(np.uint8)
    return found


def random_ratios(entry: QuantEntry, rng: np.random.Generator) -> dict[int, np.ndarray]:
    """Ratios near 1 for every row and every width that has them."""
    return {b: rng.integers(115, 142, entry.out, dtype=np.uint8) for b in entry.bits if "ratio" in entry.grids(b)}


def random_outliers(entry: QuantEntry, rng: np.random.Generator) -> StoredOutliers | None:
    """Numbers of std about 1 anywhere in the matrix, one in its last place; draws nothing where there are none."""
    if not entry.outliers:
        return None
    size = entry.out * entry.columns
    place = np.sort([*rng.choice(size - 1, entry.outliers - 1, replace=False), size - 1])
    counts = np.bincount(place // entry.columns, minlength=entry.out).astype(np.uint16)
    values = rng.standard_normal(entry.outliers).astype(np.float16)
    return StoredOutliers(counts, (place % entry.columns).astype(np.uint16), values)


def random_float(entry: FloatEntry, rng: np.random.Generator) -> np.ndarray:
    """Values near 1 for vectors, small ones for matrices, in the entry's dtype (BF16 as uint16)."""
    values = rng.standard_normal(entry.shape).astype(np.float32) * 0.1
    if len(entry.shape) == 1:
        values += 1
    if entry.dtype == "BF16":
        return (values.view(np.uint32) >> 16).astype(np.uint16)
    return values.astype({"F32": np.float32, "F16": np.float16}[entry.dtype])


def fill(writer: ArtifactWriter, seed: int = 0) -> None:
    """Put random numbers into every tensor of the plan."""
    rng = np.random.default_rng(seed)
    for name, entry in writer.plan.entries.items():
        grids = *random_linear(entry, rng), random_tables(entry, rng), random_ratios(entry, rng)
        writer.put_quantized(name, *grids, random_outliers(entry, rng))
    for name, left in writer.plan.floats.items():
        writer.put_float(name, random_float(left, rng))


def provenance() -> SourceInfo:
    """Say where the numbers come from."""
    return SourceInfo(
        name="random", sha256="0" * 64, architecture="LlamaForCausalLM", parameters=1, dtype="float32", size_bytes=4
    )


def contents(folder: Path) -> dict[str, bytes]:
    """Bytes of every file, by name."""
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def write_small_artifact(
    folder: Path,
    spec: ModelSpec | None = None,
    bits: Sequence[int] = (2, 3, 4, 8),
    seed: int = 0,
    *,
    plan: Plan | None = None,
) -> Manifest:
    """Write a complete artifact at `folder`: by default a Llama with a float embedding and every block matrix nested.

    plan: overrides spec and bits, see `small_plan`.
    """
    plan = plan or small_plan(spec or llama_spec(), bits)
    partial = partial_of(folder)
    with ArtifactWriter.start(partial, plan) as writer:
        fill(writer, seed)
        write_tokenizer(partial)
        (partial / "README.md").write_text("# A small artifact\n")
        manifest = writer.finish(source=provenance(), recipe=[{"rtn": {"bits": list(plan.bits)}}], seed=seed)
    publish(partial, folder)
    return manifest
