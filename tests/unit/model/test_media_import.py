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
