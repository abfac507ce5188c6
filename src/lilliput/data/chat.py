"""Chat templates: code that came with a model, run where it can reach nothing and stop nothing.

The language is Jinja, in its immutable sandbox: no dunder attributes, no changes to what it is given, no files. The
sandbox bounds neither time nor memory, so every loop turn and macro call is counted, and what multiplies text is
checked before it is done. All limits are counts, not seconds: a template passes or fails the same on every machine.
"""

import hashlib
import json
import re
import threading
from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from typing import Any, Final

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.visitor
from jinja2.exceptions import SecurityError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from lilliput.core.errors import ConfigError, InputCorrupt, InputUnsafe

OPTIONS: Final = frozenset({"tools", "documents", "enable_thinking", "date_string"})
"""What a caller may pass to a template beyond messages and add_generation_prompt; never the names we set ourselves."""
MAX_SOURCE: Final = 1 << 20
"""Characters of a template."""
MAX_OUTPUT: Final = 1 << 24
"""Characters of a prompt, and of any text a template makes on the way."""
MAX_STEPS: Final = 200_000
"""Loop turns and macro calls of one rendering."""

_PADDING: Final = frozenset({"center", "ljust", "rjust", "zfill", "expandtabs"})
"""Methods of str that make much text of a small number; no chat template we know of needs one."""
_WIDE = re.compile(r"\d{4,}|%[^%a-zA-Z]*\*|\{[^{}]*\{")
"""In a format, % or {}: a width of four digits, or one that an argument decides."""


class ChatTemplate:
    """One compiled template. sha256: of its source in UTF-8, to show and to compare."""

    def __init__(self, source: str, tokens: Mapping[str, str], *, where: str = "chat template") -> None:
        """tokens: special tokens by name, "bos_token": "<s>", for the template to write. Raises InputCorrupt."""
        self.sha256 = hashlib.sha256(source.encode("utf-8", "surrogatepass")).hexdigest()
        self._tokens, self._where, self._lock = dict(tokens), where, threading.Lock()
        self._environment = _Sandbox()
        if len(source) > MAX_SOURCE:
            raise InputCorrupt(f"{len(source)} characters long", where, f"A template has at most {MAX_SOURCE}")
        try:
            self._template = self._environment.from_string(source)
        except (jinja2.TemplateSyntaxError, RecursionError, OverflowError, SyntaxError) as error:
            raise InputCorrupt(f"does not parse ({error})", where, "Fetch the model's template again") from error

    def render(
        self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = True, **options: Any
    ) -> str:
        """Return the prompt. Raises ConfigError, InputUnsafe; see `Tokenizer.render_chat`."""
        unknown = sorted(set(options) - OPTIONS)
        if unknown:
            fix = f"Templates take {', '.join(sorted(OPTIONS))}"
            raise ConfigError(f"{unknown[0]!r} is not an option", self._where, fix)
        given = {**self._tokens, "tools": None, "documents": None, **options}
        given |= {"messages": [dict(m) for m in messages], "add_generation_prompt": add_generation_prompt}
        pieces, size = [], 0
        try:
            with self._lock:  # the count of steps belongs to the environment
                self._environment.steps = 0
                for piece in self._template.generate(given):
                    size += len(piece)
                    _bounded(size)
                    pieces.append(piece)
        except SecurityError as error:
            raise InputUnsafe(f"refused ({error})", self._where, "Use a template from a source you trust") from error
        except (RecursionError, MemoryError, OverflowError) as error:
            what = f"refused (it ran into {type(error).__name__})"
            raise InputUnsafe(what, self._where, "Use a template from a source you trust") from error
        except (jinja2.TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError) as error:
            fix = "Check the order of the roles and the fields of the messages"
            raise ConfigError(f"does not take these messages ({error})", self._where, fix) from error
        return "".join(pieces)


def _bounded(size: int) -> None:
    if size > MAX_OUTPUT:
        raise SecurityError(f"text of {size} characters, above the limit of {MAX_OUTPUT}")


def _narrow(template: Any) -> None:
    if isinstance(template, bytes) or _WIDE.search(str(template)):
        raise SecurityError("text formatting with a wide field")


def _size(value: Any) -> int:
    return len(value) if isinstance(value, str | bytes | list | tuple) else 0


def _raise_exception(message: str) -> None:
    """What templates call to refuse messages."""
    raise jinja2.TemplateError(message)


def _tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None, **style: Any) -> str:
    """JSON as Transformers writes it into prompts; Jinja's own filter escapes for HTML."""
    if indent is not None and not 0 <= indent <= 16:
        raise SecurityError(f"an indent of {indent}")
    separators = style.get("separators")
    text = json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=None if separators is None else (str(separators[0]), str(separators[1])),
        sort_keys=bool(style.get("sort_keys", False)),
    )
    _bounded(len(text))
    return text


def _growth(name: str, text: Any, args: Sequence[Any]) -> int:
    """Characters that `text.name(*args)` may come to, at most."""
    if name == "replace":
        return (len(str(text)) + 1) * max(1, *(_size(a) for a in args)) if args else 0
    if name == "join":
        parts = args[0] if args else ()
        return sum(_size(p) for p in parts) + len(text) * len(parts) if isinstance(parts, list | tuple) else 0
    return 0


def _checked(filter_: Callable[..., Any], name: str) -> Callable[..., Any]:
    """A filter of Jinja's that first says how much text it may make."""

    @wraps(filter_)  # Jinja finds on the function what to pass first: the environment or its evaluation context
    def bounded(first: Any, *args: Any, **kwargs: Any) -> Any:
        value, given = (args[0], args[1:]) if hasattr(filter_, "jinja_pass_arg") else (first, args)
        given = (*given, *kwargs.values())
        if name == "format":
            _narrow(value)
        elif name == "replace":
            _bounded(_growth(name, value, given))
        elif name == "join":
            separator = str(given[0]) if given else ""
            _bounded(_growth(name, separator, (value,)))
        elif name == "indent":
            widths = [len(a) if isinstance(a, str) else int(a) for a in given[:1]]
            _bounded(len(value) + sum(widths) * (str(value).count("\n") + 1))
        return filter_(first, *args, **kwargs)

    return bounded


class _Generation(jinja2.ext.Extension):
    """`{% generation %}`, by which templates mark what the model wrote: only training reads the marks."""

    tags = frozenset({"generation"})  # type: ignore[assignment]

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Counted(jinja2.visitor.NodeTransformer):
    """Puts a step into each loop turn and macro call, and checks in place of "a ~ b"."""

    def _call(self, name: str, args: list[jinja2.nodes.Expr], line: int) -> jinja2.nodes.Call:
        return jinja2.nodes.Call(jinja2.nodes.EnvironmentAttribute(name), args, [], None, None, lineno=line)

    def _stepped(self, node: Any) -> Any:
        node = self.generic_visit(node)
        node.body.insert(0, jinja2.nodes.ExprStmt(self._call("step", [], node.lineno), lineno=node.lineno))
        return node

    visit_For = visit_Macro = visit_CallBlock = _stepped

    def visit_Concat(self, node: jinja2.nodes.Concat) -> jinja2.nodes.Node:
        self.generic_visit(node)
        return self._call("concat_checked", node.nodes, node.lineno)


class _Sandbox(ImmutableSandboxedEnvironment):
    """Jinja's immutable sandbox with the settings Transformers renders with, and limits it lacks."""

    intercepted_binops = frozenset({"+", "*", "**", "%"})
    steps: int = 0

    def __init__(self) -> None:
        # No loader: include, import and extends have nothing to read. No autoescape: a prompt is not HTML.
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols, _Generation])
        self.filters["tojson"] = _tojson
        for name in ("batch", "center", "pprint", "random", "slice", "urlize", "wordwrap", "xmlattr"):
            del self.filters[name]  # they make much of little, or differ from run to run; no template needs them
        for name in ("format", "indent", "join", "replace"):
            self.filters[name] = _checked(self.filters[name], name)
        # No strftime_now: the same chat gives the same prompt on every day. Templates fall back to their own date.
        self.globals = {"raise_exception": _raise_exception, "range": self._range, "namespace": jinja2.utils.Namespace}
        self.globals["dict"] = dict

    def step(self) -> str:
        """Count one turn of a loop; called by the compiled template."""
        self._spend(1)
        return ""

    def concat_checked(self, *parts: Any) -> str:
        """The operator `~`."""
        texts = [str(part) for part in parts]
        _bounded(sum(map(len, texts)))
        return "".join(texts)

    def call(self, context: jinja2.runtime.Context, obj: Any, /, *args: Any, **kwargs: Any) -> Any:
        owner = getattr(obj, "__self__", None)
        if isinstance(owner, str) and (name := getattr(obj, "__name__", "")) in ("join", "replace"):
            _bounded(_growth(name, owner, args))
        return super().call(context, obj, *args, **kwargs)

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        if isinstance(obj, str) and attr in _PADDING:
            return False
        return super().is_safe_attribute(obj, attr, value)

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        wrapped = super().wrap_str_format(value)
        if wrapped is not None:
            _narrow(value.__self__)
        return wrapped

    def call_binop(self, context: jinja2.runtime.Context, operator: str, left: Any, right: Any) -> Any:
        if operator == "+":
            _bounded(_size(left) + _size(right))
        elif operator == "*":
            for text, count in ((left, right), (right, left)):
                if _size(text) and isinstance(count, int):
                    _bounded(_size(text) * count)
        elif operator == "**" and not (abs(left) <= 1 << 20 and abs(right) <= 16):
            raise SecurityError("a power of large numbers")
        elif operator == "%" and isinstance(left, str | bytes):
            _narrow(left)
        return super().call_binop(context, operator, left, right)

    def _range(self, *args: int) -> range:
        numbers = range(*args)
        self._spend(len(numbers))
        return numbers

    def _spend(self, count: int) -> None:
        self.steps += count
        if self.steps > MAX_STEPS:
            raise SecurityError(f"more than {MAX_STEPS} steps")

    def _parse(self, source: str, name: str | None, filename: str | None) -> jinja2.nodes.Template:
        tree = _Counted().visit(super()._parse(source, name, filename))
        tree.set_environment(self)
        return tree  # type: ignore[no-any-return]
