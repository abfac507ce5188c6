"""Tokens in, text out piece by piece, ending before a stop string."""

from collections.abc import Callable, Sequence

from lilliput.core.errors import ConfigError
from lilliput.data.tokenizer import Tokenizer

_CONTEXT = 8  # prompt tokens shown to the decoder first, so that a continuation keeps its leading space


def stop_strings(stop: Sequence[str] | str) -> tuple[str, ...]:
    """A caller's stop strings as a tuple. Raises ConfigError for an empty one."""
    stops = (stop,) if isinstance(stop, str) else tuple(stop)
    if "" in stops:
        raise ConfigError("an empty string would stop every text at once", where="stop", fix="Leave it out")
    return stops


class TextStream:
    """The text of one sequence. Joined, the pieces told are `text`; no piece holds any part of a stop string.

    Text that could be the beginning of a stop string is held back until it is decided.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt: Sequence[int],
        stops: tuple[str, ...],
        tell: Callable[[str], bool | None] | None,
    ) -> None:
        """prompt: what came before. tell: called for every token with its piece, perhaps ""; False cancels."""
        self._decoder, self._stops, self._tell = tokenizer.stream(), stops, tell
        for token in prompt[-_CONTEXT:]:
            self._decoder.put(token)
        self._held, self._pieces = "", list[str]()
        self.stopped = self.cancelled = False

    @property
    def text(self) -> str:
        """Everything told so far."""
        return "".join(self._pieces)

    def put(self, token: int) -> bool:
        """Take one token; False when the sequence should end: at a stop string, or because the listener said so."""
        self._held += self._decoder.put(token)
        self._say(self._decided())
        return not (self.stopped or self.cancelled)

    def finish(self) -> None:
        """Tell what was held back, unless the sequence was ended."""
        if self.stopped or self.cancelled:
            return
        self._held += self._decoder.flush()
        piece = self._decided()
        piece, self._held = piece + self._held, ""
        if piece:
            self._say(piece)

    def _decided(self) -> str:
        """Take from the held text what no stop string can claim any more."""
        found = [at for stop in self._stops if (at := self._held.find(stop)) >= 0]
        if found:
            piece, self._held, self.stopped = self._held[: min(found)], "", True
            return piece
        most = max((len(stop) for stop in self._stops), default=1) - 1
        keep = next((n for n in range(min(most, len(self._held)), 0, -1) if self._could_stop(self._held[-n:])), 0)
        cut = len(self._held) - keep
        piece, self._held = self._held[:cut], self._held[cut:]
        return piece

    def _could_stop(self, tail: str) -> bool:
        return any(stop.startswith(tail) for stop in self._stops)

    def _say(self, piece: str) -> None:
        self._pieces.append(piece)
        if self._tell is not None and self._tell(piece) is False:
            self.cancelled = True
