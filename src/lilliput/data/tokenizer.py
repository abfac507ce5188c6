"""Text to token ids and back, by the model's own tokenizer.json; the one place that decides where BOS goes.

The artifact carries the source's tokenizer files unchanged and this class reads them with the `tokenizers` library, so
nothing is converted and nothing is guessed. What a model's tokenizer would add around a text (BOS, sometimes EOS) is
found out once, on opening, and never left to the library again: `encode` adds one BOS or none.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Final

import tokenizers

from lilliput.core.errors import ConfigError, InputCorrupt, InputMissing, OutOfResource, Unsupported
from lilliput.data.chat import ChatTemplate

MAX_CHARACTERS: Final = 1 << 25
"""Longest text `encode` takes, so that one request cannot claim all memory (the library needs about 100 bytes each)."""
MAX_JSON_BYTES: Final = 1 << 28
"""Largest tokenizer file read; the largest published ones are about 35 MB."""
_PENDING: Final = 16
"""Ids a StreamDecoder holds back at most; a character takes four bytes, so more than four means ill-formed text."""
_REPLACEMENT: Final = "\ufffd"


class Tokenizer:
    """A model's tokenizer: `encode`, `decode`, `stream` and `render_chat`.

    vocab_size: one more than the largest id the tokenizer knows (a model's own vocabulary may be padded beyond it).
    bos_id: the id `encode` puts in front, None where this model's tokenizer puts none.
    eos_ids: every id that ends a text: those of generation_config.json first, then tokenizer_config.json's.
    """

    vocab_size: int
    bos_id: int | None
    eos_ids: tuple[int, ...]

    def __init__(self, core: tokenizers.Tokenizer, config: Mapping[str, Any], folder: Path) -> None:
        """Use `open`. config: tokenizer_config.json with the gaps filled from special_tokens_map.json."""
        core.no_truncation()  # tokenizer.json may carry a length limit or padding from training: both alter ids silently
        core.no_padding()
        self._core, self._config, self._folder = core, config, folder
        self._special = {i for i, token in core.get_added_tokens_decoder().items() if token.special}
        self.vocab_size = max(core.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        self.bos_id = self._bos()
        self._back = self._behind()
        self.eos_ids = self._eos()

    @classmethod
    def open(cls, folder: str | Path) -> "Tokenizer":
        """Read a checkpoint's or an artifact's tokenizer files; only tokenizer.json must be there.

        Raises InputMissing where tokenizer.json is not there, InputCorrupt where a file cannot be read as what it
        should be, Unsupported where the tokenizer puts more than one token in front of a text.
        """
        folder = Path(folder)
        path = folder / "tokenizer.json"
        if not path.is_file():
            fix = "Give the folder that holds tokenizer.json; convert older formats with transformers' save_pretrained"
            raise InputMissing("tokenizer.json is not there", where=str(folder), fix=fix)
        try:
            core = tokenizers.Tokenizer.from_str(_text(path))
        except InputCorrupt:
            raise
        except Exception as error:  # the library raises plain Exception for whatever it cannot parse
            raise InputCorrupt(f"not a tokenizer ({error})", where=str(path), fix="Fetch the file again") from error
        config = _json(folder / "special_tokens_map.json") | _json(folder / "tokenizer_config.json")
        config["_generation"] = _json(folder / "generation_config.json")
        file = folder / "chat_template.jinja"
        if file.is_file():
            config["chat_template"] = _text(file)
        return cls(core, config, folder)

    def encode(self, text: str, *, bos: bool = True) -> list[int]:
        """Return the ids of `text`, with exactly one BOS in front where the model has one and `bos` is true.

        A text that spells its BOS already (rendered chats do) gets no second one. Special tokens spelled in the text
        become their ids; nothing is added behind. Raises OutOfResource beyond MAX_CHARACTERS and ConfigError for text
        with lone surrogates, which no UTF-8 can hold.
        """
        if len(text) > MAX_CHARACTERS:
            what = f"{len(text)} characters, above the limit of {MAX_CHARACTERS}"
            raise OutOfResource(what, where="text to tokenize", fix="Split it into several documents")
        try:
            ids = list(self._core.encode(text, add_special_tokens=False).ids)
        except TypeError as error:
            what = "holds half of a surrogate pair, which is not a character"
            raise ConfigError(what, where="text to tokenize", fix="Give valid Unicode") from error
        if bos and self.bos_id is not None and ids[:1] != [self.bos_id]:
            ids.insert(0, self.bos_id)
        return ids

    def whole(self, text: str, limit: int) -> list[int]:
        """Return the ids of `text` for an encoder: what the model puts in front and behind included, at most `limit`.

        A longer text loses its end, never what stands behind it. Raises as `encode` does.
        """
        ids = self.encode(text)
        return ids[: max(0, limit - len(self._back))] + list(self._back)

    def decode(self, ids: Sequence[int], *, skip_special: bool = True) -> str:
        """Return the text of `ids`; ids above the vocabulary stand for nothing.

        Bytes that are not UTF-8 become U+FFFD. Some decoders of the library then give up a whole run of bytes; there
        we keep the characters around the fault, as `stream` does, so that both always say the same.
        Raises ConfigError for a negative id.
        """
        text = self._decode(ids, skip_special)
        if _REPLACEMENT not in text:
            return text
        stream = self.stream(skip_special=skip_special)
        return "".join([*map(stream.put, ids), stream.flush()])

    def stream(self, *, skip_special: bool = True) -> "StreamDecoder":
        """Return a decoder that takes ids one by one; what it gives, joined, is `decode` of them all."""
        return StreamDecoder(self, skip_special=skip_special)

    def render_chat(
        self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = True, **options: Any
    ) -> str:
        """Return the prompt for a chat, by the model's own template in a sandbox.

        messages: {"role": .., "content": ..}, ..; options: see `chat.OPTIONS`.
        Raises ConfigError where the model has no template (there is no default: a wrong one gives nonsense), an
        unknown option is given or the template refuses the messages; InputUnsafe where it tries to leave its sandbox
        or to take unbounded time or memory; InputCorrupt where it does not parse.
        """
        return self.chat_template.render(messages, add_generation_prompt=add_generation_prompt, **options)

    @cached_property
    def chat_template(self) -> ChatTemplate:
        """The compiled template; its `.sha256` tells templates apart. Raises as `render_chat` does."""
        source = self._config.get("chat_template")
        if isinstance(source, list):  # several named ones
            named = {t.get("name"): t.get("template") for t in source if isinstance(t, dict)}
            source = named.get("default")
        if not isinstance(source, str) or not source:
            what = "this model has no chat template"
            fix = "Add chat_template.jinja to the folder, or give a plain prompt"
            raise ConfigError(what, where=str(self._folder), fix=fix)
        names = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")
        tokens = {name: token for name in names if (token := self._token(name)) is not None}
        return ChatTemplate(source, tokens, where=f"{self._folder}: chat template")

    def _token(self, name: str) -> str | None:
        """A special token's text; files write it as a string or as {"content": ..}."""
        token = self._config.get(name)
        if isinstance(token, dict):
            token = token.get("content")
        return token if isinstance(token, str) else None

    def _bos(self) -> int | None:
        """The id the model's own tokenizer puts in front of a text, found by watching it do so."""
        token = self._token("bos_token")
        declared: int | None = None if token is None else self._core.token_to_id(token)
        front = self._front(declared)
        if len(front) > 1:
            tokens = " ".join(str(self._core.id_to_token(i)) for i in front)
            what = f"puts {len(front)} tokens in front of every text ({tokens})"
            raise Unsupported(what, where=str(self._folder / "tokenizer.json"), fix="One BOS or none is served")
        if front:  # tokenizer.json decides: Transformers 5 heeds it over an add_bos_token of false
            return front[0]
        return declared if self._config.get("add_bos_token") is True else None

    def _front(self, declared: int | None) -> list[int]:
        """What the post-processor adds before a text (not behind it: some models add EOS there)."""
        probe = "a"
        plain = self._core.encode(probe, add_special_tokens=False).ids
        full = self._core.encode(probe, add_special_tokens=True).ids
        if not plain:  # a vocabulary without the probe: the declared BOS is the only thing we can tell from an EOS
            return [i for i in full[:1] if i == declared]
        starts = (s for s in range(len(full)) if full[s : s + len(plain)] == plain)
        return list(full[: next(starts, 0)])

    def _behind(self) -> tuple[int, ...]:
        """What the post-processor adds behind a text."""
        plain, full = (self._core.encode("a", add_special_tokens=special).ids for special in (False, True))
        starts = (s for s in range(len(full)) if full[s : s + len(plain)] == plain)
        return tuple(full[next(starts, len(full)) + len(plain) :]) if plain else ()

    def _eos(self) -> tuple[int, ...]:
        given = self._config["_generation"].get("eos_token_id")
        ids = given if isinstance(given, list) else [given]
        token = self._token("eos_token")
        ids = [*ids, None if token is None else self._core.token_to_id(token)]
        bad = [i for i in ids if i is not None and (not isinstance(i, int) or isinstance(i, bool) or i < 0)]
        if bad:
            where = str(self._folder / "generation_config.json")
            raise InputCorrupt(f"eos_token_id {bad[0]!r} is no token id", where=where, fix="Give one id or a list")
        return tuple(dict.fromkeys(i for i in ids if i is not None))

    def _decode(self, ids: Iterable[int], skip_special: bool) -> str:
        numbers = [int(i) for i in ids]  # NumPy's integers too
        if any(i < 0 for i in numbers):
            raise ConfigError(f"{min(numbers)} is no token id", where="ids to decode", fix="Ids count from 0")
        numbers = [i for i in numbers if i < self.vocab_size]
        return str(self._core.decode(numbers, skip_special_tokens=skip_special))


class StreamDecoder:
    """Ids in one by one, whole characters out.

    An id may hold a part of a character, and what an id means can depend on the one before it (SentencePiece drops the
    first space of a text, and only that). So the ids of the last piece given out stay as context, and new ids wait
    until context plus new ids decode to more than the context, ending in a whole character.
    """

    def __init__(self, tokenizer: Tokenizer, *, skip_special: bool = True) -> None:
        self._tokenizer, self._skip_special = tokenizer, skip_special
        self._context: list[int] = []
        self._pending: list[int] = []

    def put(self, token: int) -> str:
        """Take one id, return the text it completes: often "", sometimes several characters."""
        if self._skip_special and token in self._tokenizer._special:
            return ""
        self._pending.append(int(token))
        text = self._new()
        if (not text or text.endswith(_REPLACEMENT)) and len(self._pending) < _PENDING:
            return ""
        self._give()
        return text

    def flush(self) -> str:
        """Return what is left at the end of a text: "" or characters that never became whole, as U+FFFD."""
        text = self._new() if self._pending else ""
        self._give()
        return text

    def _new(self) -> str:
        decode = self._tokenizer._decode
        before = decode(self._context, self._skip_special)
        after = decode(self._context + self._pending, self._skip_special)
        if after.startswith(before):
            return after[len(before) :]
        # New bytes that are not UTF-8 took the context's whole run of bytes with them. That text is out already.
        return decode(self._pending, self._skip_special)

    def _give(self) -> None:
        if self._pending:
            self._context, self._pending = self._pending, []


def _text(path: Path) -> str:
    """A file as UTF-8 text. Raises InputCorrupt, with the position, where it is not, and where it is too large."""
    if path.stat().st_size > MAX_JSON_BYTES:
        raise InputCorrupt(f"larger than {MAX_JSON_BYTES} bytes", where=str(path), fix="Fetch the file again")
    try:
        return path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputCorrupt(f"not UTF-8 at byte {error.start}", where=str(path), fix="Fetch the file again") from error


def _json(path: Path) -> dict[str, Any]:
    """A JSON object, {} where the file is not there."""
    if not path.is_file():
        return {}
    try:
        value = json.loads(_text(path))
    except (json.JSONDecodeError, RecursionError) as error:
        raise InputCorrupt(f"not JSON ({error})", where=str(path), fix="Fetch the file again") from error
    if not isinstance(value, dict):
        raise InputCorrupt("not a JSON object", where=str(path), fix="Fetch the file again")
    return value
