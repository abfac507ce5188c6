"""Whether the tensors that a manifest lists are the model that its spec describes."""

from collections.abc import Iterator, Mapping
from functools import cache

from lilliput.artifact.entries import FloatEntry, QuantEntry
from lilliput.core.spec import AnySpec, EncoderSpec, ModelSpec, PatchInputs


def inconsistencies(
    spec: AnySpec, entries: Mapping[str, QuantEntry], floats: Mapping[str, FloatEntry], bits: tuple[int, ...]
) -> Iterator[str]:
    """Yield what keeps these tensors from being the model that `spec` describes, one line each."""
    if isinstance(spec, EncoderSpec):
        if spec.num_layers > len(entries) + len(floats):  # first, as below
            yield f"spec has {spec.num_layers} layers but there are {len(entries) + len(floats)} tensors"
            return
    else:
        if len(spec.windows) != spec.num_layers:  # first: it bounds the loops below by the size of the manifest
            yield f"spec has {spec.num_layers} layers but {len(spec.windows)} windows"
            return
        if spec.rotary is not None and len(spec.rotary.inv_freq) != spec.rotary.dim // 2:
            yield f"spec.rotary has {len(spec.rotary.inv_freq)} frequencies for {spec.rotary.dim} channels"
    if bool(entries) != bool(bits):
        yield f"the widths are {list(bits)} but {len(entries)} matrices are quantized"
    matrices = spec.matrices()
    for name, shape in matrices.items():
        entry, left = entries.get(name), floats.get(f"{name}.weight")
        if (entry is None) == (left is None):
            yield f"{name} is stored {'twice' if entry else 'neither quantized nor in float'}"
            return
        found = (entry.out, entry.columns) if entry else left.shape if left else ()
        if found != shape:
            yield f"{name} is {found} but the spec says {shape}"
    for name in entries.keys() - matrices.keys():
        yield f"{name} is quantized but the spec has no such matrix"
    if isinstance(spec, ModelSpec) and spec.tied_head and "lm_head.weight" in floats:
        yield "lm_head.weight is stored although the head is tied"
    for name, entry in entries.items():
        if entry.outliers and not name.startswith("layers."):
            yield f"{name} has outliers, which only the matrices of blocks have"
        unused = _unused(entry.bits, bits)
        if bits and unused:
            yield f"{name} has the width {unused[0]}, which no width of {list(bits)} uses"
    misshapen = _misshapen(spec, floats, matrices) if isinstance(spec, ModelSpec) else _unlike(spec, floats, matrices)
    yield from misshapen


@cache
def _unused(own: tuple[int, ...], bits: tuple[int, ...]) -> list[int]:
    return sorted(set(own) - {next((width for width in own if width >= b), own[-1]) for b in bits})


def _misshapen(
    spec: ModelSpec, floats: Mapping[str, FloatEntry], matrices: Mapping[str, tuple[int, int]]
) -> Iterator[str]:
    per_head = spec.qk_norm is not None and spec.qk_norm.per_head
    heads = {"q_norm": spec.num_heads, "k_norm": spec.num_kv_heads}
    for name, entry in floats.items():
        module, _, kind = name.rpartition(".")
        last = module.rpartition(".")[2]
        expected: tuple[int, ...] | None = None
        if kind == "bias" and module in matrices:
            expected = matrices[module][:1]
        elif last in heads:
            expected = (heads[last], spec.head_dim) if per_head else (spec.head_dim,)
        elif last.endswith("_norm"):
            expected = (spec.hidden_size,)
        elif name == "embed_positions.weight":
            rows = spec.context + (spec.position_offset or 0)
            if len(entry.shape) != 2 or entry.shape[0] < rows or entry.shape[1] != spec.hidden_size:
                yield f"{name} is {entry.shape} but the spec needs at least {(rows, spec.hidden_size)}"
        if expected is not None and entry.shape != expected:
            yield f"{name} is {entry.shape} but the spec says {expected}"


def _unlike(
    spec: EncoderSpec, floats: Mapping[str, FloatEntry], matrices: Mapping[str, tuple[int, int]]
) -> Iterator[str]:
    """Yield what an encoder's float tensors lack, have too much of, or have in another shape."""
    hidden = (spec.hidden_size,)
    wanted: dict[str, tuple[int, ...]] = {"embed_positions.weight": (spec.context, spec.hidden_size)}
    if isinstance(spec.inputs, PatchInputs):
        wanted["embed_class.weight"] = hidden
    elif spec.inputs.types:
        wanted["embed_types.weight"] = (spec.inputs.types, spec.hidden_size)
    own = ("attn_norm", "mlp_norm") if spec.norm_first else ("attn_post_norm", "mlp_post_norm")
    norms = [f"layers.{layer}.{norm}" for layer in range(spec.num_layers) for norm in own]
    norms += ["embed_norm"] * spec.embed_norm + ["final_norm"] * spec.final_norm
    wanted |= {f"{norm}.weight": hidden for norm in norms}
    optional: dict[str, tuple[int, ...]] = {f"{norm}.bias": hidden for norm in norms}
    optional |= {f"{name}.bias": shape[:1] for name, shape in matrices.items()}
    optional |= {f"{name}.weight": shape for name, shape in matrices.items()}
    for name in wanted.keys() - floats.keys():
        yield f"{name} is not stored"
    for name, entry in floats.items():
        shape = wanted.get(name) or optional.get(name)
        if shape is None:
            yield f"{name} is stored but the spec has no such tensor"
        elif entry.shape != shape:
            yield f"{name} is {entry.shape} but the spec says {shape}"
