"""Rotary frequencies: from the ways a config says them to the numbers a runner multiplies positions with."""

import math
import struct
from collections.abc import Callable
from typing import Any

from lilliput.core.errors import InputCorrupt, Unsupported
from lilliput.core.spec import Rotary

_MAX_FREQ = 1e6
"""Radians a token. Real models have at most 1; this bound only keeps float32 finite."""


def rotary(rope: dict[str, Any], *, dim: int, theta: float, context: int, where: str) -> Rotary:
    """Return the rotation of the first `dim` channels of each head.

    rope: checked keys of `rope_parameters` or `rope_scaling`, may be empty. context: `max_position_embeddings`, tokens.
    Frequencies are computed in float64 and rounded to float32, so they are the same everywhere.
    Raises Unsupported for a kind we do not serve, InputCorrupt when a kind lacks its numbers.
    """
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind not in KINDS:
        known = ", ".join(KINDS)
        raise Unsupported(f"rotary embedding of type {kind!r}", where=where, fix=f"Known types are {known}")
    if dim < 2 or dim % 2:
        what = f"rotary embedding over {dim} channels of a head, which is not a positive even number"
        raise InputCorrupt(what, where=where, fix="Check head_dim and partial_rotary_factor")
    plain = [theta ** (-j / dim) for j in range(0, dim, 2)]
    freqs, scale = KINDS[kind](plain, rope, context, where)
    if not all(f <= _MAX_FREQ for f in freqs):
        what = f"rotary embedding turns by {max(freqs):.3g} radians a token"
        raise InputCorrupt(what, where=where, fix="Check rope_theta and the factors in config.json")
    return Rotary(dim=dim, inv_freq=tuple(_float32(f) for f in freqs), scale=scale)


def _default(plain: list[float], rope: dict[str, Any], context: int, where: str) -> tuple[list[float], float]:
    return plain, 1.0


def _linear(plain: list[float], rope: dict[str, Any], context: int, where: str) -> tuple[list[float], float]:
    factor = _need(rope, "factor", where)
    return [f / factor for f in plain], 1.0


def _llama3(plain: list[float], rope: dict[str, Any], context: int, where: str) -> tuple[list[float], float]:
    """Long wavelengths are stretched by `factor`, short ones kept, those between blended linearly in 1/wavelength."""
    keys = ("factor", "low_freq_factor", "high_freq_factor")
    factor, low, high = (float(_need(rope, key, where)) for key in keys)
    if high <= low:
        what = f"high_freq_factor {high} is not above low_freq_factor {low}"
        raise InputCorrupt(what, where=where, fix="Download config.json again")
    trained: int = rope.get("original_max_position_embeddings") or context

    def stretch(freq: float) -> float:
        turns = trained * freq / (2 * math.pi)  # over the trained context
        keep = min(max((turns - low) / (high - low), 0.0), 1.0)
        return keep * freq + (1 - keep) * freq / factor

    return [stretch(f) for f in plain], 1.0


def _longrope(plain: list[float], rope: dict[str, Any], context: int, where: str) -> tuple[list[float], float]:
    """The short factors only: they hold up to the trained context, and the long ones would need another table.

    The factor on cos and sin depends on the context the config promises, not on the one we serve.
    """
    short = _need(rope, "short_factor", where)
    if len(short) != len(plain):
        what = f"short_factor has {len(short)} numbers for {len(plain)} frequencies"
        raise InputCorrupt(what, where=where, fix="Download config.json again")
    trained = rope.get("original_max_position_embeddings") or context
    factor = rope.get("factor") or context / trained
    scale = rope.get("attention_factor")
    if scale is None:
        scale = math.sqrt(1 + math.log(factor) / math.log(trained)) if factor > 1 and trained > 1 else 1.0
    return [f / s for f, s in zip(plain, short, strict=True)], scale


KINDS: dict[str, Callable[[list[float], dict[str, Any], int, str], tuple[list[float], float]]] = {
    "default": _default,
    "linear": _linear,
    "llama3": _llama3,
    "longrope": _longrope,
}


def _need(rope: dict[str, Any], key: str, where: str) -> Any:
    if rope.get(key) is None:
        raise InputCorrupt(f"rotary embedding lacks {key}", where=where, fix="Download config.json again")
    return rope[key]


def _float32(value: float) -> float:
    rounded: float = struct.unpack("<f", struct.pack("<f", value))[0]
    return rounded
