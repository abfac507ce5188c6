"""Nothing that is not listed passes from a config.json, and what passes has a sane value."""

import json
from pathlib import Path
from typing import Any

import pytest

from lilliput.core.errors import InputCorrupt, InputMissing, Unsupported
from lilliput.models.architecture import architectures, find_architecture
from lilliput.models.config import MAX_CONFIG_BYTES, filter_config, read_config

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
}


def spec(**changes: Any) -> Any:
    config = filter_config(LLAMA | changes, where="config.json")
    return find_architecture(config, where="config.json").spec(config, where="config.json")


def test_nothing_that_grants_trust_passes() -> None:
    bad = {
        "auto_map": {"AutoModelForCausalLM": "evil.Model"},
        "trust_remote_code": True,
        "_attn_implementation": "evil/kernel",
        "_name_or_path": "evil/model",
        "custom_pipelines": {"x": {"impl": "evil.Pipe"}},
        "text_config": {"trust_remote_code": True},
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 1e4,
            "trust_remote_code": True,
            "_x": 1,
            "auto_map": {},
        },
        "tokenizer_class": "Evil",
    }
    found = filter_config(LLAMA | bad, where="config.json")
    assert found == LLAMA | {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}, "text_config": {}}


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"num_hidden_layers": 1001}, r"config\.json: num_hidden_layers is 1001: .* less than or equal to 1000\. "),
        ({"num_hidden_layers": 0}, r"num_hidden_layers is 0"),
        ({"hidden_size": -64}, r"hidden_size is -64"),
        ({"hidden_size": True}, r"hidden_size is True: input should be a valid integer"),
        ({"hidden_size": "64"}, r"hidden_size is '64'"),
        ({"vocab_size": 2**22 + 1}, r"vocab_size is 4194305"),
        ({"rms_norm_eps": float("nan")}, r"rms_norm_eps is nan"),
        ({"hidden_act": "silu; rm -rf /"}, r"hidden_act is 'silu; rm -rf /'"),
        ({"rope_scaling": {"factor": -1.0}}, r"rope_scaling\.factor is -1\.0"),
        ({"eos_token_id": ["2"]}, r"eos_token_id is "),
        ({"architectures": "LlamaForCausalLM"}, r"architectures is 'LlamaForCausalLM'"),
    ],
)
def test_a_value_outside_its_range_is_refused(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(InputCorrupt, match=says):
        filter_config(LLAMA | changes, where="config.json")


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"[1]", r"config\.json: is not a JSON object\. "),
        (b"{", r"is not valid JSON \("),
        (b'{"vocab_size": NaN}', r"is not valid JSON \(NaN is not a JSON number\)"),
        (b"\xff\xfe", r"is not valid JSON \("),
        (b"[" * 200_000, r"is not valid JSON \("),
        (b" " * (MAX_CONFIG_BYTES + 1), r"is larger than 1048576 bytes"),
    ],
)
def test_a_file_that_is_no_config_is_refused(data: bytes, says: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(data)
    with pytest.raises(InputCorrupt, match=says):
        read_config(tmp_path / "config.json")


def test_a_missing_config_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputMissing, match=r"there is no config\.json\. Give a folder that holds a checkpoint\.$"):
        read_config(tmp_path / "config.json")


def test_a_quantized_checkpoint_is_refused() -> None:
    with pytest.raises(Unsupported, match=r"has a quantization_config, so its weights are quantized already") as caught:
        filter_config(LLAMA | {"quantization_config": {"quant_method": "gptq"}}, where="config.json")
    assert caught.value.exit_code == 4


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"architectures": ["MambaForCausalLM"], "model_type": "mamba"}, r"'MambaForCausalLM' of model type 'mamba'"),
        ({"architectures": ["EvilLlamaForCausalLM"]}, r"'EvilLlamaForCausalLM' of model type 'llama' is not served"),
        ({"architectures": None, "model_type": "bert"}, r"architecture 'bert' is not served\. Known are GemmaFor"),
        ({"architectures": ["LlamaForCausalLM"], "model_type": "mistral"}, r"of model type 'mistral'"),
    ],
)
def test_an_unknown_architecture_is_one_line_with_what_is_known(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(Unsupported, match=says) as caught:
        spec(**changes)
    assert "LlamaForCausalLM" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 4


@pytest.mark.parametrize("kind", ["yarn", "dynamic", "proportional"])
def test_a_rotary_kind_we_do_not_serve_is_named(kind: str) -> None:
    with pytest.raises(
        Unsupported, match=rf"rotary embedding of type '{kind}'\. Known types are default, linear, llama3, "
    ):
        spec(rope_scaling={"type": kind, "factor": 2.0})


@pytest.mark.parametrize(
    ("changes", "error", "says"),
    [
        ({"num_key_value_heads": 3}, InputCorrupt, r"3 key/value heads do not divide 4 heads"),
        ({"hidden_size": 66}, InputCorrupt, r"4 heads do not divide hidden_size 66"),
        ({"head_dim": 15}, InputCorrupt, r"over 15 channels of a head, which is not a positive even number"),
        ({"hidden_act": "mish"}, Unsupported, r"activation 'mish'\. Known activations are silu, "),
        ({"rope_scaling": {"type": "linear"}}, InputCorrupt, r"rotary embedding lacks factor"),
        ({"partial_rotary_factor": 0.5}, Unsupported, r"rotation of a part of the head in the llama family"),
        ({"hidden_size": None}, InputCorrupt, r"lacks hidden_size"),
        ({"rope_theta": 1e-300}, InputCorrupt, r"rotary embedding turns by .* radians a token"),
    ],
)
def test_values_that_do_not_fit_each_other_are_refused(changes: dict[str, Any], error: Any, says: str) -> None:
    with pytest.raises(error, match=says):
        spec(**changes)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"do_layer_norm_before": False}, r"do_layer_norm_before is False: norms after the residual \(OPT 350m\)"),
        ({"word_embed_proj_dim": 32}, r"word_embed_proj_dim is 32: projected embeddings \(OPT 350m\) are not served"),
    ],
)
def test_opt_350m_is_refused_in_one_line(changes: dict[str, Any], says: str) -> None:
    opt = {"architectures": ["OPTForCausalLM"], "model_type": "opt", "word_embed_proj_dim": 64, "ffn_dim": 96}
    with pytest.raises(Unsupported, match=says):
        spec(**(opt | changes))


def test_both_styles_of_config_say_the_same() -> None:
    llama3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
    old = spec(rope_theta=5e5, rope_scaling={"rope_type": "llama3", **llama3}, torch_dtype="bfloat16")
    new = spec(rope_parameters={"rope_type": "llama3", "rope_theta": 5e5, **llama3}, dtype="bfloat16")
    assert old == new
    assert old.rotary.inv_freq != spec(rope_theta=5e5).rotary.inv_freq
    neox = {"architectures": ["GPTNeoXForCausalLM"], "model_type": "gpt_neox"}
    old = spec(**neox, rotary_pct=0.5, rotary_emb_base=500)
    assert old == spec(
        **neox, rope_parameters={"rope_type": "default", "rope_theta": 500.0, "partial_rotary_factor": 0.5}
    )
    assert old.rotary.dim == 8
    assert spec(**neox).rotary.dim == 4


def test_longrope_limits_the_context_and_says_so() -> None:
    keys = {"short_factor": [1.0] * 8, "long_factor": [4.0] * 8, "type": "su"}
    phi = {"architectures": ["Phi3ForCausalLM"], "model_type": "phi3", "original_max_position_embeddings": 64}
    config = filter_config(LLAMA | phi | {"rope_scaling": keys}, where="config.json")
    arch = find_architecture(config, where="config.json")
    assert arch.spec(config, where="config.json").context == 64
    assert arch.notes(config) == ("The context is limited to the 64 tokens of the short rotary factors",)
    assert arch.notes(filter_config(LLAMA | phi, where="config.json")) == ()


def test_windows_follow_the_rules_of_their_family() -> None:
    qwen = {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "num_hidden_layers": 4, "sliding_window": 8}
    qwen["num_key_value_heads"] = 2
    assert spec(**qwen).windows == (0, 0, 0, 0)
    assert spec(**qwen, use_sliding_window=True, max_window_layers=3).windows == (0, 0, 0, 8)
    gemma = {"architectures": ["Gemma2ForCausalLM"], "model_type": "gemma2", "num_hidden_layers": 3}
    gemma["head_dim"] = 16
    assert spec(**gemma).windows == (4096, 0, 4096)
    mistral = {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "num_key_value_heads": 2}
    assert spec(**mistral).windows == (4096, 4096)
    assert spec(**mistral, sliding_window=None).windows == (0, 0)
    with pytest.raises(InputCorrupt, match=r"layer_types has 1 entries for 3 layers"):
        spec(**gemma, layer_types=["full_attention"])
    with pytest.raises(Unsupported, match=r"layer type 'chunked_attention'"):
        spec(**gemma, layer_types=["chunked_attention"] * 3)


@pytest.mark.parametrize("name", sorted(architectures()))
def test_every_family_explains_every_module_it_can_have(name: str) -> None:
    arch = architectures()[name]
    assert arch.family == name
    assert {"embed_tokens", "final_norm", "lm_head", "layers.{i}.mlp.down_proj"} <= set(arch.modules)
    assert ("layers.{i}.mlp.gate_proj" in arch.modules) == arch.gated_mlp
    assert ("layers.{i}.attn.q_norm" in arch.modules) == (arch.qk_norm is not None)
    assert ("embed_positions" in arch.modules) == (arch.position_offset is not None)


def test_the_filtered_config_is_json() -> None:
    found = filter_config(LLAMA | {"rope_scaling": {"type": "linear", "factor": 2}}, where="config.json")
    assert json.loads(json.dumps(found)) == found


def test_a_config_that_cannot_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def deny(*_: Any, **__: Any) -> Any:
        raise PermissionError(13, "Permission denied")

    (tmp_path / "config.json").write_text("{}")
    monkeypatch.setattr(Path, "open", deny)
    with pytest.raises(InputMissing, match=r"config\.json: cannot be read \(Permission denied\)"):
        read_config(tmp_path / "config.json")


REAL: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    # What published configs say, as far as it concerns us, and what it must mean.
    "Llama 3.2 1B": (
        {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "head_dim": 64,
            "hidden_size": 2048,
            "intermediate_size": 8192,
            "max_position_embeddings": 131072,
            "num_attention_heads": 32,
            "num_hidden_layers": 16,
            "num_key_value_heads": 8,
            "rms_norm_eps": 1e-05,
            "rope_scaling": {
                "factor": 32.0,
                "high_freq_factor": 4.0,
                "low_freq_factor": 1.0,
                "original_max_position_embeddings": 8192,
                "rope_type": "llama3",
            },
            "rope_theta": 500000.0,
            "tie_word_embeddings": True,
            "vocab_size": 128256,
            "eos_token_id": [128001, 128008, 128009],
        },
        {"head_dim": 64, "tied_head": True, "context": 131072},
    ),
    "Gemma 2B": (
        {
            "architectures": ["GemmaForCausalLM"],
            "model_type": "gemma",
            "head_dim": 256,
            "hidden_act": "gelu",
            "hidden_activation": None,
            "hidden_size": 2048,
            "intermediate_size": 16384,
            "num_attention_heads": 8,
            "num_hidden_layers": 18,
            "num_key_value_heads": 1,
            "rope_scaling": None,
            "vocab_size": 256000,
        },
        {"activation": "gelu_tanh", "tied_head": True, "num_kv_heads": 1},
    ),
    "Pythia 70m": (
        {
            "architectures": ["GPTNeoXForCausalLM"],
            "model_type": "gpt_neox",
            "hidden_act": "gelu",
            "hidden_size": 512,
            "intermediate_size": 2048,
            "num_attention_heads": 8,
            "num_hidden_layers": 6,
            "rotary_emb_base": 10000,
            "rotary_pct": 0.25,
            "use_parallel_residual": True,
            "vocab_size": 50304,
        },
        {"parallel_block": True, "shared_block_norm": False, "tied_head": False, "num_kv_heads": 8, "gated_mlp": False},
    ),
    "OPT 125m": (
        {
            "architectures": ["OPTForCausalLM"],
            "model_type": "opt",
            "_remove_final_layer_norm": False,
            "do_layer_norm_before": True,
            "ffn_dim": 3072,
            "hidden_size": 768,
            "num_attention_heads": 12,
            "num_hidden_layers": 12,
            "vocab_size": 50272,
            "word_embed_proj_dim": 768,
        },
        {"rotary": None, "position_offset": 2, "tied_head": True, "activation": "relu", "head_dim": 64},
    ),
    "StableLM 2 1.6B": (
        {
            "architectures": ["StableLmForCausalLM"],
            "model_type": "stablelm",
            "hidden_size": 2048,
            "intermediate_size": 5632,
            "num_attention_heads": 32,
            "num_hidden_layers": 24,
            "num_key_value_heads": 32,
            "partial_rotary_factor": 0.25,
            "rope_theta": 10000,
            "use_qkv_bias": True,
            "vocab_size": 100352,
        },
        {"qk_norm": None, "parallel_block": False},
    ),
}


@pytest.mark.parametrize("name", REAL)
def test_published_configs_mean_what_they_say(name: str) -> None:
    raw, expected = REAL[name]
    config = filter_config(raw, where=name)
    found = find_architecture(config, where=name).spec(config, where=name)
    assert {key: getattr(found, key) for key in expected} == expected
