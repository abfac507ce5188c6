"""The README.md of an artifact: what it is, where it came from, how good each width is."""

from collections.abc import Sequence

from lilliput.artifact.plan import Plan
from lilliput.artifact.schema import QualityEntry, SourceInfo
from lilliput.core.recipe import Recipe
from lilliput.pipeline.gate import UNQUANTIZED


def model_card(source: SourceInfo, plan: Plan, recipe: Recipe, quality: Sequence[QualityEntry]) -> str:
    """Return Markdown with the YAML header model hubs read."""
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
        "```",
        "lilliput verify .",
        f'lilliput run . -p "Once upon a time"{" --bits " + str(plan.bits[-1]) if plan.bits else ""}',
        "```",
        "",
    ]
    if quality:
        tokens = quality[0].tokens
        lines += [
            f"Against the original, on {quality[0].text} ({tokens} tokens; a screen, not a benchmark):",
            "",
            "| bits | KL, nats a token | same likeliest token | bits a weight | bytes |",
            "| --- | --- | --- | --- | --- |",
        ]
        for row in quality:
            plain = row.bits == UNQUANTIZED
            name, weight = ("-", "-") if plain else (str(row.bits), f"{plan.bits_per_weight(row.bits):.2f}")
            size = plan.total_bytes() if plain else plan.bytes_at(row.bits)
            lines.append(f"| {name} | {row.kl:.4g} | {row.top1_agreement:.1%} | {weight} | {size:,} |")
        lines.append("")
    lines += ["The recipe:", "", "```yaml", recipe.text().rstrip(), "```", ""]
    return "\n".join(lines)
