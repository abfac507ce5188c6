"""Encoders as data: a TOML in `arch/encoders/` says how a config becomes an EncoderSpec, tower by tower.

A checkpoint of several towers, such as CLIP's, has a TOML for each; which one is meant is the caller's to say. Nothing
here imports torch.
"""

import tomllib
from collections.abc import Iterator
from functools import cache
from importlib.resources import files
from typing import Any, Literal

from pydantic import Field, ValidationError

from lilliput.core.errors import ConfigError, InputCorrupt, Unsupported
from lilliput.core.spec import EncoderActivation, EncoderSpec, PatchInputs, TokenInputs
from lilliput.models.architecture import Key, NormWords, Refusal, Source, Words, refuse, resolve

_ACTIVATIONS: dict[str, EncoderActivation] = {
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "quick_gelu": "quick_gelu",
    "relu": "relu",
}
Beside = dict[str, Any]
"""What stands in the small files beside config.json: "pooling", "modules", "preprocessor", each absent with its file."""


class EncoderArchitecture(Words):
    """One tower of one family: names it goes by, rules from config keys to an EncoderSpec, and each module's source."""

    family: str
    tower: str = ""
    """What `--tower` calls it; empty where the checkpoint has no other."""
    section: str = ""
    """The key of the config whose value holds this tower's keys."""
    model_types: list[str]
    classes: list[str]
    prefixes: list[str]
    ignore: list[str] = Field(default=[])
    elsewhere: list[str] = Field(default=[])
    """Beginnings of checkpoint tensors that are no part of this tower."""
    input: Literal["tokens", "patches"]
    vocab_size: Key | None = None
    types: Key | None = None
    image_size: Key | None = None
    patch_size: Key | None = None
    hidden_size: Key
    num_layers: Key
    num_heads: Key
    intermediate_size: Key
    context: Key
    """Of no meaning with patches, whose number it is."""
    norm: NormWords
    activation: Key
    norm_first: bool
    causal: bool = False
    embed_norm: bool
    final_norm: bool
    pooling: Literal["mean", "first", "last", "stated"]
    """stated: 1_Pooling/config.json, as sentence encoders have it, says which; the mean where there is no such file."""
    projection: Key | None = None
    refuse: list[Refusal] = Field(default=[])
    modules: dict[str, Source] = Field(repr=False)

    def spec(self, config: dict[str, Any], beside: Beside, *, where: str) -> EncoderSpec:
        """Return the EncoderSpec that a filtered config describes. `where` names the file in errors.

        Raises Unsupported for a feature the family has and we do not, InputCorrupt for a value that cannot be.
        """
        keys = {**(config.get(self.section) or {}), **config} if self.section else config
        for rule in self.refuse:
            refuse(rule, keys, where)
        if strange := sorted(set(beside.get("modules", ())) - {"Transformer", "Pooling", "Normalize"}):
            what = f"modules.json puts {' and '.join(strange)} behind the encoder"
            raise Unsupported(what, where=where, fix="Only Pooling and Normalize are served there")
        name = self.activation.or_default(keys)
        if name not in _ACTIVATIONS:
            raise Unsupported(
                f"activation {name!r}", where=where, fix=f"Known activations are {', '.join(_ACTIVATIONS)}"
            )
        inputs = self._patches(keys, beside, where) if self.input == "patches" else self._tokens(keys)
        try:
            return EncoderSpec(
                kind="encoder",
                family=self.family,
                inputs=inputs,
                context=inputs.patches + 1 if isinstance(inputs, PatchInputs) else self.context.or_default(keys),
                norm=self.norm.of(keys),
                activation=_ACTIVATIONS[name],
                pooling=self._pooling(beside, where),
                projection=self.projection and self.projection.or_default(keys),
                **{n: getattr(self, n).or_default(keys) for n in _SIZES},
                **{n: getattr(self, n) for n in ("norm_first", "causal", "embed_norm", "final_norm")},
            )
        except ValidationError as error:
            first = error.errors(include_url=False, include_context=False)[0]
            what = f"{'.'.join(map(str, first['loc'])) or 'a size'} is wrong: {first['msg']}"
            raise InputCorrupt(what, where=where, fix="Correct config.json, or download it again") from None

    def skips(self, name: str) -> bool:
        """Whether a checkpoint tensor carries nothing for this tower."""
        return name.endswith(tuple(self.ignore) or ("\0",)) or name.startswith(tuple(self.elsewhere) or ("\0",))

    def notes(self, config: dict[str, Any], beside: Beside) -> tuple[str, ...]:
        """Return, as sentences, what the checkpoint leaves open or promises and we do not serve."""
        found = []
        if self.pooling == "stated" and "pooling" not in beside:
            found.append("No 1_Pooling/config.json says how a text's vector is made; the mean over its tokens is taken")
        if self.tower:
            found.append(f"This is the {self.tower} tower alone, without the pair's logit_scale")
        return tuple(found)

    def _tokens(self, keys: dict[str, Any]) -> TokenInputs:
        assert self.vocab_size is not None, "a TOML of texts has it"
        return TokenInputs(
            vocab_size=self.vocab_size.or_default(keys), types=self.types.or_default(keys) if self.types else 0
        )

    def _patches(self, keys: dict[str, Any], beside: Beside, where: str) -> PatchInputs:
        assert self.image_size is not None, "a TOML of pictures has it"
        assert self.patch_size is not None, "likewise"
        told, size = beside.get("preprocessor"), self.image_size.or_default(keys)
        place = where.replace("config.json", "preprocessor_config.json")
        if told is None:
            fix = "Put the model's preprocessor_config.json into the folder"
            raise InputCorrupt("says how pictures are prepared and is not there", where=place, fix=fix)
        if told["crop"] != size:
            what = f"pictures are cut to {told['crop']} pixels and the model takes {size}"
            raise InputCorrupt(what, where=place, fix="Check that it belongs to config.json")
        sizes = {"image_size": size, "patch_size": self.patch_size.or_default(keys)}
        return PatchInputs(**sizes, **{k: told[k] for k in ("resize", "resample", "mean", "std")})

    def _pooling(self, beside: Beside, where: str) -> Literal["mean", "first", "last"]:
        if self.pooling != "stated":
            return self.pooling
        modes = [k.removeprefix("pooling_mode_") for k, v in beside.get("pooling", {"mean_tokens": True}).items() if v]
        if modes not in (["mean_tokens"], ["cls_token"]):
            what = f"1_Pooling/config.json asks for {' and '.join(modes) or 'nothing'}"
            raise Unsupported(what, where=where, fix="Served are mean_tokens and cls_token")
        return "mean" if modes == ["mean_tokens"] else "first"


_SIZES = ("hidden_size", "num_layers", "num_heads", "intermediate_size")


def encoder_modules(spec: EncoderSpec) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield the canonical modules that a spec has and the shape of each one's weight, in order of use."""
    hidden = (spec.hidden_size,)
    matrices = spec.matrices()
    yield spec.entrance, matrices[spec.entrance]
    if isinstance(spec.inputs, PatchInputs):
        yield "embed_class", hidden
    yield "embed_positions", (spec.context, spec.hidden_size)
    if isinstance(spec.inputs, TokenInputs) and spec.inputs.types:
        yield "embed_types", (spec.inputs.types, spec.hidden_size)
    if spec.embed_norm:
        yield "embed_norm", hidden
    for layer in range(spec.num_layers):
        linears = list(spec.linears(layer).items())
        for norm, part in (("attn", linears[:4]), ("mlp", linears[4:])):
            if spec.norm_first:
                yield f"layers.{layer}.{norm}_norm", hidden
            yield from part
            if not spec.norm_first:
                yield f"layers.{layer}.{norm}_post_norm", hidden
    if spec.final_norm:
        yield "final_norm", hidden
    if spec.projection:
        yield "projection", matrices["projection"]


@cache
def encoder_architectures() -> dict[str, EncoderArchitecture]:
    """Return every tower we know, by family."""
    found = [f for f in (files("lilliput.models") / "arch" / "encoders").iterdir() if f.name.endswith(".toml")]
    raw = {f.name.removesuffix(".toml"): tomllib.loads(f.read_text("utf-8")) for f in found}
    return {name: EncoderArchitecture.model_validate(resolve(name, raw)) for name in sorted(raw)}


def find_encoder(config: dict[str, Any], tower: str | None, *, where: str) -> EncoderArchitecture | None:
    """Return the tower of an encoder that a filtered config names, None where it names no encoder.

    Raises ConfigError when there are several and `tower` is none of them.
    """
    kind, classes = config.get("model_type"), config.get("architectures") or []
    towers = [
        arch
        for arch in encoder_architectures().values()
        if any(name in arch.classes for name in classes) and (kind is None or kind in arch.model_types)
    ]
    names = [arch.tower for arch in towers if arch.tower]
    if not towers or (not names and tower is None):
        return towers[0] if towers else None
    if not names:
        raise ConfigError(f"has no {tower} tower, being one encoder", where=where, fix="Leave --tower out")
    if tower not in names:
        what = f"holds the towers {' and '.join(names)}"
        raise ConfigError(what, where=where, fix=f"Say which with {' or '.join('--tower ' + name for name in names)}")
    return towers[names.index(tower)]
