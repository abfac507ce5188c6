"""The only door for a config.json: an allow-list of keys, each with a type and a range.

Whatever is not listed here is dropped before any other code sees it: underscore keys, `auto_map`, nested trust flags,
anything a library may one day read as permission to run code. Nothing here imports torch or transformers.
"""

import json
from pathlib import Path
from typing import Annotated, Any, NoReturn, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from lilliput.core.errors import InputCorrupt, InputMissing, Unsupported

MAX_CONFIG_BYTES = 1 << 20

_Width = Annotated[int, Field(gt=0, le=1 << 20)]
_Heads = Annotated[int, Field(gt=0, le=4096)]
_Layers = Annotated[int, Field(gt=0, le=1000)]
_Tokens = Annotated[int, Field(gt=0, le=1 << 26)]
_Token = Annotated[int, Field(ge=-1, le=1 << 22)]  # -1 is how some configs say "none"
_Positive = Annotated[float, Field(gt=0, le=1e12)]
_Share = Annotated[float, Field(gt=0, le=1)]
_Word = Annotated[str, Field(pattern=r"^[A-Za-z0-9_.+-]{1,64}$")]
_Words = Annotated[list[_Word], Field(max_length=1000)]
_Pixels = Annotated[int, Field(gt=0, le=1 << 14)]
_Triple = Annotated[list[float], Field(min_length=3, max_length=3)]
_Factors = Annotated[list[_Positive], Field(max_length=4096)]


class _Listed(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore", allow_inf_nan=False)


Keys = TypeVar("Keys", bound=_Listed)


class RopeKeys(_Listed):
    """What may stand inside `rope_parameters` or `rope_scaling`."""

    rope_type: _Word | None = None
    type: _Word | None = None
    rope_theta: _Positive | None = None
    partial_rotary_factor: _Share | None = None
    factor: _Positive | None = None
    attention_factor: _Positive | None = None
    original_max_position_embeddings: _Tokens | None = None
    low_freq_factor: _Positive | None = None
    high_freq_factor: _Positive | None = None
    short_factor: _Factors | None = None
    long_factor: _Factors | None = None


class TowerKeys(_Listed):
    """What may stand inside `text_config` and `vision_config`."""

    vocab_size: Annotated[int, Field(gt=0, le=1 << 22)] | None = None
    hidden_size: _Width | None = None
    intermediate_size: _Width | None = None
    num_hidden_layers: _Layers | None = None
    num_attention_heads: _Heads | None = None
    max_position_embeddings: _Tokens | None = None
    hidden_act: _Word | None = None
    layer_norm_eps: Annotated[float, Field(gt=0, le=1)] | None = None
    image_size: _Pixels | None = None
    patch_size: _Pixels | None = None
    num_channels: Annotated[int, Field(gt=0, le=64)] | None = None


class ConfigKeys(_Listed):
    """What may stand in a config.json. Every key is optional here; the architecture says what it needs."""

    model_type: _Word | None = None
    architectures: _Words | None = None
    dtype: _Word | None = None
    torch_dtype: _Word | None = None
    transformers_version: _Word | None = None

    vocab_size: Annotated[int, Field(gt=0, le=1 << 22)] | None = None
    hidden_size: _Width | None = None
    intermediate_size: _Width | None = None
    ffn_dim: _Width | None = None
    word_embed_proj_dim: _Width | None = None
    num_hidden_layers: _Layers | None = None
    num_attention_heads: _Heads | None = None
    num_key_value_heads: _Heads | None = None
    head_dim: Annotated[int, Field(gt=0, le=8192)] | None = None
    max_position_embeddings: _Tokens | None = None
    original_max_position_embeddings: _Tokens | None = None

    hidden_act: _Word | None = None
    hidden_activation: _Word | None = None
    activation_function: _Word | None = None
    rms_norm_eps: Annotated[float, Field(gt=0, le=1)] | None = None
    layer_norm_eps: Annotated[float, Field(gt=0, le=1)] | None = None
    tie_word_embeddings: bool | None = None
    attention_bias: bool | None = None
    mlp_bias: bool | None = None
    use_qkv_bias: bool | None = None
    enable_bias: bool | None = None
    qk_layernorm: bool | None = None
    use_parallel_residual: bool | None = None
    do_layer_norm_before: bool | None = None
    layer_norm_elementwise_affine: bool | None = None
    use_bidirectional_attention: bool | None = None

    type_vocab_size: Annotated[int, Field(ge=0, le=1 << 16)] | None = None
    position_embedding_type: _Word | None = None
    is_decoder: bool | None = None
    add_cross_attention: bool | None = None
    projection_dim: _Width | None = None
    text_config: TowerKeys | None = None
    vision_config: TowerKeys | None = None

    rope_theta: _Positive | None = None
    rotary_emb_base: _Positive | None = None
    rotary_pct: _Share | None = None
    partial_rotary_factor: _Share | None = None
    rope_parameters: RopeKeys | None = None
    rope_scaling: RopeKeys | None = None

    sliding_window: _Tokens | None = None
    use_sliding_window: bool | None = None
    max_window_layers: Annotated[int, Field(ge=0, le=1000)] | None = None
    layer_types: _Words | None = None
    query_pre_attn_scalar: _Tokens | _Positive | None = None
    attn_logit_softcapping: _Positive | None = None
    final_logit_softcapping: _Positive | None = None

    bos_token_id: _Token | None = None
    eos_token_id: _Token | Annotated[list[_Token], Field(max_length=64)] | None = None
    pad_token_id: _Token | None = None


class PoolingKeys(_Listed):
    """What may stand in 1_Pooling/config.json: which of these makes one vector of a text's tokens."""

    pooling_mode_cls_token: bool = False
    pooling_mode_mean_tokens: bool = False
    pooling_mode_max_tokens: bool = False
    pooling_mode_mean_sqrt_len_tokens: bool = False
    pooling_mode_weightedmean_tokens: bool = False
    pooling_mode_lasttoken: bool = False


class PreprocessorKeys(_Listed):
    """What may stand in preprocessor_config.json. The sizes are a number or {"shortest_edge"} or {"height", "width"}."""

    size: _Pixels | dict[str, _Pixels]
    crop_size: _Pixels | dict[str, _Pixels]
    resample: int = 3
    image_mean: _Triple
    image_std: _Triple
    do_resize: bool = True
    do_center_crop: bool = True
    do_rescale: bool = True
    do_normalize: bool = True
    rescale_factor: float = 1 / 255


def read_pooling(path: Path) -> dict[str, Any]:
    """Return the listed keys of a 1_Pooling/config.json. Raises as `read_config` does."""
    return _checked(PoolingKeys, _json(path), str(path)).model_dump()


def read_modules(path: Path) -> list[str]:
    """Return the kinds of module that a sentence encoder's modules.json lists. Raises as `read_config` does."""
    found = _json(path)
    if not isinstance(found, list) or not all(isinstance(one, dict) for one in found):
        raise InputCorrupt("is not a list of modules", where=str(path), fix="Download it again")
    return [str(one.get("type", "")).rpartition(".")[2] for one in found]


def read_preprocessor(path: Path) -> dict[str, Any]:
    """Return resize, crop, resample, mean and std of a preprocessor_config.json.

    Raises as `read_config` does, and Unsupported where pictures are prepared in another way.
    """
    found = _checked(PreprocessorKeys, _json(path), str(path))
    sizes = [s if isinstance(s, dict) else {"shortest_edge": s} for s in (found.size, found.crop_size)]
    resize, crop = (set(s.values()) if s.keys() <= {"shortest_edge", "height", "width"} else set() for s in sizes)
    whole = found.do_resize and found.do_center_crop and found.do_rescale and found.do_normalize
    filters = {2: "bilinear", 3: "bicubic"}
    if not whole or "shortest_edge" not in sizes[0] or len(resize) != 1 or len(crop) != 1:
        what = "pictures are not prepared by bringing the shorter side to a size, cutting out a square and normalising"
        raise Unsupported(what, where=str(path), fix="Only that is served")
    if found.resample not in filters or abs(found.rescale_factor * 255 - 1) > 1e-6 or min(found.image_std) <= 0:
        what = f"resample is {found.resample}, rescale_factor {found.rescale_factor} and image_std {found.image_std}"
        fix = "Served are resample 2 and 3, a rescale_factor of 1/255 and positive deviations"
        raise Unsupported(what, where=str(path), fix=fix)
    kind, mean, std = filters[found.resample], tuple(found.image_mean), tuple(found.image_std)
    return {"resize": resize.pop(), "crop": crop.pop(), "resample": kind, "mean": mean, "std": std}


def read_config(path: Path) -> dict[str, Any]:
    """Return the listed keys of a config.json, checked; keys that are null in the file stay, as None.

    Raises InputMissing when there is no such file; InputCorrupt when it is over 1 MiB, not a JSON object or has a value
    outside its range; Unsupported when its weights are quantized already.
    """
    return filter_config(_json(path), where=str(path))


def _json(path: Path) -> Any:
    """Return what a JSON file of a checkpoint holds."""
    if not path.is_file():
        raise InputMissing(
            "there is no config.json", where=str(path.parent), fix="Give a folder that holds a checkpoint"
        )
    try:
        with path.open("rb") as file:
            data = file.read(MAX_CONFIG_BYTES + 1)
    except OSError as error:
        raise InputMissing(f"cannot be read ({error.strerror})", where=str(path), fix="Check its permissions") from None
    if len(data) > MAX_CONFIG_BYTES:
        raise InputCorrupt(f"is larger than {MAX_CONFIG_BYTES} bytes", where=str(path), fix="Download it again")
    try:
        return json.loads(data.decode("utf-8-sig"), parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise InputCorrupt(f"is not valid JSON ({error})", where=str(path), fix="Download it again") from None


def filter_config(raw: Any, *, where: str) -> dict[str, Any]:
    """Return the listed keys of a parsed config. `where` names it in errors. Raises as `read_config` does."""
    for key in () if not isinstance(raw, dict) else ("quantization_config", "compression_config"):
        if raw.get(key):
            what = f"has a {key}, so its weights are quantized already"
            raise Unsupported(what, where=where, fix="Give the float checkpoint that it was made from")
    return _checked(ConfigKeys, raw, where).model_dump(exclude_unset=True)


def _checked(keys: type[Keys], raw: Any, where: str) -> Keys:
    if not isinstance(raw, dict):
        raise InputCorrupt("is not a JSON object", where=where, fix="Download it again")
    try:
        return keys.model_validate(raw)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        key = ".".join(str(part) for part in first["loc"] if str(part).isidentifier())  # without names of types
        what = f"{key} is {_short(first['input'])}: {first['msg'][:1].lower()}{first['msg'][1:]}"
        raise InputCorrupt(what, where=where, fix="Correct the value, or download the file again") from None


def without_trust(value: Any) -> Any:
    """Return a parsed JSON value less every key, at any depth, that a library could read as leave to run code.

    For the JSON files that travel with a tokenizer, whose keys are too many to list. An equal value means it had none.
    """
    if isinstance(value, dict):
        return {k: without_trust(v) for k, v in value.items() if not _grants_trust(k)}
    return [without_trust(v) for v in value] if isinstance(value, list) else value


def _grants_trust(key: str) -> bool:
    return key == "auto_map" or key.startswith("_") or "trust" in key.lower()


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number")


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
