"""Schedules as people write them: `4`, `4@0,3@85,2@170`, `8@prompt,4@0`, or `NAME:option=value,ladder=4/3/2`."""

import re
from dataclasses import MISSING, fields
from types import NoneType
from typing import Any, get_args, get_type_hints

from lilliput.core.errors import ConfigError
from lilliput.engine.schedules import SCHEDULES
from lilliput.engine.schedules.base import Schedule
from lilliput.engine.schedules.fixed import Constant, Static

_HELP = f"Write 4, 4@0,3@85,2@170, or NAME:option=value,.. with one of {', '.join(sorted(SCHEDULES))}"


def parse(text: str) -> Schedule:
    """Return the schedule that `text` names; `str` of it reads back the same.

    Raises ConfigError for text that is none or makes no sense, UnknownName for a name nobody registered.
    """
    text = text.strip()
    if re.fullmatch(r"[0-9]{1,2}", text):
        return Constant(bits=int(text))
    if re.match(r"[0-9]", text):
        return _steps(text)
    name, _, tail = text.partition(":")
    kind = SCHEDULES.load(name)
    hints, options = get_type_hints(kind), {}
    known = {field.name for field in fields(kind)}
    for part in filter(None, tail.split(",")):
        option, _, value = part.partition("=")
        if option not in known:
            what = f"{option!r} is no option of it; it has {', '.join(sorted(known))}"
            raise ConfigError(what, f"schedule {name}", "Write NAME:option=value,option=value")
        options[option] = _value(value, hints[option], f"schedule {name}.{option}")
    missing = [field.name for field in fields(kind) if field.default is MISSING and field.name not in options]
    if missing:
        raise ConfigError(f"it needs {missing[0]}", f"schedule {name}", kind.spelt or f"Write {name}:{missing[0]}=..")
    made: Schedule = kind(**options)
    return made


def _steps(text: str) -> Schedule:
    prefill, at = None, list[tuple[int, int]]()
    for part in text.split(","):
        found = re.fullmatch(r"([0-9]{1,2})@(prompt|[0-9]{1,9})", part.strip())
        if not found:
            raise ConfigError(f"{part!r} is no width and step", f"schedule {text}", _HELP)
        bits, start = int(found[1]), found[2]
        if start != "prompt":
            at.append((int(start), bits))
        elif prefill is None and not at:
            prefill = bits
        else:
            raise ConfigError("the width of the prompt does not stand first", f"schedule {text}", "Write 8@prompt,4@0")
    if len(at) == 1 and at[0][0] == 0:
        return Constant(bits=at[0][1], prefill=prefill)
    return Static(at=tuple(at), prefill=prefill)


def _value(text: str, hint: Any, where: str) -> Any:
    kinds = [kind for kind in (get_args(hint) if NoneType in get_args(hint) else (hint,)) if kind is not NoneType]
    kind = kinds[0]
    try:
        if kind is bool:
            return {"true": True, "false": False}[text.lower()]
        if kind == tuple[int, ...]:
            return tuple(int(part) for part in text.split("/"))
        if kind in (int, float, str):
            return kind(text)
    except (ValueError, KeyError):
        pass
    name = {bool: "true or false", int: "a whole number", float: "a number"}.get(kind, "widths such as 4/3/2")
    raise ConfigError(f"{text!r} does not fit", where, f"Give {name}")
