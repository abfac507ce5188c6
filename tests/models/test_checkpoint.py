"""What a checkpoint folder may hold, what is said when it does not, and that reading is by name, lazy and exact."""

import contextlib
import json
import shlex
import subprocess
import sys
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from lilliput.core.errors import InputCorrupt, InputMissing, InputUnsafe, LilliputError, Unsupported
from lilliput.models import Checkpoint, describe, load_block, load_decoder, load_ends
from support.families import FAMILIES, VOCAB, write_checkpoint


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    folder = tmp_path / "llama"
    FAMILIES["llama"](folder, 3)
    return folder


def edit_weights(folder: Path, **changes: torch.Tensor | None) -> None:
    tensors = load_file(folder / "model.safetensors") | {k.replace("__", "."): v for k, v in changes.items()}
    save_file({k: v for k, v in tensors.items() if v is not None}, folder / "model.safetensors")


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def shard(folder: Path) -> dict[str, Any]:
    """Cut the single file in two and write the index; return the index."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    files = {"model-00001-of-00002.safetensors": names[:5], "model-00002-of-00002.safetensors": names[5:]}
    for file, own in files.items():
        save_file({n: tensors[n] for n in own}, folder / file)
    index = {"metadata": {}, "weight_map": {n: f for f, own in files.items() for n in own}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return index


def test_names_shapes_and_tensors_are_canonical(llama: Path) -> None:
    checkpoint = Checkpoint.open(llama)
    stored = load_file(llama / "model.safetensors")
    assert checkpoint.names()[0] == "embed_tokens.weight"
    assert checkpoint.info("layers.1.attn.k_proj.weight").shape == (32, 64)
    name = "model.layers.1.self_attn.k_proj.weight"
    assert torch.equal(checkpoint.read("layers.1.attn.k_proj.weight"), stored[name])
    assert checkpoint.parameters == sum(t.numel() for t in stored.values())
    assert checkpoint.nbytes == 4 * checkpoint.parameters
    roles = [m.role for m in checkpoint.linears().values()]
    assert roles == ["embed", *(["attn"] * 4 + ["mlp"] * 3) * 2, "head"]
    with pytest.raises(KeyError):
        checkpoint.read("model.norm.weight")


def test_what_is_read_is_ours(llama: Path) -> None:
    checkpoint = Checkpoint.open(llama)
    before = checkpoint.fingerprint()
    checkpoint.read("final_norm.weight").zero_()
    assert checkpoint.read("final_norm.weight").abs().max() > 0
    assert Checkpoint.open(llama).fingerprint() == before
    edit_config(llama, rms_norm_eps=1e-5)
    assert Checkpoint.open(llama).fingerprint() != before


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_the_keys_of_the_decoder_are_the_canonical_names(family: str, tmp_path: Path) -> None:
    FAMILIES[family](tmp_path, 0)
    checkpoint = Checkpoint.open(tmp_path)
    decoder = load_decoder(checkpoint)
    assert set(decoder.state_dict()) == set(checkpoint.names())
    assert all(tuple(t.shape) == checkpoint.info(n).shape for n, t in decoder.state_dict().items())
    assert len(decoder.blocks) == checkpoint.spec.num_layers
    decoder(torch.arange(12)[None]).square().mean().backward()
    assert all(
        p.grad is not None and p.grad.abs().sum() > 0 for n, p in decoder.named_parameters() if "k_proj.bias" not in n
    )


def test_a_block_and_the_ends_load_alone(llama: Path) -> None:
    checkpoint = Checkpoint.open(llama)
    whole, ends = load_decoder(checkpoint), load_ends(checkpoint, torch.bfloat16)
    assert len(ends.blocks) == 0
    assert ends.embed_tokens.weight.dtype == torch.bfloat16
    block = load_block(checkpoint, 1)
    assert list(block.linears()) == list(checkpoint.spec.linears(1))
    hidden = whole.embed(torch.arange(9)[None])
    assert torch.equal(block(hidden), whole.blocks[1](hidden))


def test_half_precision_is_read_as_stored(llama: Path) -> None:
    half = {k.replace(".", "__"): v.to(torch.bfloat16) for k, v in load_file(llama / "model.safetensors").items()}
    edit_weights(llama, **half)
    checkpoint = Checkpoint.open(llama)
    assert checkpoint.info("lm_head.weight").dtype == "BF16"
    assert checkpoint.read("lm_head.weight").dtype == torch.bfloat16
    assert torch.isfinite(load_decoder(checkpoint, torch.bfloat16)(torch.arange(9)[None])).all()


def test_shards_read_like_one_file(llama: Path) -> None:
    before = {n: Checkpoint.open(llama).read(n) for n in Checkpoint.open(llama).names()}
    shard(llama)
    after = Checkpoint.open(llama)
    assert all(torch.equal(after.read(n), t) for n, t in before.items())
    assert len(after.files) == 2


def test_a_missing_shard_is_named(llama: Path) -> None:
    shard(llama)
    (llama / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(InputMissing, match=r"model-00002-of-00002\.safetensors, which .* names, is not there"):
        Checkpoint.open(llama)


@pytest.mark.parametrize("name", ["../evil.safetensors", "/etc/passwd", "a\\b.safetensors", "..", "c:x.safetensors"])
def test_an_index_cannot_lead_out_of_the_folder(name: str, llama: Path) -> None:
    index = shard(llama)
    index["weight_map"]["lm_head.weight"] = name
    (llama / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(InputUnsafe, match=r"names the file .*, which is not a plain name"):
        Checkpoint.open(llama)


def test_an_index_cannot_name_another_kind_of_file(llama: Path) -> None:
    index = shard(llama)
    index["weight_map"]["lm_head.weight"] = "pytorch_model.bin"
    (llama / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(InputUnsafe, match=r"names 'pytorch_model\.bin', which is not a safetensors file"):
        Checkpoint.open(llama)


@pytest.mark.parametrize("text", ["[]", "{", '{"weight_map": {}}', '{"weight_map": {"a": 1}}'])
def test_an_index_that_makes_no_sense_is_refused(text: str, llama: Path) -> None:
    shard(llama)
    (llama / "model.safetensors.index.json").write_text(text)
    with pytest.raises(InputCorrupt, match=r"model\.safetensors\.index\.json: (has no weight_map|is not valid JSON)"):
        Checkpoint.open(llama)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
def test_a_link_cannot_lead_out_of_the_folder(name: str, llama: Path, tmp_path: Path) -> None:
    (llama / name).rename(tmp_path / name)
    (llama / name).symlink_to(tmp_path / name)
    with pytest.raises(InputUnsafe, match=rf"{name} is a link that leads out of the folder"):
        Checkpoint.open(llama).tokenizer_files()


def test_the_links_of_the_hub_cache_are_followed(llama: Path, tmp_path: Path) -> None:
    snapshot, blobs = tmp_path / "models--o--n" / "snapshots" / "abc", tmp_path / "models--o--n" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for path in list(llama.iterdir()):
        path.rename(blobs / path.stem)
        (snapshot / path.name).symlink_to(Path("../../blobs") / path.stem)
    assert Checkpoint.open(snapshot).read("final_norm.weight").shape == (64,)


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputMissing, match=r"nowhere: there is no such folder\. Give a checkpoint folder, or a hub id"):
        Checkpoint.open(tmp_path / "nowhere")


def test_a_file_is_no_folder(llama: Path) -> None:
    with pytest.raises(InputMissing, match=r"model\.safetensors: is not a folder"):
        Checkpoint.open(llama / "model.safetensors")


def test_a_folder_without_weights_is_named(llama: Path) -> None:
    (llama / "model.safetensors").unlink()
    with pytest.raises(InputMissing, match=r"holds no model\.safetensors"):
        Checkpoint.open(llama)


def test_a_pickle_is_refused_with_a_command_that_converts_it(llama: Path) -> None:
    before = Checkpoint.open(llama).read("lm_head.weight")
    torch.save(load_file(llama / "model.safetensors"), llama / "pytorch_model.bin")
    (llama / "model.safetensors").unlink()
    with pytest.raises(
        InputUnsafe, match=r"pytorch_model\.bin is a pickle, and opening a pickle can run code"
    ) as caught:
        Checkpoint.open(llama)
    program, *arguments = shlex.split(caught.value.fix.removeprefix("Run ").split(" once, ")[0])
    assert program == "python"
    subprocess.run([sys.executable, *arguments], check=True)
    assert torch.equal(Checkpoint.open(llama).read("lm_head.weight"), before)


@pytest.mark.parametrize("name", ["model.pt", "model.pth", "model.ckpt"])
def test_other_pickles_are_refused_too(name: str, llama: Path) -> None:
    (llama / "model.safetensors").rename(llama / name)
    with pytest.raises(InputUnsafe, match=rf"{name} is a pickle"):
        Checkpoint.open(llama)


@pytest.mark.parametrize("keep", [0, 4, 100, -1])
def test_a_truncated_file_is_named(keep: int, llama: Path) -> None:
    data = (llama / "model.safetensors").read_bytes()
    (llama / "model.safetensors").write_bytes(data[:keep])
    with pytest.raises(InputCorrupt, match=r"model\.safetensors: is not a whole safetensors file"):
        Checkpoint.open(llama)


def test_missing_tensors_are_named(llama: Path) -> None:
    edit_weights(llama, model__norm__weight=None, lm_head__weight=None)
    with pytest.raises(InputMissing, match=r"the weight files lack model\.norm\.weight, lm_head\.weight\. "):
        Checkpoint.open(llama)


def test_tensors_without_a_place_are_named(llama: Path) -> None:
    edit_weights(llama, extra=torch.zeros(1), model__layers__0__self_attn__rotary_emb__inv_freq=torch.zeros(8))
    with pytest.raises(
        Unsupported, match=r"the weight files hold extra, which llama as config\.json describes it has no"
    ):
        Checkpoint.open(llama)
    edit_weights(llama, extra=None)
    assert Checkpoint.open(llama)


def test_a_wrong_shape_is_named(llama: Path) -> None:
    edit_config(llama, intermediate_size=97)
    says = r"safetensors: model\.layers\.0\.mlp\.gate_proj\.weight has shape \(96, 64\) where config\.json implies \(97, 64\)"
    with pytest.raises(InputCorrupt, match=says):
        Checkpoint.open(llama)


@pytest.mark.parametrize(
    ("dtype", "name"), [(torch.float64, "F64"), (torch.int8, "I8"), (torch.float8_e4m3fn, "F8_E4M3")]
)
def test_other_dtypes_are_refused(dtype: torch.dtype, name: str, llama: Path) -> None:
    edit_weights(llama, lm_head__weight=torch.zeros(VOCAB, 64).to(dtype))
    with pytest.raises(
        Unsupported, match=rf"lm_head\.weight is stored as {name}\. Only F32, F16, BF16 weights are served"
    ):
        Checkpoint.open(llama)


def test_a_value_that_is_not_finite_is_named(llama: Path) -> None:
    edit_weights(llama, lm_head__weight=torch.full((VOCAB, 64), float("inf")))
    with pytest.raises(InputCorrupt, match=r"model\.safetensors: lm_head\.weight holds NaN or infinity"):
        Checkpoint.open(llama).read("lm_head.weight")


def test_a_tied_head_that_is_stored_too_is_left_out(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, "llama", tie_word_embeddings=True)
    embed = load_file(tmp_path / "model.safetensors")["model.embed_tokens.weight"]
    edit_weights(tmp_path, lm_head__weight=embed.clone())
    assert "lm_head.weight" not in Checkpoint.open(tmp_path).names()
    edit_weights(tmp_path, lm_head__weight=embed + 1)
    with pytest.raises(
        InputCorrupt, match=r"tie_word_embeddings is true, yet lm_head\.weight differs from model\.embed"
    ):
        Checkpoint.open(tmp_path)


def test_a_hub_that_cannot_be_reached_is_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import huggingface_hub

    def refuse(*_: Any, **__: Any) -> str:
        raise ConnectionError("no route to host.\nand more")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    for opens in (Checkpoint.open, describe):
        with pytest.raises(
            InputMissing, match=r"^owner/name: .* fetched from the hub \(no route to host\)\. Check the name"
        ):
            opens("owner/name")


def test_a_hub_id_is_fetched_without_code_or_pickles(monkeypatch: pytest.MonkeyPatch, llama: Path) -> None:
    import huggingface_hub

    asked: dict[str, Any] = {}
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **kw: asked.update(kw) or str(llama))
    assert Checkpoint.open("owner/name", revision="abc").family == "llama"
    assert asked["revision"] == "abc"
    assert not any(p.endswith((".py", ".bin", ".pt")) or p == "*" for p in asked["allow_patterns"])


def test_a_hub_id_is_described_from_its_headers(monkeypatch: pytest.MonkeyPatch, llama: Path) -> None:
    import huggingface_hub

    stored = load_file(llama / "model.safetensors")
    header = SimpleNamespace(tensors={n: SimpleNamespace(dtype="F32", shape=list(t.shape)) for n, t in stored.items()})
    metadata = SimpleNamespace(files_metadata={"model.safetensors": header})
    expected = describe(llama)
    (llama / "model.safetensors").unlink()
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **kw: str(llama))
    monkeypatch.setattr(huggingface_hub, "get_safetensors_metadata", lambda name, **kw: metadata)
    assert describe("owner/name") == expected.model_copy(update={"source": "owner/name"})


def test_a_summary_says_what_would_happen(llama: Path) -> None:
    summary = describe(llama)
    assert (summary.family, summary.layers, summary.context, summary.tokenizer) == ("llama", 2, 256, "tokenizer.json")
    assert summary.dtypes == {"F32": summary.parameters}
    assert summary.quantizable[0] == "embedding: 1 matrix, 20,480 weights"
    assert summary.skipped == ["norms: 5 tensors, 320 weights, vectors"]
    assert summary.quantizable_parameters + 320 == summary.parameters


def test_describing_needs_no_torch(llama: Path) -> None:
    code = (
        "import sys; from lilliput.models import Checkpoint, describe; describe(sys.argv[1]); "
        "Checkpoint.open(sys.argv[1]).fingerprint(); sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code, str(llama)], check=True)


def test_the_tokenizer_is_copied(llama: Path, tmp_path: Path) -> None:
    (llama / "chat_template.jinja").write_text("{{ messages }}")
    found = {path.name for path in Checkpoint.open(llama).export_tokenizer(tmp_path / "out")}
    assert found == {"tokenizer.json", "generation_config.json", "chat_template.jinja"}
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (llama / "tokenizer.json").read_bytes()


def test_nothing_that_grants_trust_travels_with_the_tokenizer(llama: Path, tmp_path: Path) -> None:
    good = {"chat_template": "{{ messages }}", "extra": {"a": [1, {"b": 2}]}}
    bad = {
        "auto_map": {"AutoTokenizer": ["evil.T", None]},
        "_x": 1,
        "extra": {"a": [1, {"b": 2, "trust_remote_code": True}]},
    }
    (llama / "tokenizer_config.json").write_text(json.dumps(good | bad))
    Checkpoint.open(llama).export_tokenizer(tmp_path / "out")
    assert json.loads((tmp_path / "out" / "tokenizer_config.json").read_text()) == good
    (llama / "tokenizer_config.json").write_text("{")
    with pytest.raises(InputCorrupt, match=r"tokenizer_config\.json: is not valid JSON"):
        Checkpoint.open(llama).export_tokenizer(tmp_path / "out")


def test_a_slow_tokenizer_is_converted(llama: Path, tmp_path: Path) -> None:
    from tokenizers import Tokenizer

    whole = json.loads((llama / "tokenizer.json").read_text())
    (llama / "tokenizer.json").unlink()
    (llama / "vocab.json").write_text(json.dumps(whole["model"]["vocab"]))
    (llama / "merges.txt").write_text("\n".join(["#version: 0.2", *(" ".join(m) for m in whole["model"]["merges"])]))
    keys = {"tokenizer_class": "GPT2Tokenizer", "unk_token": "<s>", "bos_token": "<s>", "eos_token": "</s>"}
    (llama / "tokenizer_config.json").write_text(json.dumps(keys))
    found = {path.name for path in Checkpoint.open(llama).export_tokenizer(tmp_path / "out")}
    assert "tokenizer.json" in found
    tokenizer = Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json"))
    assert tokenizer.decode(tokenizer.encode("the thin hand", add_special_tokens=False).ids) == "the thin hand"


def test_no_tokenizer_is_said(llama: Path, tmp_path: Path) -> None:
    (llama / "tokenizer.json").unlink()
    with pytest.raises(InputMissing, match=r"holds no tokenizer\.json\. Put the model's tokenizer\.json there"):
        Checkpoint.open(llama).export_tokenizer(tmp_path / "out")


def test_a_tokenizer_that_cannot_be_converted_is_said(llama: Path, tmp_path: Path) -> None:
    (llama / "tokenizer.json").unlink()
    (llama / "tokenizer.model").write_bytes(b"not a model")
    with pytest.raises(Unsupported, match=r"its tokenizer (cannot be converted \(|has no fast form)"):
        Checkpoint.open(llama).export_tokenizer(tmp_path / "out")


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "model.safetensors.index.json"])
def test_a_damaged_file_opens_or_says_why(name: str, llama: Path) -> None:
    if "index" in name:
        shard(llama)
    whole = (llama / name).read_bytes()
    random = Random(0)
    for _ in range(150):
        data = bytearray(whole)
        for _ in range(random.randint(1, 3)):
            data[random.randrange(min(len(data), 3000))] = random.randrange(256)
        (llama / name).write_bytes(data[: random.randrange(len(data))] if random.random() < 0.2 else data)
        with contextlib.suppress(LilliputError):
            Checkpoint.open(llama)
