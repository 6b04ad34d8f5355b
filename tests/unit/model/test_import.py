"""What an import does not understand, it refuses by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models

from cloister.cli import main
from cloister.errors import (
    CheckpointError,
    NonFiniteTensor,
    OutputExists,
    SettingError,
    TensorMismatch,
    UnsupportedArchitecture,
    UnsupportedFeature,
    VocabularyMismatch,
)
from cloister.model.checkpoint import Checkpoint, expected_tensors
from cloister.model.huggingface import read_config
from cloister.model.imports import check, import_model

CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 50,
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "rms_norm_eps": 1e-5,
    "hidden_act": "silu", "tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": 2,
    "rope_theta": 10000.0, "torch_dtype": "bfloat16",
}


def write(directory: Path, **changes: Any) -> Path:
    """A tiny Llama in the layout of the Hub, written by hand, always the same."""
    directory.mkdir(exist_ok=True)
    rng = torch.Generator().manual_seed(0)
    config = {key: value for key, value in {**CONFIG, **changes}.items() if value is not ...}
    (directory / "config.json").write_text(json.dumps(config))
    tensors = {
        "model.embed_tokens.weight": torch.randn(50, 32, generator=rng),
        "model.norm.weight": torch.ones(32),
        "lm_head.weight": torch.randn(50, 32, generator=rng),
    }
    for layer in range(2):
        prefix = f"model.layers.{layer}."
        for name, shape in (
            ("self_attn.q_proj", (32, 32)), ("self_attn.k_proj", (16, 32)),
            ("self_attn.v_proj", (16, 32)), ("self_attn.o_proj", (32, 32)),
            ("mlp.gate_proj", (64, 32)), ("mlp.up_proj", (64, 32)), ("mlp.down_proj", (32, 64)),
            ("input_layernorm", (32,)), ("post_attention_layernorm", (32,)),
        ):
            tensors[f"{prefix}{name}.weight"] = torch.randn(shape, generator=rng).bfloat16()
    save_file(tensors, directory / "model.safetensors")
    Tokenizer(models.WordLevel({f"w{i}": i for i in range(50)}, unk_token="w0")).save(
        str(directory / "tokenizer.json")
    )
    return directory


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write(tmp_path / "hub")


def change(directory: Path, edit: Any) -> None:
    tensors = load_file(directory / "model.safetensors")
    edit(tensors)
    save_file(tensors, directory / "model.safetensors")


def test_an_import_keeps_types_template_and_special_tokens(source: Path, tmp_path: Path) -> None:
    (source / "tokenizer_config.json").write_text(json.dumps(
        {"chat_template": "{{ messages }}", "x_token": "w3", "eos_token": "w9"}))
    (source / "generation_config.json").write_text('{"eos_token_id": [2, 7]}')
    checkpoint = import_model(source, tmp_path / "out", context=64)
    assert checkpoint.tensor("layers.0.mlp.up.weight").dtype is torch.bfloat16
    assert checkpoint.tensor("embed.weight").dtype is torch.float32
    assert checkpoint.metadata.eos == (2, 7, 9)
    assert checkpoint.metadata.bos == 1
    assert checkpoint.metadata.special_tokens == {"eos_token": "w9", "x_token": "w3"}
    assert checkpoint.metadata.config.shape.context == 64
    assert checkpoint.template_path is not None
    assert checkpoint.template_path.read_text() == "{{ messages }}"


@pytest.mark.parametrize("name", [
    "MambaForCausalLM", "Qwen2_5_VLForConditionalGeneration", "LlavaForConditionalGeneration",
    "Gemma3nForConditionalGeneration", "Gemma4ForConditionalGeneration", None,
])
def test_an_unknown_architecture_is_refused_by_name(tmp_path: Path, name: str | None) -> None:
    source = write(tmp_path / "hub", architectures=[name] if name else ...)
    with pytest.raises(UnsupportedArchitecture, match=name or "unnamed"):
        import_model(source, tmp_path / "out")


@pytest.mark.parametrize(("changes", "match"), [
    ({"hidden_act": "relu"}, "relu"),
    ({"quantization_config": {"bits": 4}}, "quantization_config"),
    ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "dynamic"),
    ({"rope_scaling": {"rope_type": "longrope", "factor": 2.0}}, "longrope"),
    ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0, "mscale": 0.7}}, "mscale"),
    ({"surprising_switch": 3}, "surprising_switch"),
    ({"layer_types": ["full_attention", "linear_attention"]}, "layer_types"),
])
def test_an_unknown_feature_is_refused_by_name(
    tmp_path: Path, changes: dict[str, Any], match: str
) -> None:
    with pytest.raises(UnsupportedFeature, match=match):
        import_model(write(tmp_path / "hub", **changes), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("changes", "match"), [
    ({"hidden_size": ...}, "hidden_size"), ({"vocab_size": "50"}, "vocab_size"),
    ({"tie_word_embeddings": 1}, "tie_word_embeddings"),
])
def test_a_field_that_is_missing_or_of_the_wrong_type_is_refused_by_name(
    tmp_path: Path, changes: dict[str, Any], match: str
) -> None:
    with pytest.raises(CheckpointError, match=match):
        import_model(write(tmp_path / "hub", **changes), tmp_path / "out")


def test_both_spellings_of_rotary_scaling_are_one(tmp_path: Path) -> None:
    scaling = {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }
    old = read_config(write(tmp_path / "old", rope_scaling=scaling, rope_theta=5e5))
    new = read_config(write(
        tmp_path / "new", rope_theta=..., rope_parameters={**scaling, "rope_theta": 5e5}
    ))
    assert old == new
    assert old.rope_scaling is not None


@pytest.mark.parametrize(("edit", "match"), [
    (lambda t: t.pop("model.layers.1.mlp.up_proj.weight"), r"layers\.1\.mlp\.up"),
    (lambda t: t.pop("lm_head.weight"), r"head\.weight; set tie_word_embeddings"),
    (lambda t: t.update({"model.layers.0.self_attn.q_proj.bias": torch.zeros(32)}), "q_proj.bias"),
    (lambda t: t.update({"surprise": torch.zeros(1)}), "surprise"),
    (lambda t: t.update({"norm.weight": torch.zeros(32)}), r"has tensor norm\.weight"),
    (lambda t: t.update({"model.layers.2.input_layernorm.weight": torch.ones(32)}), r"layers\.2"),
    (lambda t: t.update({"model.norm.weight": torch.ones(31)}), r"norm"),
    (lambda t: t.update({"model.norm.weight": torch.ones(32, dtype=torch.int64)}), r"I64"),
    (lambda t: t.update({"model.norm.weight": torch.ones(32).to(torch.float8_e4m3fn)}),
     r"F8_E4M3, and Cloister reads F32"),
])
def test_a_tensor_that_is_missing_extra_or_odd_is_refused_by_name(
    source: Path, tmp_path: Path, edit: Any, match: str
) -> None:
    change(source, edit)
    with pytest.raises(TensorMismatch, match=match):
        import_model(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_tensor_that_is_not_finite_is_refused_and_nothing_is_left(
    source: Path, tmp_path: Path
) -> None:
    change(source, lambda t: t["model.norm.weight"].fill_(float("nan")))
    with pytest.raises(NonFiniteTensor, match=r"model\.norm"):
        import_model(source, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hub"]


def test_a_model_that_others_made_is_never_replaced(source: Path, tmp_path: Path) -> None:
    with pytest.raises(OutputExists, match="no checkpoint"):
        import_model(source, source, replace=True)
    assert import_model(source, tmp_path / "out").metadata.name == "hub"


def test_a_shared_matrix_may_be_stored_twice_if_it_is_the_same(tmp_path: Path) -> None:
    source = write(tmp_path / "hub", tie_word_embeddings=True)
    with pytest.raises(TensorMismatch, match="differ"):
        import_model(source, tmp_path / "out")
    change(source, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    assert import_model(source, tmp_path / "out").metadata.config.shape.tied


def test_a_shared_matrix_may_be_stored_under_the_name_of_the_head_alone(tmp_path: Path) -> None:
    source = write(tmp_path / "hub", tie_word_embeddings=True)
    embedding = "model.embed_tokens.weight"
    value = load_file(source / "model.safetensors")[embedding]
    change(source, lambda t: (t.pop(embedding), t.update({"lm_head.weight": value})))
    check(source)
    assert torch.equal(import_model(source, tmp_path / "out").tensor("embed.weight"), value)


def test_a_number_of_layers_that_no_file_holds_is_refused_at_once(tmp_path: Path) -> None:
    source = write(tmp_path / "hub")
    record = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**record, "num_hidden_layers": 2**24}))
    with pytest.raises(TensorMismatch, match="16777216 layers"):
        import_model(source, tmp_path / "out")


def test_pickled_weights_are_never_read(source: Path, tmp_path: Path) -> None:
    (source / "model.safetensors").unlink()
    torch.save({"x": torch.zeros(1)}, source / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="safetensors"):
        import_model(source, tmp_path / "out")


def divide(directory: Path, *, keep_whole: bool = False) -> None:
    """Store the weights in two shards and an index, as a larger model's."""
    tensors = load_file(directory / "model.safetensors")
    names = sorted(tensors)
    parts = {"model-00001-of-00002.safetensors": names[:9],
             "model-00002-of-00002.safetensors": names[9:]}
    for file, held in parts.items():
        save_file({name: tensors[name] for name in held}, directory / file)
    (directory / "model.safetensors.index.json").write_text(json.dumps({
        "weight_map": {name: file for file, held in parts.items() for name in held}}))
    if not keep_whole:
        (directory / "model.safetensors").unlink()


def test_shards_are_read_as_their_index_says(source: Path, tmp_path: Path) -> None:
    before = import_model(source, tmp_path / "whole")
    divide(source)
    after = import_model(source, tmp_path / "divided")
    assert all(
        torch.equal(before.tensor(name), after.tensor(name)) for name in expected_tensors(
            before.metadata.config))


def test_of_two_saves_in_one_directory_the_one_that_transformers_loads_is_taken_and_it_is_said(
    source: Path, tmp_path: Path
) -> None:
    transformers = pytest.importorskip("transformers")
    divide(source, keep_whole=True)
    change(source, lambda t: t["model.norm.weight"].fill_(3.0))  # newer than the shards
    (source / "pytorch_model.bin").write_bytes(b"older still")
    (source / "training_args.bin").write_bytes(b"no weights")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(source)
    checkpoint = import_model(source, tmp_path / "out")
    assert torch.equal(checkpoint.tensor("norm.weight"), theirs.model.norm.weight.float())
    assert checkpoint.metadata.origin is not None
    assert checkpoint.metadata.origin.passed_over == (
        "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors",
        "model.safetensors.index.json", "pytorch_model.bin",
    )
    assert checkpoint.report is not None
    assert len(checkpoint.report.to_dict()["passed_over"]) == 4  # type: ignore[arg-type]


def test_the_command_says_in_a_line_what_it_passed_over(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    divide(source, keep_whole=True)
    assert main(["import", str(source), "-o", str(tmp_path / "out")]) == 0
    line = next(line for line in capsys.readouterr().out.splitlines() if "Passed over" in line)
    assert "model-00001-of-00002.safetensors" in line and "index.json" in line


def _cut(path: Path, size: int) -> None:
    path.write_bytes(path.read_bytes()[:size])


BROKEN: dict[str, tuple[Any, str]] = {
    "a shard is missing": (
        lambda d: (divide(d), (d / "model-00002-of-00002.safetensors").unlink()),
        r"incomplete: of the 2 files .* model-00002-of-00002\.safetensors is not there"),
    "all shards are missing": (
        lambda d: (divide(d), [path.unlink() for path in d.glob("model-*-of-*")]),
        r"model-00001-of-00002\.safetensors and 1 more"),
    "the index is missing": (
        lambda d: (divide(d), (d / "model.safetensors.index.json").unlink()),
        r"has model-00001-of-00002\.safetensors and no model\.safetensors\.index\.json"),
    "the file is cut off": (
        lambda d: _cut(d / "model.safetensors", 20_000), r"truncated: 20000 bytes of \d+"),
    "the header is cut off": (
        lambda d: _cut(d / "model.safetensors", 100), r"within its header"),
    "the file is empty": (lambda d: _cut(d / "model.safetensors", 0), r"truncated"),
    "the file is another": (
        lambda d: (d / "model.safetensors").write_text("<html>Sign in</html>" * 9), r"damaged"),
    "a shard is cut off": (
        lambda d: (divide(d), _cut(d / "model-00001-of-00002.safetensors", 9000)),
        r"model-00001-of-00002\.safetensors .* truncated"),
    "a pointer of Git LFS": (
        lambda d: (d / "model.safetensors").write_text(
            "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n"),
        r"git lfs pull"),
    "a download under way": (
        lambda d: (d / "model.safetensors").rename(d / "model.safetensors.incomplete"),
        r"broke off \(model\.safetensors\.incomplete"),
    "a download of a browser": (
        lambda d: (d / "model.safetensors").rename(d / "model.safetensors.part"), r"broke off"),
    "a download of hf": (
        lambda d: ((d / ".cache/huggingface/download").mkdir(parents=True), (
            d / "model.safetensors").rename(
                d / ".cache/huggingface/download/model.safetensors.x.incomplete")),
        r"broke off"),
    "a link to nothing": (
        lambda d: ((d / "model.safetensors").unlink(), (d / "model.safetensors").symlink_to(
            d / "blob")), r"broke off \(model\.safetensors"),
    "the makers' layout": (
        lambda d: (d / "model.safetensors").rename(d / "consolidated.safetensors"),
        r"own layout only \(consolidated\.safetensors\)"),
    "an adapter": (
        lambda d: ((d / "adapter_config.json").write_text("{}"), (
            d / "model.safetensors").rename(d / "adapter_model.safetensors")),
        r"an adapter without the model .* merge"),
    "pickles": (
        lambda d: (d / "model.safetensors").rename(d / "pytorch_model-00001-of-00002.bin"),
        r"pickled .* never read; .* save_pretrained"),
    "a file of GGUF": (
        lambda d: (d / "model.safetensors").rename(d / "tiny.gguf"), r"name one .* tiny\.gguf"),
    "another name": (
        lambda d: (d / "model.safetensors").rename(d / "model.fp16.safetensors"), r"rename it"),
    "nothing": (lambda d: (d / "model.safetensors").unlink(), r"has no weights"),
}


@pytest.mark.parametrize("what", BROKEN)
def test_where_there_are_no_whole_weights_the_true_cause_is_said(
    source: Path, tmp_path: Path, what: str
) -> None:
    make, match = BROKEN[what]
    make(source)
    with pytest.raises(CheckpointError, match=match):
        import_model(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_adapter_alone_is_called_that_and_not_a_directory_without_a_configuration(
    source: Path, tmp_path: Path
) -> None:
    (source / "config.json").unlink()
    BROKEN["an adapter"][0](source)
    with pytest.raises(CheckpointError, match="an adapter without the model"):
        import_model(source, tmp_path / "out")


def test_a_checkpoint_of_ours_is_not_imported_again(source: Path, tmp_path: Path) -> None:
    import_model(source, tmp_path / "out")
    with pytest.raises(CheckpointError, match="checkpoint already"):
        import_model(tmp_path / "out", tmp_path / "again")


BOOKKEEPING: dict[str, Any] = {
    "unsloth_version": "2025.3.19", "unsloth_fixed": True, "unsloth_novelty": [1],
    "transformers.js_config": {"dtype": "q4"}, "max_sequence_length": 2048, "max_length": 4096,
    "neftune_noise_alpha": 5.0, "pruned_heads": {}, "_private": {"of": "a tool"},
    "_model_name_or_path": "x", "_commit_hash": "x", "do_sample": True, "temperature": 0.7,
    "top_p": 0.9, "resid_pdrop": 0.1, "some_list": [], "some_text": "", "some_switch": False,
}


def test_what_computes_nothing_is_passed_over(source: Path, tmp_path: Path) -> None:
    plain = read_config(source)
    assert read_config(write(tmp_path / "more", **BOOKKEEPING)) == plain


def test_every_setting_of_generation_is_passed_over(source: Path, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    settings = transformers.GenerationConfig().to_dict()
    assert {"top_k", "typical_p", "num_beams"} <= settings.keys()
    more = write(tmp_path / "more", **{
        name: 7 for name in settings if name not in ("bos_token_id", "eos_token_id")})
    assert read_config(more) == read_config(source)


def test_a_field_passes_where_the_user_says_so_and_the_checkpoint_says_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, out = write(tmp_path / "hub", novelty=3, rope_scaling={
        "rope_type": "linear", "factor": 2.0, "inner_novelty": 1}), tmp_path / "out"
    with pytest.raises(UnsupportedFeature, match="--ignore inner_novelty") as refused:
        import_model(source, out)
    assert "another model" not in str(refused.value)
    with pytest.raises(UnsupportedFeature, match="--ignore novelty"):
        import_model(source, out, ignore=["inner_novelty"])
    command = ["import", str(source), "-o", str(out), "--ignore", "novelty", "--ignore",
               "inner_novelty"]
    assert main(command) == 0
    assert "Ignored: inner_novelty, novelty" in capsys.readouterr().out
    origin = Checkpoint.open(out).metadata.origin
    assert origin is not None and origin.ignored == ("inner_novelty", "novelty")


@pytest.mark.parametrize("name", ["vocab_size", "rope_scaling", "no_such_field"])
def test_a_field_that_is_read_or_not_there_cannot_be_ignored(
    source: Path, tmp_path: Path, name: str
) -> None:
    with pytest.raises(SettingError, match=f"no field {name} that"):
        import_model(source, tmp_path / "out", ignore=[name])


def test_a_tokenizer_of_another_vocabulary_is_refused_with_both_numbers(
    source: Path, tmp_path: Path
) -> None:
    Tokenizer(models.WordLevel({f"w{i}": i for i in range(60)}, unk_token="w0")).save(
        str(source / "tokenizer.json")
    )
    with pytest.raises(VocabularyMismatch, match=r"59.*50"):
        import_model(source, tmp_path / "out")


def test_a_missing_tokenizer_is_refused(source: Path, tmp_path: Path) -> None:
    (source / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match="tokenizer"):
        import_model(source, tmp_path / "out")


def test_an_index_that_leaves_the_directory_is_refused(source: Path, tmp_path: Path) -> None:
    (source / "model.safetensors").rename(tmp_path / "other.safetensors")
    (source / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"model.norm.weight": "../other.safetensors"}})
    )
    with pytest.raises(CheckpointError, match="index"):
        import_model(source, tmp_path / "out")


@pytest.mark.parametrize("context", [0, 129])
def test_a_context_that_the_model_does_not_have_is_refused(
    source: Path, tmp_path: Path, context: int
) -> None:
    with pytest.raises(SettingError, match="128"):
        import_model(source, tmp_path / "out", context=context)
