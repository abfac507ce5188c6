"""JSON from files we do not trust: one object, no duplicate keys, no NaN, and one kind of error for all that fails."""

import json
from typing import Any

from lilliput.core.errors import InputCorrupt

_ENCODE = json.JSONEncoder(allow_nan=False).encode
_text = json.encoder.encode_basestring_ascii


class _Refused(ValueError):
    pass


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise _Refused(f"the key {key[:80]!r} appears twice")
        found[key] = value
    return found


def _constant(text: str) -> Any:
    raise _Refused(f"{text} is not JSON")


def parse(raw: bytes, where: str, fix: str) -> dict[str, Any]:
    """Return the object in `raw`, keys in their order. Raises InputCorrupt for whatever is not one strict JSON object."""
    try:
        found = json.loads(raw.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_constant)
    except UnicodeDecodeError as error:
        raise InputCorrupt(f"byte {error.start} is not UTF-8", where, fix) from None
    except RecursionError:
        raise InputCorrupt("the JSON is nested too deeply", where, fix) from None
    except ValueError as error:  # JSONDecodeError, _Refused, and numbers of more digits than Python reads
        raise InputCorrupt(f"not strict JSON: {str(error)[:200]}", where, fix) from None
    if not isinstance(found, dict):
        raise InputCorrupt(f"the JSON is a {type(found).__name__}, not an object", where, fix)
    return found


def _indented(value: Any, newline: str) -> str:
    """json.dumps(value, indent=2, allow_nan=False), several times as fast: its C encoder knows no indentation."""
    if isinstance(value, dict) and value:
        inner = newline + "  "
        items = [f"{_text(key)}: {_indented(item, inner)}" for key, item in value.items()]
        return f"{{{inner}{(',' + inner).join(items)}{newline}}}"
    if isinstance(value, (list, tuple)) and value:
        inner = newline + "  "
        return f"[{inner}{(',' + inner).join([_indented(item, inner) for item in value])}{newline}]"
    kind = type(value)
    if kind is str:
        return _text(value)
    return repr(value) if kind is int else _ENCODE(value)


def canonical(data: dict[str, Any], where: str, fix: str) -> bytes:
    """Return the only bytes we write for `data`: ASCII, indented by two, keys in their order, one newline at the end."""
    try:
        return (_indented(data, "\n") + "\n").encode("ascii")
    except (ValueError, RecursionError):
        raise InputCorrupt("a number is not finite or the nesting is too deep", where, fix) from None
