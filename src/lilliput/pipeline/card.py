"""The README.md of an artifact: what it is, where it came from, how good each width is."""

from collections.abc import Sequence

from lilliput.artifact.entries import EmbeddingQuality, QualityEntry, SourceInfo
from lilliput.artifact.plan import Plan
from lilliput.core.recipe import Recipe
from lilliput.core.spec import EncoderSpec, PatchInputs
from lilliput.pipeline.gate import UNQUANTIZED


def model_card(
    source: SourceInfo,
    plan: Plan,
    recipe: Recipe,
    quality: Sequence[QualityEntry | EmbeddingQuality],
    graph: QualityEntry | EmbeddingQuality | None = None,
) -> str:
    """Return Markdown with the YAML header model hubs read. graph: what the integer graph does, if there is one."""
    widths = ", ".join(map(str, plan.bits))
    lines = [
        "---",
        f"base_model: {source.name}",
        "base_model_relation: quantized",
        "library_name: lilliput",
        "tags: [lilliput, nested-quantization]",
        "---",
        "",
        f"# {source.name}, {'at ' + widths + ' bits' if widths else 'compressed'}",
        "",
        f"Made by Lilliput from a {source.architecture} of {source.parameters:,} parameters"
        f" ({source.dtype}, {source.size_bytes:,} bytes). The terms of the original model go on to hold.",
        "",
        *_example(plan),
        "",
    ]
    if quality:
        first = quality[0]
        if isinstance(first, EmbeddingQuality):
            on, columns = f"{first.inputs_are} ({first.inputs}", "cosine, mean | cosine, least | relative error"
        else:
            on, columns = f"{first.text} ({first.tokens} tokens", "KL, nats a token | same likeliest token"
        lines += [
            f"Against the original, on {on}; a screen, not a benchmark):",
            "",
            f"| bits | {columns} | bits a weight | bytes |",
            "| --- " * (columns.count("|") + 4) + "|",
        ]
        for row in quality:
            plain = row.bits == UNQUANTIZED
            name, weight = ("-", "-") if plain else (str(row.bits), f"{plan.bits_per_weight(row.bits):.2f}")
            size = plan.total_bytes() if plain else plan.bytes_at(row.bits)
            if isinstance(row, EmbeddingQuality):
                found = f"{row.cosine:.4f} | {row.cosine_min:.4f} | {row.error:.3g}"
            else:
                found = f"{row.kl:.4g} | {row.top1_agreement:.1%}"
            lines.append(f"| {name} | {found} | {weight} | {size:,} |")
        lines.append("")
    if graph is not None:
        if isinstance(graph, EmbeddingQuality):
            said = f"cosine {graph.cosine:.4f} in the mean, {graph.cosine_min:.4f} at the least"
        else:
            said = f"KL {graph.kl:.4g}, same likeliest token {graph.top1_agreement:.1%}"
        lines += [f"The integer graph, every activation in whole numbers (`integer.json`): {said}.", ""]
    lines += ["The recipe:", "", "```yaml", recipe.text().rstrip(), "```", ""]
    return "\n".join(lines)


def _example(plan: Plan) -> list[str]:
    """How it is used, as a block of Markdown."""
    bits = plan.bits[-1] if plan.bits else None
    if not isinstance(plan.spec, EncoderSpec):
        run = f'lilliput run . -p "Once upon a time"{f" --bits {bits}" if bits else ""}'
        return ["```", "lilliput verify .", run, "```"]
    given = 'pictures(["photo.jpg"]' if isinstance(plan.spec.inputs, PatchInputs) else 'texts(["Once upon a time"]'
    call = f'vectors = Embedder(".").{given}, bits={bits})'
    return ["```python", "from lilliput.embedding import Embedder", "", call, "```"]
