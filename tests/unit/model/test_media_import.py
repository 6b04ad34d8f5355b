"""What a multimodal model's files say of its media is taken over, or refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

transformers = pytest.importorskip("transformers")

from tests.unit.model import multimodal_models as theirs  # noqa: E402

from cloister.cli import main  # noqa: E402
from cloister.errors import (  # noqa: E402
    CheckpointError,
    OutputExists,
    TensorMismatch,
    UnsupportedArchitecture,
    UnsupportedFeature,
)
from cloister.model import huggingface, media_import  # noqa: E402
from cloister.model.encoder_import import import_encoder  # noqa: E402
from cloister.model.imports import check, import_model  # noqa: E402
from cloister.model.sense_file import SenseKind  # noqa: E402
from cloister.pieces import Fit, MediaFormats, Resample  # noqa: E402


def change(directory: Path, file: str, part: str | None, **values: Any) -> None:
    path = directory / file
    record = json.loads(path.read_text())
    (record if part is None else record[part]).update(values)
    path.write_text(json.dumps(record))


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A directory of each layout."""
    found = {layout: tmp_path_factory.mktemp(layout) for layout in theirs.LAYOUTS}
    for layout, directory in found.items():
        theirs.save(directory, layout)
    return found


@pytest.fixture
def source(saved: dict[str, Path], request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A copy of one of them, to change."""
    copy = tmp_path / "hub"
    copy.mkdir()
    for path in saved[request.param].iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    return copy


def formats(source: Path, out: Path) -> MediaFormats:
    media = import_model(source, out).metadata.media
    assert media is not None
    return media


@pytest.mark.parametrize("source", ["gemma3"], indirect=True)
def test_pictures_of_gemma_have_the_size_and_marks_of_its_files(
    source: Path, tmp_path: Path
) -> None:
    change(source, "preprocessor_config.json", None, resample=3)
    form = formats(source, tmp_path / "out").picture
    assert form is not None
    assert (form.height, form.width, form.tokens, form.fit) == (32, 32, 4, Fit.STRETCH)
    assert form.resample is Resample.BICUBIC and form.both_ways
    assert form.marker == "<start_of_image>"
    assert (form.before, form.after) == ("\n\n<start_of_image>", "<end_of_image>\n\n")


@pytest.mark.parametrize("source", ["smolvlm", "idefics3"], indirect=True)
def test_tiles_of_idefics_have_the_marks_of_its_processor(source: Path, tmp_path: Path) -> None:
    form = formats(source, tmp_path / "out").picture
    assert form is not None and form.tiles is not None
    assert (form.height, form.tokens, form.fit) == (32, 4, Fit.TILES)
    assert (form.resample, form.tiles.longest_edge) == (Resample.LANCZOS, 96)
    around = "<fake_token_around_image>"
    assert (form.marker, form.after, form.both_ways) == ("<image>", around, False)
    assert form.tiles.before == around + "<row_{row}_col_{column}>"
    assert (form.tiles.row_end, form.tiles.grid_end) == ("\n", "\n")
    assert form.tiles.whole == f"{around}<global-img>"


@pytest.mark.parametrize("source", ["voxtral"], indirect=True)
def test_recordings_of_voxtral_have_the_lengths_of_its_files(source: Path, tmp_path: Path) -> None:
    form = formats(source, tmp_path / "out").recording
    assert form is not None
    assert (form.rate, form.samples_per_token, form.multiple) == (16_000, 1280, 32_000)
    assert form.most == 320_000 and form.before == "[BEGIN_AUDIO]"
    short = import_model(source, tmp_path / "short", context=60).metadata.media
    assert short is not None and short.recording is not None and short.recording.most == 64_000


# The fields that the makers' own files have, with the sizes that these leave to defaults left out.
PUBLISHED: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "gemma-3-4b-it": ({
        "architectures": ["Gemma3ForConditionalGeneration"], "boi_token_index": 255999,
        "eoi_token_index": 256000, "eos_token_id": [1, 106], "image_token_index": 262144,
        "initializer_range": 0.02, "mm_tokens_per_image": 256, "model_type": "gemma3",
        "text_config": {
            "hidden_size": 2560, "intermediate_size": 10240, "model_type": "gemma3_text",
            "num_hidden_layers": 34, "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
            "sliding_window": 1024, "final_logit_softcapping": 30.0},
        "torch_dtype": "bfloat16", "transformers_version": "4.50.0.dev0", "vision_config": {
            "hidden_size": 1152, "image_size": 896, "intermediate_size": 4304,
            "model_type": "siglip_vision_model", "num_attention_heads": 16,
            "num_hidden_layers": 27, "patch_size": 14, "vision_use_head": False},
    }, {
        "do_convert_rgb": None, "do_normalize": True, "do_pan_and_scan": None, "do_rescale": True,
        "do_resize": True, "image_mean": [0.5, 0.5, 0.5],
        "image_processor_type": "Gemma3ImageProcessor", "image_seq_length": 256,
        "image_std": [0.5, 0.5, 0.5], "pan_and_scan_max_num_crops": None,
        "pan_and_scan_min_crop_size": None, "pan_and_scan_min_ratio_to_activate": None,
        "processor_class": "Gemma3Processor", "resample": 2,
        "rescale_factor": 0.00392156862745098, "size": {"height": 896, "width": 896},
    }),
    "SmolVLM-256M-Instruct": ({
        "architectures": ["Idefics3ForConditionalGeneration"], "image_token_id": 49190,
        "model_type": "idefics3", "scale_factor": 4, "text_config": {
            "_flash_attn_2_enabled": True, "_name_or_path": "None",
            "architectures": ["VLlama3ForCausalLM"], "head_dim": 64, "hidden_size": 576,
            "intermediate_size": 1536, "is_llama_config": True, "max_position_embeddings": 8192,
            "model_type": "llama", "neftune_noise_alpha": 0.0, "num_attention_heads": 9,
            "num_hidden_layers": 30, "num_key_value_heads": 3, "pad_token_id": 2,
            "perceiver_config": {"attention_dropout": 0.0, "hidden_act": "silu"},
            "pixel_shuffle_factor": 4, "qk_layer_norms": False, "rms_norm_eps": 1e-05,
            "rope_interleaved": False, "rope_theta": 100000, "torch_dtype": "bfloat16",
            "transformers.js_config": {"kv_cache_dtype": {"fp16": "float16"}},
            "use_resampler": False, "vocab_size": 49280},
        "tie_word_embeddings": False, "torch_dtype": "bfloat16", "use_cache": False,
        "vision_config": {
            "hidden_size": 768, "image_size": 512, "max_image_size": {"longest_edge": 512},
            "model_type": "idefics3", "num_attention_heads": 12, "patch_size": 16,
            "size": {"longest_edge": 2048}, "tie_word_embeddings": False,
            "use_base_siglip": False},
        "vocab_size": 49280,
    }, {
        "do_convert_rgb": True, "do_image_splitting": True, "do_normalize": True, "do_pad": True,
        "do_rescale": True, "do_resize": True, "image_mean": [0.5, 0.5, 0.5],
        "image_processor_type": "Idefics3ImageProcessor", "image_std": [0.5, 0.5, 0.5],
        "max_image_size": {"longest_edge": 512}, "processor_class": "Idefics3Processor",
        "resample": 1, "rescale_factor": 0.00392156862745098, "size": {"longest_edge": 2048},
    }),
    "Voxtral-Mini-3B-2507": ({
        "architectures": ["VoxtralForConditionalGeneration"], "audio_config": {
            "activation_dropout": 0.0, "activation_function": "gelu", "attention_dropout": 0.0,
            "dropout": 0.0, "head_dim": 64, "hidden_size": 1280, "initializer_range": 0.02,
            "intermediate_size": 5120, "layerdrop": 0.0, "max_source_positions": 1500,
            "model_type": "voxtral_encoder", "num_attention_heads": 20, "num_hidden_layers": 32,
            "num_key_value_heads": 20, "num_mel_bins": 128, "scale_embedding": False,
            "vocab_size": 51866},
        "audio_token_id": 24, "hidden_size": 3072, "model_type": "voxtral",
        "projector_hidden_act": "gelu", "text_config": {
            "attention_bias": False, "head_dim": 128, "hidden_act": "silu", "hidden_size": 3072,
            "intermediate_size": 8192, "max_position_embeddings": 131072, "mlp_bias": False,
            "model_type": "llama", "num_attention_heads": 32, "num_hidden_layers": 30,
            "num_key_value_heads": 8, "pretraining_tp": 1, "rms_norm_eps": 1e-05,
            "rope_scaling": None, "rope_theta": 100000000.0, "sliding_window": None,
            "use_cache": True, "vocab_size": 131072},
        "torch_dtype": "bfloat16", "vocab_size": 131072,
    }, {
        "chunk_length": 30, "dither": 0.0, "feature_extractor_type": "WhisperFeatureExtractor",
        "feature_size": 128, "hop_length": 160, "n_fft": 400, "n_samples": 480000,
        "nb_max_frames": 3000, "padding_side": "right", "padding_value": 0.0,
        "processor_class": "VoxtralProcessor", "return_attention_mask": False,
        "sampling_rate": 16000,
    }),
}


@pytest.mark.parametrize(("name", "layers", "vectors", "context"), [
    ("gemma-3-4b-it", 27, 256, 131_072), ("SmolVLM-256M-Instruct", 12, 64, 8192),
    ("Voxtral-Mini-3B-2507", 32, 375, 131_072),
])
def test_the_makers_own_files_are_read(
    tmp_path: Path, name: str, layers: int, vectors: int, context: int
) -> None:
    record, processor = PUBLISHED[name]
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(processor))
    model = media_import.read(record, tmp_path)
    assert (model.sense.encoder.layers, model.sense.vectors) == (layers, vectors)
    config = huggingface.configured(model.text, name, ignored=model.ignored)
    assert config.shape.context == context and config.final_softcap is None
    assert model.sense.size == config.shape.hidden_size


def test_the_encoder_of_whispers_own_files_is_read(tmp_path: Path) -> None:
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({
        **PUBLISHED["Voxtral-Mini-3B-2507"][1], "feature_size": 80, "mel_filters": [[0.0]]}))
    sense = media_import.read_encoder({
        "_name_or_path": "openai/whisper-base", "activation_dropout": 0.0,
        "activation_function": "gelu", "architectures": ["WhisperForConditionalGeneration"],
        "attention_dropout": 0.0, "begin_suppress_tokens": [220, 50257], "bos_token_id": 50257,
        "d_model": 512, "decoder_attention_heads": 8, "decoder_ffn_dim": 2048,
        "decoder_layerdrop": 0.0, "decoder_layers": 6, "decoder_start_token_id": 50258,
        "dropout": 0.0, "encoder_attention_heads": 8, "encoder_ffn_dim": 2048,
        "encoder_layerdrop": 0.0, "encoder_layers": 6, "eos_token_id": 50257,
        "forced_decoder_ids": [[1, 50259]], "init_std": 0.02, "is_encoder_decoder": True,
        "max_length": 448, "max_source_positions": 1500, "max_target_positions": 448,
        "model_type": "whisper", "num_hidden_layers": 6, "num_mel_bins": 80,
        "pad_token_id": 50257, "scale_embedding": False, "suppress_tokens": [1, 2],
        "torch_dtype": "float32", "transformers_version": "4.27.0.dev0", "use_cache": True,
        "vocab_size": 51865}, tmp_path)
    assert (sense.encoder.hidden_size, sense.encoder.positions) == (512, 1500)


@pytest.mark.parametrize("source", ["gemma3"], indirect=True)
def test_files_of_other_releases_say_the_same(source: Path, tmp_path: Path) -> None:
    new = import_model(source, tmp_path / "new")
    path = source / "preprocessor_config.json"
    (source / "processor_config.json").write_text(json.dumps(
        {"image_processor": json.loads(path.read_text()), "processor_class": "Gemma3Processor"}))
    path.unlink()
    tensors = load_file(source / "model.safetensors")
    save_file({
        name.replace("language_model.model.", "model.language_model.")
        .replace("vision_tower.", "vision_tower.vision_model."): each
        for name, each in tensors.items()}, source / "model.safetensors")
    old = import_model(source, tmp_path / "old")
    assert old.metadata.media == new.metadata.media
    assert (old.senses[SenseKind.VISION].path.read_bytes()
            == new.senses[SenseKind.VISION].path.read_bytes())


@pytest.mark.parametrize(("source", "file", "part", "values", "match"), [
    ("gemma3", "config.json", "vision_config", {"hidden_act": "quick_gelu"}, "quick_gelu"),
    ("gemma3", "config.json", "vision_config", {"num_registers": 4}, "num_registers"),
    ("gemma3", "config.json", None, {"mm_tokens_per_image": 5}, "5 vectors"),
    ("gemma3", "config.json", "text_config", {"use_bidirectional_attention": True},
     "use_bidirectional_attention"),
    ("gemma3", "config.json", "text_config", {"model_type": "gemma3n_text"}, "gemma3n_text"),
    ("gemma3", "preprocessor_config.json", None, {"do_pan_and_scan": True}, "do_pan_and_scan"),
    ("gemma3", "preprocessor_config.json", None, {"rescale_factor": 1.0}, "1/255"),
    ("gemma3", "preprocessor_config.json", None, {"do_normalize": False}, "do_normalize"),
    ("gemma3", "preprocessor_config.json", None, {"resample": 4}, "filter 4"),
    ("smolvlm", "preprocessor_config.json", None, {"do_image_splitting": False}, "tiles"),
    ("smolvlm", "config.json", "text_config", {"model_type": "mistral"}, "mistral"),
    ("voxtral", "config.json", None, {"projector_hidden_act": "relu"}, "relu"),
    ("voxtral", "config.json", "audio_config", {"scale_embedding": True}, "scale_embedding"),
    ("voxtral", "config.json", "audio_config", {"num_key_value_heads": 2}, "share keys"),
    ("voxtral", "config.json", "audio_config", {"activation_function": "silu"}, "silu"),
    ("voxtral", "preprocessor_config.json", None, {"sampling_rate": 8000}, "8000"),
    ("voxtral", "preprocessor_config.json", None, {"dither": 0.1}, "dither"),
], indirect=["source"])
def test_what_is_computed_otherwise_is_refused_by_name(
    source: Path, tmp_path: Path, file: str, part: str | None, values: dict[str, Any], match: str
) -> None:
    change(source, file, part, **values)
    with pytest.raises(UnsupportedFeature, match=match):
        import_model(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("source", "file", "part", "values", "match"), [
    ("gemma3", "preprocessor_config.json", None, {"size": {"height": 64, "width": 32}}, "32 x 32"),
    ("gemma3", "preprocessor_config.json", None, {"size": {"shortest_edge": 32}}, "32 x 32"),
    ("gemma3", "preprocessor_config.json", None, {"image_std": [0.5, 0.0, 0.5]}, "image_std"),
    ("gemma3", "config.json", "vision_config", {"patch_size": 7}, "multiple of 7"),
    ("gemma3", "config.json", None, {"boi_token_index": 300}, "300"),
    ("smolvlm", "preprocessor_config.json", None, {"size": {"longest_edge": 9999}}, "size"),
    ("smolvlm", "preprocessor_config.json", None, {"max_image_size": {"longest_edge": 64}}, "size"),
    ("voxtral", "preprocessor_config.json", None, {"feature_size": 80}, "80 bins"),
    ("voxtral", "preprocessor_config.json", None, {"chunk_length": 30}, "480000"),
], indirect=["source"])
def test_files_that_contradict_one_another_are_refused(
    source: Path, tmp_path: Path, file: str, part: str | None, values: dict[str, Any], match: str
) -> None:
    change(source, file, part, **values)
    with pytest.raises(CheckpointError, match=match):
        import_model(source, tmp_path / "out")


@pytest.mark.parametrize("source", ["gemma3"], indirect=True)
def test_what_is_missing_is_named(source: Path, tmp_path: Path) -> None:
    tensors = load_file(source / "model.safetensors")
    gone = tensors.pop("vision_tower.encoder.layers.1.mlp.fc1.bias")
    save_file(tensors, source / "model.safetensors")
    with pytest.raises(TensorMismatch, match=r"vision\.encoder\.layers\.1\.mlp\.up\.bias"):
        check(source)
    tensors["vision_tower.encoder.layers.1.mlp.fc1.bias"] = gone
    tensors["vision_tower.registers"] = gone.clone()
    save_file(tensors, source / "model.safetensors")
    with pytest.raises(TensorMismatch, match="registers"):
        check(source)
    (source / "preprocessor_config.json").unlink()
    with pytest.raises(CheckpointError, match="preprocessor_config"):
        check(source)


@pytest.mark.parametrize("source", ["smolvlm"], indirect=True)
def test_a_field_that_is_let_pass_may_be_of_the_encoder(source: Path, tmp_path: Path) -> None:
    change(source, "config.json", "vision_config", novelty=3)
    with pytest.raises(UnsupportedFeature, match="novelty"):
        import_model(source, tmp_path / "out")
    made = import_model(source, tmp_path / "out", ignore=["novelty"])
    assert made.metadata.origin is not None and made.metadata.origin.ignored == ("novelty",)


@pytest.mark.parametrize("source", ["voxtral"], indirect=True)
def test_the_command_line_says_what_else_a_model_reads(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["import", str(source), "-o", str(tmp_path / "one"), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["senses"]["audio"]["positions"] == 100
    assert main(["import", str(source), "-o", str(tmp_path / "two")]) == 0
    assert "recordings: 2 layers of 32, 25 vectors" in capsys.readouterr().out


@pytest.mark.parametrize("source", ["whisper"], indirect=True)
@torch.inference_mode()
def test_of_whisper_the_encoder_is_read(source: Path, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedArchitecture, match="safetensors"):
        import_model(source, tmp_path / "whole")
    assert main(["import", str(source), "-o", str(tmp_path / "ear.safetensors"), "--json"]) == 0
    with pytest.raises(OutputExists):
        import_encoder(source, tmp_path / "ear.safetensors")
    ear = import_encoder(source, tmp_path / "ear.safetensors", replace=True).load()
    given = 0.1 * torch.randn(1, 1, 32_000)
    model = transformers.WhisperModel.from_pretrained(source).eval()
    extractor = transformers.WhisperFeatureExtractor.from_pretrained(source)
    features = extractor(given.flatten().numpy(), sampling_rate=16_000, return_tensors="pt")
    wanted = model.encoder(features["input_features"]).last_hidden_state
    assert (ear(given) - wanted).abs().max() <= 1e-4
    assert main(["import", str(source), "-o", str(tmp_path / "x.safetensors"), "--name", "x"]) == 1


@pytest.mark.parametrize("source", ["gemma3"], indirect=True)
def test_an_encoder_alone_is_read_of_whisper_only(source: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="Gemma3ForConditionalGeneration"):
        import_encoder(source, tmp_path / "eye.safetensors")
    other = tmp_path / "mine.safetensors"
    other.write_bytes(b"not yours")
    with pytest.raises(CheckpointError):
        import_encoder(source, other, replace=True)
    assert other.read_bytes() == b"not yours"
