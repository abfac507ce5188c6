"""Names to things: one table a kind, filled by us and by other distributions' entry points."""

from difflib import get_close_matches
from importlib.metadata import entry_points
from pkgutil import resolve_name
from typing import Any

from lilliput.core.errors import UnknownName


class Registry(dict[str, str]):
    """Names to "module:Class": our own table, plus what other distributions publish as entry points.

    The group of entry points is `lilliput.<kind>`. Raises UnknownName when a name is asked for that nobody gave.
    """

    def __init__(self, kind: str, /, **own: str) -> None:
        outside = {e.name: e.value for e in entry_points(group=f"lilliput.{kind}")}
        super().__init__(outside | own)  # a plug-in adds names, it cannot replace ours
        self.kind = kind

    def load(self, name: str) -> Any:
        """Return the object behind `name`, importing its module only now."""
        if name not in self:
            near = get_close_matches(name, self) or sorted(self)
            raise UnknownName(f"{name!r} is not known", where=self.kind, fix=f"Try {', '.join(near)}")
        return resolve_name(self[name])
