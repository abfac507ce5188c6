"""Architectures as data: a TOML in `arch/` says how a config becomes a ModelSpec and where each tensor comes from.

The words a TOML may use are the fields of `Architecture`. `like = "llama"` starts from another TOML and overrides parts
of it. Nothing here imports torch.
"""

import math
import tomllib
from collections.abc import Iterator, Sequence
from functools import cache
from importlib.resources import files
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from lilliput.core.errors import InputCorrupt, Unsupported
from lilliput.core.spec import Activation, ModelSpec, Norm, QKNorm, Rotary
from lilliput.models.rope import rotary

_ACTIVATIONS: dict[str, Activation] = {
    "silu": "silu",
    "swish": "silu",
    "relu": "relu",
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_accurate": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_python_tanh": "gelu_tanh",
}


class Words(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Key(Words):
    """A config key, or several of which the first that is not null counts; `default` where the file has none of them."""

    key: str | list[str]
    default: bool | int | float | str | None = None

    def of(self, config: dict[str, Any]) -> Any:
        """Return the value in `config`: null where the file says null, `default` where it says nothing."""
        present = [config[k] for k in ([self.key] if isinstance(self.key, str) else self.key) if k in config]
        return next((v for v in present if v is not None), None if present else self.default)

    def or_default(self, config: dict[str, Any]) -> Any:
        """Return the value in `config`, or `default` where the file says null or nothing."""
        value = self.of(config)
        return self.default if value is None else value


class NormWords(Words):
    kind: Literal["rms", "layer"]
    eps: Key | float
    offset: float = 0.0

    def of(self, config: dict[str, Any]) -> Norm:
        eps = self.eps.of(config) if isinstance(self.eps, Key) else self.eps
        return Norm(kind=self.kind, eps=eps, offset=self.offset)


class QKNormWords(NormWords):
    when: Key | bool = True
    per_head: bool = False


class RopeWords(Words):
    """Where the rotation's numbers stand outside `rope_parameters` and `rope_scaling`, which come first."""

    theta: Key = Key(key="rope_theta", default=10000.0)
    partial: Key | None = None
    """None: the whole head turns, and a config that says otherwise is refused."""
    aliases: dict[str, str] = {}
    """Other names of rope types in this family."""


class WindowWords(Words):
    """Which layers see a sliding window of `size` tokens.

    all: every layer. even: layers 0, 2, ..; from_layer: those from the key `first` on. A `layer_types` list in the
    config overrides the last two.
    """

    layers: Literal["all", "even", "from_layer"]
    size: Key
    first: Key | None = None
    when: Key | None = None


class Refusal(Words):
    """A key with only one value that we serve: `only`, or that of the key `same_as`."""

    key: str
    only: bool | int | str | None = None
    same_as: str | None = None
    why: str


class Source(Words):
    """Where a canonical module's weight and bias stand in the checkpoint, without `.weight` and `.bias`.

    `{p}` is the prefix, `{i}` the layer, `{h}` the head (one tensor a head, stacked). Several names are alternatives.
    `fused` lists the modules that share the matrix: layout "rows" is one after the other, "heads" head by head.
    flat: the weight is stored with more axes, (out, ..), those behind the first being one here. bare: the weight is
    stored under the name itself.
    """

    name: str | list[str]
    bias: Key | bool = False
    fused: list[str] = []
    layout: Literal["rows", "heads"] = "rows"
    flat: bool = False
    bare: bool = False

    @property
    def names(self) -> list[str]:
        """All alternatives."""
        return [self.name] if isinstance(self.name, str) else self.name


class Architecture(Words):
    """One family: names it goes by, rules from config keys to a ModelSpec, and the source of each canonical module."""

    family: str
    model_types: list[str]
    classes: list[str]
    prefixes: list[str]
    """Alternatives for `{p}`."""
    ignore: list[str] = []
    """Endings of checkpoint tensors that carry nothing: cached masks and frequencies."""
    vocab_size: Key
    hidden_size: Key
    num_layers: Key
    num_heads: Key
    num_kv_heads: Key | None = None
    """Null means num_heads."""
    head_dim: Key | None = None
    """Null means hidden_size / num_heads."""
    intermediate_size: Key
    context: Key
    norm: NormWords
    activation: Key
    gelu_is_tanh: bool = False
    """The config says "gelu" and means its tanh form (Gemma)."""
    gated_mlp: bool = True
    rope: RopeWords | None = None
    position_offset: int | None = None
    qk_norm: QKNormWords | None = None
    parallel_block: Key | bool = False
    shared_block_norm: Key | bool = False
    post_norms: bool = False
    attn_scale_from: Key | None = None
    """The number whose inverse root scales the scores; null means head_dim."""
    attn_softcap: Key | None = None
    logit_softcap: Key | None = None
    embed_scale: Literal["none", "sqrt_hidden"] = "none"
    window: WindowWords | None = None
    tied_head: Key
    refuse: list[Refusal] = []
    modules: dict[str, Source] = Field(repr=False)
    """Canonical module names, `layers.{i}.` included, to their sources."""

    def spec(self, config: dict[str, Any], *, where: str) -> ModelSpec:
        """Return the ModelSpec that a filtered config describes. `where` names the file in errors.

        Raises Unsupported for a feature the family has and we do not, InputCorrupt for a value that cannot be.
        """
        for rule in self.refuse:
            refuse(rule, config, where)
        size = self._sizes(config, where)
        rope = self._rope(config, size, where)
        qk = self.qk_norm if self.qk_norm and _switch(self.qk_norm.when, config) else None
        scale_from = (self.attn_scale_from and self.attn_scale_from.of(config)) or size["head_dim"]
        fields = {
            **size,
            "family": self.family,
            "norm": self.norm.of(config),
            "activation": self._activation(config, where),
            "gated_mlp": self.gated_mlp,
            "rotary": rope[0],
            "context": rope[1],
            "position_offset": self.position_offset,
            "qk_norm": qk and QKNorm(norm=qk.of(config), per_head=qk.per_head),
            "parallel_block": _switch(self.parallel_block, config),
            "shared_block_norm": _switch(self.shared_block_norm, config),
            "post_norms": self.post_norms,
            "attn_scale": scale_from**-0.5,
            "attn_softcap": self.attn_softcap and self.attn_softcap.of(config),
            "logit_softcap": self.logit_softcap and self.logit_softcap.of(config),
            "embed_scale": math.sqrt(size["hidden_size"]) if self.embed_scale == "sqrt_hidden" else 1.0,
            "windows": self._windows(config, size["num_layers"], where),
            "tied_head": self.tied_head.of(config),
        }
        try:
            return ModelSpec.model_validate(fields)
        except ValidationError as error:
            first = error.errors(include_url=False, include_context=False)[0]
            what = f"{'.'.join(map(str, first['loc']))} is {first['input']!r}: {first['msg']}"
            raise InputCorrupt(what, where=where, fix="Correct config.json, or download it again") from None

    def notes(self, config: dict[str, Any]) -> tuple[str, ...]:
        """Return, as sentences, what this family's config promises and we do not serve."""
        rope = self._rope_keys(config)
        trained = rope.get("original_max_position_embeddings")
        if (rope.get("rope_type") or rope.get("type")) == "longrope" and trained and trained < self.context.of(config):
            return (f"The context is limited to the {trained} tokens of the short rotary factors",)
        return ()

    def skips(self, name: str) -> bool:
        """Whether a checkpoint tensor carries nothing."""
        return name.endswith(tuple(self.ignore) or ("\0",))

    def _sizes(self, config: dict[str, Any], where: str) -> dict[str, int]:
        names = ("vocab_size", "hidden_size", "num_layers", "num_heads", "intermediate_size")
        size = {name: getattr(self, name).of(config) for name in names}
        for name, value in size.items():
            if value is None:
                key = getattr(self, name).key
                raise InputCorrupt(f"lacks {key}", where=where, fix="Download config.json again")
        heads = size["num_heads"]
        size["num_kv_heads"] = (self.num_kv_heads and self.num_kv_heads.of(config)) or heads
        size["head_dim"] = self.head_dim and self.head_dim.of(config)
        if heads % size["num_kv_heads"]:
            what = f"{size['num_kv_heads']} key/value heads do not divide {heads} heads"
            raise InputCorrupt(what, where=where, fix="Correct num_key_value_heads")
        if size["head_dim"] is None:
            if size["hidden_size"] % heads:
                what = f"{heads} heads do not divide hidden_size {size['hidden_size']}"
                raise InputCorrupt(what, where=where, fix="Correct num_attention_heads, or give head_dim")
            size["head_dim"] = size["hidden_size"] // heads
        return size

    def _activation(self, config: dict[str, Any], where: str) -> Activation:
        name = self.activation.or_default(config)
        if name not in _ACTIVATIONS:
            known = ", ".join(_ACTIVATIONS)
            raise Unsupported(f"activation {name!r}", where=where, fix=f"Known activations are {known}")
        found = _ACTIVATIONS[name]
        return "gelu_tanh" if found == "gelu" and self.gelu_is_tanh else found

    def _rope_keys(self, config: dict[str, Any]) -> dict[str, Any]:
        """Return the rope dictionary of either style of config, with keys outside it moved in."""
        if self.rope is None:
            return {}
        inside = config.get("rope_scaling") or config.get("rope_parameters") or {}
        rope = {k: v for k, v in inside.items() if v is not None}
        kind = rope.get("rope_type") or rope.get("type") or "default"
        rope["rope_type"] = self.rope.aliases.get(kind, kind)
        if config.get("original_max_position_embeddings") and kind != "default":
            rope["original_max_position_embeddings"] = config["original_max_position_embeddings"]
        return rope

    def _rope(self, config: dict[str, Any], size: dict[str, int], where: str) -> tuple[Rotary | None, int]:
        """Return the Rotary, or None, and the context in tokens."""
        context: int = self.context.or_default(config)
        if self.rope is None:
            return None, context
        rope, named = self._rope_keys(config), self.rope.partial
        partial = rope.get("partial_rotary_factor") or (named.of(config) if named else None)
        if named is None and (config.get("partial_rotary_factor") or partial or 1.0) != 1.0:
            what = f"rotation of a part of the head in the {self.family} family"
            raise Unsupported(what, where=where, fix="Only a partial_rotary_factor of 1 is served here")
        dim = int(size["head_dim"] * (partial if named and partial else 1.0))
        theta = rope.get("rope_theta") or self.rope.theta.or_default(config)
        turned = rotary(rope, dim=dim, theta=theta, context=context, where=where)
        if rope["rope_type"] == "longrope":
            context = min(context, rope.get("original_max_position_embeddings") or context)
        return turned, context

    def _windows(self, config: dict[str, Any], layers: int, where: str) -> tuple[int, ...]:
        """Return the window of each layer, 0 for none."""
        rule = self.window
        size = rule.size.of(config) if rule and (rule.when is None or rule.when.of(config)) else None
        if rule is None or size is None:
            return (0,) * layers
        types = config.get("layer_types")
        if rule.layers == "all":
            slides = [True] * layers
        elif types is not None:
            slides = [_slides(kind, where) for kind in types]
        elif rule.layers == "even":
            slides = [i % 2 == 0 for i in range(layers)]
        else:
            first = rule.first.of(config) if rule.first else 0
            slides = [i >= first for i in range(layers)]
        if len(slides) != layers:
            what = f"layer_types has {len(slides)} entries for {layers} layers"
            raise InputCorrupt(what, where=where, fix="Correct config.json, or download it again")
        return tuple(size if slide else 0 for slide in slides)


def modules(spec: ModelSpec) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield the canonical modules that a spec has and the shape of each one's weight, in order of use."""
    hidden = (spec.hidden_size,)
    yield "embed_tokens", (spec.vocab_size, spec.hidden_size)
    if spec.position_offset is not None:
        yield "embed_positions", (spec.context + spec.position_offset, spec.hidden_size)
    for i in range(spec.num_layers):
        yield from block_modules(spec, i)
    yield "final_norm", hidden
    if not spec.tied_head:
        yield "lm_head", (spec.vocab_size, spec.hidden_size)


def block_modules(spec: ModelSpec, layer: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield one block's canonical modules and the shape of each one's weight, in order of use."""
    base, hidden = f"layers.{layer}", (spec.hidden_size,)
    linears = list(spec.linears(layer).items())
    yield f"{base}.attn_norm", hidden
    yield from linears[:4]
    if spec.qk_norm:
        for name, heads in (("q_norm", spec.num_heads), ("k_norm", spec.num_kv_heads)):
            yield f"{base}.attn.{name}", (heads, spec.head_dim) if spec.qk_norm.per_head else (spec.head_dim,)
    if spec.post_norms:
        yield f"{base}.attn_post_norm", hidden
    if not spec.shared_block_norm:
        yield f"{base}.mlp_norm", hidden
    yield from linears[4:]
    if spec.post_norms:
        yield f"{base}.mlp_post_norm", hidden


@cache
def architectures() -> dict[str, Architecture]:
    """Return every architecture we know, by family."""
    texts = {f.name[: -len(".toml")]: f.read_text("utf-8") for f in _toml_files()}
    raw = {name: tomllib.loads(text) for name, text in sorted(texts.items())}
    return {name: Architecture.model_validate(resolve(name, raw)) for name in raw}


def find_architecture(config: dict[str, Any], *, where: str, also: Sequence[str] = ()) -> Architecture:
    """Return the architecture that a filtered config names. `where` names the file in errors, `also` further classes.

    Both names must agree where both are given: a class we do not know may compute something else with the same tensors.
    Raises Unsupported, with what is known, for an unknown class or model type.
    """
    kind, classes = config.get("model_type"), config.get("architectures") or []
    for arch in architectures().values():
        named = any(name in arch.classes for name in classes) if classes else True
        if named and (kind in arch.model_types if kind else bool(classes)):
            return arch
    name = classes[0] if classes else kind
    known = ", ".join([*(arch.classes[0] for arch in architectures().values()), *also])
    what = f"architecture {name!r}" + (f" of model type {kind!r}" if classes and kind else "") + " is not served"
    raise Unsupported(what, where=where, fix=f"Known are {known}")


def _toml_files() -> list[Any]:
    return [f for f in (files("lilliput.models") / "arch").iterdir() if f.name.endswith(".toml")]


def resolve(name: str, raw: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Return a TOML with what it is `like` filled in; modules merge one by one, all else is replaced whole."""
    own = dict(raw[name])
    if "like" not in own:
        return own
    base = resolve(own.pop("like"), raw)
    return {**base, **own, "modules": {**base["modules"], **own.get("modules", {})}}


def _switch(rule: Key | bool, config: dict[str, Any]) -> bool:
    return rule if isinstance(rule, bool) else bool(rule.of(config))


def refuse(rule: Refusal, config: dict[str, Any], where: str) -> None:
    """Raise Unsupported where the config has another value than the one served."""
    value = config.get(rule.key)
    only = config.get(rule.same_as) if rule.same_as else rule.only
    if value is not None and value != only:
        raise Unsupported(f"{rule.key} is {value}: {rule.why}", where=where, fix=f"Only {rule.key} = {only} is served")


def _slides(kind: str, where: str) -> bool:
    if kind not in ("full_attention", "sliding_attention"):
        raise Unsupported(f"layer type {kind!r}", where=where, fix="Known are full_attention and sliding_attention")
    return kind == "sliding_attention"
