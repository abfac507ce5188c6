"""Lines of results to a Markdown table, and to a plot of bits a weight against KL."""

from collections.abc import Iterable, Mapping, Sequence
from math import ceil, floor, log10, sqrt
from pathlib import Path
from typing import Any

import numpy as np

COLOURS = ("#4063d8", "#cb3c33", "#389826", "#9558b2", "#c98a00", "#1a9e9e", "#8c564b", "#d1569a")
DASHES = ("", "6 3", "2 3", "9 3 2 3")
FIGURES = ("linear_bits", "model_bits", "kl", "perplexity", "top1_agreement", "cpu_seconds", "peak_rss_bytes")


def newest(lines: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The last line of every (contender, bits, seed) of those given."""
    return list({(line["contender"], line["bits"], line["seed"]): dict(line) for line in lines}.values())


def rows(lines: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One row for a contender and width: means over its seeds, and "least_kl", "largest_kl", "seeds"; lines that failed
    are left out, and seeds that were run with other options than the last one. Widest first, then by KL."""
    told = [line for line in lines if "error" not in line]
    options = {(line["bits"], line["contender"]): line.get("options") for line in told}
    groups: dict[tuple[int, str], list[Mapping[str, Any]]] = {}
    for line in newest(lines):
        who = (line["bits"], line["contender"])
        if "error" not in line and line.get("options") in (None, options[who]):
            groups.setdefault(who, []).append(line)
    found = []
    for (bits, contender), group in groups.items():
        row: dict[str, Any] = {"bits": bits, "contender": contender, "seeds": len(group)}
        for key in FIGURES:
            known = [line[key] for line in group if line.get(key) is not None]
            row[key] = sum(known) / len(known) if known else None
        row |= {"least_kl": min(line["kl"] for line in group), "largest_kl": max(line["kl"] for line in group)}
        ends = [line["kl_ci95"] for line in group if line.get("kl_ci95")]
        row["kl_half"] = sum(high - low for low, high in ends) / (2 * len(ends)) if ends else None
        windows = [line["kl_windows"] for line in group if line.get("kl_windows")]
        row["kl_windows"] = np.mean(windows, axis=0).tolist() if len(windows) == len(group) else None
        found.append(row)
    return sorted(found, key=lambda row: (-row["bits"], row["kl"]))


def failures(lines: Iterable[Mapping[str, Any]]) -> dict[str, str]:
    """{"contender, n bits": why it did not run} of the lines that failed."""
    return {f"{line['contender']}, {line['bits']} bits": line["error"] for line in newest(lines) if "error" in line}


def beside(rows: Sequence[Mapping[str, Any]], other: str) -> list[str]:
    """Lines of a Markdown table: the KL of every contender in parts of that of `other` at the same width.

    The interval is of the ratio over windows, both on the same ones: what a window does to one it does to the other, so it
    is far narrower than those of the two by themselves. Rows without figures of single windows are left out.
    """
    out = [f"| width | contender | bits a weight, blocks | KL in parts of {other}'s | 95 % |", "|---|---|---|---|---|"]
    held = {row["bits"]: row for row in rows if row["contender"] == other and row["kl_windows"]}
    for row in rows:
        if row["bits"] not in held or not row["kl_windows"] or row["contender"] == other:
            continue
        mine, theirs = np.array(row["kl_windows"]), np.array(held[row["bits"]]["kl_windows"])
        ratio, count = mine.sum() / theirs.sum(), len(mine)
        half = 1.96 * sqrt(count / (count - 1) * float(((mine - ratio * theirs) ** 2).sum())) / theirs.sum()
        ends = f"{ratio - half:.3f} to {ratio + half:.3f}"
        out.append(f"| {row['bits']} | {row['contender']} | {row['linear_bits']:.3f} | {ratio:.3f} | {ends} |")
    return out


def table(lines: Sequence[Mapping[str, Any]]) -> str:
    """The Markdown table, then what did not run; the float model's perplexity stands above."""
    out = []
    if original := next((line["original_perplexity"] for line in lines if "original_perplexity" in line), None):
        out += [f"float model: perplexity {original:.3f}", ""]
    out += [
        "| width | contender | bits a weight, blocks | whole model | KL, nats | over seeds | perplexity | top-1 | CPU min | peak MiB |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows(lines):
        spread = f"{row['least_kl']:.4f} .. {row['largest_kl']:.4f}" if row["seeds"] > 1 else "-"
        half = "" if row["kl_half"] is None else f" ± {row['kl_half']:.4f}"
        peak = f"{row['peak_rss_bytes'] / 2**20:.0f}" if row["peak_rss_bytes"] else "?"
        spent = "?" if row["cpu_seconds"] is None else f"{row['cpu_seconds'] / 60:.2f}"
        out.append(
            f"| {row['bits']} | {row['contender']} | {row['linear_bits']:.3f} | {row['model_bits']:.3f} | {row['kl']:.4f}{half} "
            f"| {spread} | {row['perplexity']:.3f} | {row['top1_agreement']:.4f} | {spent} | {peak} |"
        )
    if failed := failures(lines):
        out += ["", "Not run:", "", *(f"- {who}: `{why}`" for who, why in failed.items())]
    return "\n".join(out)


def plot(path: Path, lines: Sequence[Mapping[str, Any]], *, mine: str = "lilliput") -> None:
    """Write the frontier: bits a weight of the blocks against KL, logarithmic; a line for each contender.

    Down and to the left is better. Ours are thick; where there are seeds, a bar spans them.
    """
    series: dict[str, list[dict[str, Any]]] = {}
    for row in rows(lines):
        series.setdefault(row["contender"], []).append(row)
    points = [row for line in series.values() for row in line]
    if not points:
        raise ValueError("no figures to plot")
    left, top, width, height = 70, 30, 520, 400
    low_x, high_x = (
        floor(2 * min(p["linear_bits"] for p in points)) / 2,
        ceil(2 * max(p["linear_bits"] for p in points)) / 2,
    )
    floor_y = max(1e-9, min(p["least_kl"] for p in points))
    low_y, high_y = log10(floor_y) - 0.1, log10(max(p["largest_kl"] for p in points)) + 0.1

    def x_of(bits: float) -> float:
        return left + width * (bits - low_x) / max(high_x - low_x, 0.5)

    def y_of(kl: float) -> float:
        return top + height * (high_y - log10(max(kl, floor_y))) / (high_y - low_y)

    out = [f'<text x="{left}" y="18" font-weight="bold">KL from the float model, nats (lower is better)</text>']
    for decade in range(floor(low_y), ceil(high_y) + 1):
        for step in (1, 2, 5):
            value = step * 10.0**decade
            if low_y <= log10(value) <= high_y:
                y = y_of(value)
                out.append(f'<path d="M{left} {y:.1f}h{width}" stroke="#8884"/>')
                out.append(f'<text x="{left - 6}" y="{y + 4:.1f}" text-anchor="end">{value:g}</text>')
    for step in range(int((high_x - low_x) * 2) + 1):
        bits = low_x + step / 2
        out.append(f'<path d="M{x_of(bits):.1f} {top}v{height}" stroke="#8882"/>')
        out.append(f'<text x="{x_of(bits):.1f}" y="{top + height + 16}" text-anchor="middle">{bits:g}</text>')
    axis = "bits a weight of the block's matrices, all their bytes counted"
    out.append(f'<text x="{left + width / 2}" y="{top + height + 36}" text-anchor="middle">{axis}</text>')
    ordered = sorted(series, key=lambda name: (not name.startswith(mine), name))
    for n, name in enumerate(ordered):
        colour, dash = COLOURS[n % len(COLOURS)], DASHES[n // len(COLOURS) % len(DASHES)]
        thick = 3 if name.startswith(mine) else 1.5
        line = sorted(series[name], key=lambda row: row["linear_bits"])
        joined = " ".join(f"{x_of(p['linear_bits']):.1f},{y_of(p['kl']):.1f}" for p in line)
        stroke = f'stroke="{colour}" stroke-width="{thick}" stroke-dasharray="{dash}"'
        out.append(f'<polyline points="{joined}" fill="none" {stroke}/>')
        for p in line:
            x = x_of(p["linear_bits"])
            if p["seeds"] > 1:
                ends = f"M{x:.1f} {y_of(p['least_kl']):.1f}V{y_of(p['largest_kl']):.1f}"
                out.append(f'<path d="{ends}" stroke="{colour}" stroke-width="1"/>')
            out.append(f'<circle cx="{x:.1f}" cy="{y_of(p["kl"]):.1f}" r="{thick + 1.5}" fill="{colour}"/>')
        y = top + 12 + 20 * n
        out.append(f'<path d="M{left + width + 16} {y - 4}h26" {stroke}/>')
        out.append(f'<text x="{left + width + 48}" y="{y}" fill="{colour}">{name}</text>')
    legend = 60 + 7 * max(map(len, ordered))  # a letter of 11 pixels is seldom wider
    size = f'width="{left + width + legend}" height="{max(top + height + 50, top + 20 * len(ordered) + 20)}"'
    style = 'font-family="sans-serif" font-size="11" fill="#888"'
    path.write_text("\n".join([f'<svg xmlns="http://www.w3.org/2000/svg" {size} {style}>', *out, "</svg>"]) + "\n")
