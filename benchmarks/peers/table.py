"""From records of rounds to what is printed. Pure functions: no engine, no clock."""

from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

Record = Mapping[str, Any]
PAIRS: tuple[tuple[str, str], ...] = (
    ("lilliput 4", "llama.cpp q4_0"),
    ("lilliput 3", "llama.cpp q3_k_m"),
    ("lilliput 2", "llama.cpp q2_k"),
    ("lilliput 8", "llama.cpp q8_0"),
    ("lilliput 4", "onnxruntime int4"),
    ("lilliput 8", "onnxruntime int8"),
    ("lilliput 4", "openvino int4"),
    ("lilliput 8", "openvino int8"),
    ("lilliput 3", "llama.cpp q4_0"),
    ("lilliput 2", "llama.cpp q4_0"),
)
FIGURES = ("decode_tokens_per_s", "prefill_tokens_per_s", "first_token_s", "peak_rss_bytes")
ENOUGH = 3
"""Rounds without foreign load that a figure needs to stand without a mark."""


def spans(records: Sequence[Record]) -> list[tuple[str, list[Record], bool]]:
    """What a figure is told over: the undisturbed rounds, then all; one of them where they are the same or none is.

    Each with a label, its records, and whether it needs a mark: fewer than `ENOUGH` rounds without foreign load in it.
    """
    clean = [r for r in records if not r["disturbed"]]
    everything = (f"all {len(records)}", list(records), len(clean) < ENOUGH)
    if not clean or len(clean) == len(records):
        return [(f"{everything[0]} {'undisturbed' if clean else 'disturbed'}", *everything[1:])]
    return [(f"{len(clean)} undisturbed", clean, len(clean) < ENOUGH), everything]


def share_of_bandwidth(record: Record) -> float | None:
    """Weight bytes decoding read a second, over what plain reads reached just before and just after."""
    read, bandwidth = record.get("weight_bytes_per_token"), record.get("bandwidth_bytes_per_s")
    return record["decode_tokens_per_s"] * read / bandwidth if read and bandwidth else None


def rows(records: Sequence[Record]) -> list[dict[str, Any]]:
    """A row for each contender and each of its `spans`, in the order of their first records: medians."""
    found = []
    for name in dict.fromkeys(r["contender"] for r in records):
        for label, used, marked in spans([r for r in records if r["contender"] == name]):
            row: dict[str, Any] = {"contender": name, "over": label, "marked": marked}
            for key in (*FIGURES, "load_s", "cold_first_token_s", "anonymous_bytes", "weight_bytes_per_token"):
                values = [r[key] for r in used if r.get(key) is not None]
                row[key] = median(values) if values else None
            shares = [s for s in map(share_of_bandwidth, used) if s is not None]
            found.append(row | {"share_of_bandwidth": median(shares) if shares else None})
    return found


def ratios(records: Sequence[Record], figure: str, pairs: Sequence[tuple[str, str]] = PAIRS) -> list[dict[str, Any]]:
    """First over second, each within one round, then the median, least and largest of those, for each of the `spans`.

    A pair is disturbed when either of its two was; pairs that never met are left out.
    """
    found = []
    for first, second in pairs:
        by = {(r["contender"], r["round"]): r for r in records}
        turns = sorted({n for name, n in by if name == first} & {n for name, n in by if name == second})
        met = [
            {"value": by[first, n][figure] / by[second, n][figure], "disturbed": _either(by[first, n], by[second, n])}
            for n in turns
            if by[first, n].get(figure) and by[second, n].get(figure)
        ]
        for label, used, marked in spans(met) if met else ():
            values = [m["value"] for m in used]
            pair = {"pair": f"{first} / {second}", "over": label, "marked": marked}
            found.append(pair | {"median": median(values), "least": min(values), "largest": max(values)})
    return found


def text(records: Sequence[Record], absent: Mapping[str, str] | None = None) -> str:
    """Everything as Markdown: a table a shape, the ratios below it, then what did not run and why."""
    parts = []
    for shape in dict.fromkeys(r["shape"] for r in records):
        own = [r for r in records if r["shape"] == shape]
        parts += [f"## {shape}, {own[0]['threads']} threads", _rows(own), _ratios(own)]
        control = [r["bandwidth_bytes_per_s"] for r in own if r.get("bandwidth_bytes_per_s")]
        if control:
            low, middle, high = (f"{f(control) / 1e9:.1f}" for f in (min, median, max))
            parts.append(f"Plain reads: median {middle} GB/s, {low} to {high} ({own[0]['bandwidth_control']}).")
    if any(r["disturbed"] for r in records):
        parts.append(
            f"~: fewer than {ENOUGH} rounds without foreign load: not to be quoted. Over all: disturbed rounds too."
        )
    parts += [f"Not run: {name}: {why}" for name, why in (absent or {}).items()]
    return "\n\n".join(parts)


def _either(first: Record, second: Record) -> bool:
    return bool(first["disturbed"] or second["disturbed"])


def _rows(records: Sequence[Record]) -> str:
    head = (
        "",
        "rounds",
        "decode tok/s",
        "prefill tok/s",
        "first token s",
        "load s",
        "peak MiB (anon)",
        "MB a token",
        "of reads",
    )
    lines = [head, tuple("-" for _ in head)]
    for row in rows(records):
        peak = f"{_mib(row['peak_rss_bytes'])} ({_mib(row['anonymous_bytes'])})"
        read, share = row["weight_bytes_per_token"], row["share_of_bandwidth"]
        lines.append(
            (
                row["contender"],
                f"{row['over']}{'~' if row['marked'] else ''}",
                *(_number(row[key]) for key in ("decode_tokens_per_s", "prefill_tokens_per_s")),
                *(_number(row[key]) for key in ("first_token_s", "load_s")),
                peak,
                "-" if read is None else f"{read / 1e6:.0f}",
                "-" if share is None else f"{share:.0%}",
            )
        )
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _ratios(records: Sequence[Record]) -> str:
    lines = ["| same-round ratio | rounds | decode | prefill |", "| - | - | - | - |"]
    prefill = {(r["pair"], r["over"]): r for r in ratios(records, "prefill_tokens_per_s")}
    for row in ratios(records, "decode_tokens_per_s"):
        other = prefill.get((row["pair"], row["over"]))
        cells = [f"{row['over']}{'~' if row['marked'] else ''}", _ratio(row), _ratio(other) if other else "-"]
        lines.append(f"| {row['pair']} | {' | '.join(cells)} |")
    return "\n".join(lines) if len(lines) > 2 else "No two contenders that are compared met in a round."


def _ratio(row: Record) -> str:
    return f"{row['median']:.2f} ({row['least']:.2f} to {row['largest']:.2f})"


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.3g}" if value < 100 else f"{value:.0f}"


def _mib(value: float | None) -> str:
    return "-" if value is None else f"{value / 2**20:.0f}"
