"""What other programs keep is found by its own names, and nothing else is read."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
from tests.unit.model import gguf_files
from tests.unit.model.test_import import write

from cloister.cli import main
from cloister.errors import SettingError
from cloister.model import installed
from cloister.settings import model_folders


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("XDG_CACHE_HOME", "HF_HOME", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE",
                 "OLLAMA_MODELS"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    gguf_files.write(path)
    return path


def hub(folder: Path, model: Path) -> None:
    """Two revisions of a model, and one that holds GGUF files."""
    snapshots = folder / "models--org--tiny" / "snapshots"
    (snapshots / "old").mkdir(parents=True)
    write(snapshots / "new")
    (snapshots.parent / "refs").mkdir()
    (snapshots.parent / "refs" / "main").write_text("new")
    blob = snapshots.parent / "blob"
    (snapshots / "new" / "model.safetensors").rename(blob)
    (snapshots / "new" / "model.safetensors").symlink_to(blob)  # as the cache has it
    other = folder / "models--org--tiny-GGUF" / "snapshots" / "one"
    other.mkdir(parents=True)
    (other / "tiny-Q4.gguf").write_bytes(model.read_bytes())
    (folder / "datasets--org--texts" / "snapshots" / "x").mkdir(parents=True)


def ollama(folder: Path, model: Path, name: str = "registry.ollama.ai/library/tiny/1b",
           **changes: Any) -> None:
    digest = hashlib.sha256(model.read_bytes()).hexdigest()
    blob = folder / "blobs" / f"sha256-{digest}"
    blob.parent.mkdir(parents=True, exist_ok=True)
    blob.write_bytes(model.read_bytes())
    layers = [
        {"mediaType": "application/vnd.ollama.image.template", "digest": "sha256:" + "0" * 64},
        {"mediaType": "application/vnd.ollama.image.model", "digest": f"sha256:{digest}"},
    ]
    manifest = folder / "manifests" / name
    manifest.parent.mkdir(parents=True, exist_ok=True)
    manifest.write_text(json.dumps({"schemaVersion": 2, "layers": layers, **changes}))


def listed(capsys: pytest.CaptureFixture[str]) -> dict[str, dict[str, Any]]:
    assert main(["import", "--list", "--json"]) == 0
    return {each["name"]: each for each in json.loads(capsys.readouterr().out)["models"]}


def test_the_models_of_each_program_are_listed_with_size_path_and_what_stands_against_them(
    home: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hub(home / ".cache/huggingface/hub", model)
    ollama(home / ".ollama/models", model)
    studio = home / ".lmstudio/models/someone/tiny"
    studio.mkdir(parents=True)
    (studio / "tiny.gguf").write_bytes(model.read_bytes()[:5000])
    found = listed(capsys)
    assert sorted(found) == [
        "org/tiny", "org/tiny-GGUF/tiny-Q4.gguf", "someone/tiny/tiny.gguf", "tiny:1b"]
    assert {name: each["program"] for name, each in found.items()} == {
        "org/tiny": "Hugging Face", "org/tiny-GGUF/tiny-Q4.gguf": "Hugging Face",
        "someone/tiny/tiny.gguf": "LM Studio", "tiny:1b": "Ollama"}
    size = model.stat().st_size
    assert found["tiny:1b"]["size_bytes"] == found["org/tiny-GGUF/tiny-Q4.gguf"]["size_bytes"] == (
        size)
    assert found["org/tiny"]["size_bytes"] > 10_000
    assert Path(found["org/tiny"]["path"]).name == "new"
    problems = {name: each["problem"] for name, each in found.items()}
    assert "truncated" in problems.pop("someone/tiny/tiny.gguf")
    assert set(problems.values()) == {None}
    assert main(["import", "--list"]) == 0
    assert "tiny:1b" in capsys.readouterr().out


def test_a_listed_name_can_be_imported(home: Path, model: Path, tmp_path: Path) -> None:
    ollama(home / ".ollama/models", model)
    assert main(["import", "tiny:1b", "-o", str(tmp_path / "out")]) == 0
    assert json.loads((tmp_path / "out" / "config.json").read_text())["name"] == "tiny:1b"


def test_each_program_is_looked_for_where_its_variables_say(
    home: Path, model: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str]
) -> None:
    hub(home / "elsewhere/hub", model)
    ollama(home / "models", model, "hf.co/someone/tiny/q4")
    monkeypatch.setenv("HF_HOME", str(home / "elsewhere"))
    monkeypatch.setenv("OLLAMA_MODELS", str(home / "models"))
    assert set(listed(capsys)) == {
        "org/tiny", "org/tiny-GGUF/tiny-Q4.gguf", "hf.co/someone/tiny:q4"}
    monkeypatch.setenv("HF_HUB_CACHE", str(home / "nowhere"))
    assert set(listed(capsys)) == {"hf.co/someone/tiny:q4"}


@pytest.mark.parametrize("changes", [
    {"layers": None}, {"layers": ["model"]}, {"layers": []},
    {"layers": [{"mediaType": "application/vnd.ollama.image.model", "digest": "sha256:../x"}]},
])
def test_a_manifest_that_names_no_model_is_listed_as_such(
    home: Path, model: Path, changes: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    ollama(home / ".ollama/models", model, **changes)
    assert "names no model" in listed(capsys)["tiny:1b"]["problem"]


def test_an_adapter_that_would_be_left_out_is_said(
    home: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ollama(home / ".ollama/models", model)
    manifest = home / ".ollama/models/manifests/registry.ollama.ai/library/tiny/1b"
    record = json.loads(manifest.read_text())
    record["layers"].append({"mediaType": "application/vnd.ollama.image.adapter"})
    manifest.write_text(json.dumps(record))
    assert "adapter" in listed(capsys)["tiny:1b"]["problem"]
    with pytest.raises(SettingError, match="adapter"):
        installed.named("tiny:1b", model_folders())


def test_a_model_has_every_name_that_it_was_given(
    home: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("registry.ollama.ai/library/tiny/1b", "registry.ollama.ai/library/mine/latest"):
        ollama(home / ".ollama/models", model, name)
    assert set(listed(capsys)) == {"tiny:1b", "mine:latest"}


def test_what_broke_off_is_said_in_its_own_words(
    home: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ollama(home / ".ollama/models", model)
    blob, = (home / ".ollama/models/blobs").iterdir()
    blob.rename(f"{blob}-partial")
    (home / ".ollama/models/manifests/registry.ollama.ai/library/tiny/.DS_Store").touch()
    hub(home / ".cache/huggingface/hub", model)
    (home / ".cache/huggingface/hub/models--org--tiny/snapshots/new/tokenizer.json").unlink()
    found = listed(capsys)
    assert set(found) == {"tiny:1b", "org/tiny", "org/tiny-GGUF/tiny-Q4.gguf"}
    assert "not whole; pull it again" in found["tiny:1b"]["problem"]
    assert "no tokenizer.json" in found["org/tiny"]["problem"]


def test_one_model_that_cannot_be_read_leaves_the_others_listed(
    home: Path, model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    hub(home / ".cache/huggingface/hub", model)
    refs = home / ".cache/huggingface/hub/models--org--tiny-GGUF/refs"
    refs.mkdir()
    (refs / "main").write_bytes(b"\xff\xfe")  # no text, and no revision
    read = Path.read_text

    def denied(path: Path, *args: Any) -> str:
        if "models--org--tiny/" in str(path):
            raise PermissionError(13, "Permission denied")
        return read(path, *args)

    monkeypatch.setattr(Path, "read_text", denied)
    found = listed(capsys)
    assert "check its permissions" in found["org/tiny"]["problem"]
    assert found["org/tiny-GGUF/tiny-Q4.gguf"]["problem"] is None


def test_a_name_that_is_not_there_or_there_twice_is_refused(home: Path, model: Path) -> None:
    with pytest.raises(SettingError, match="no model of that name"):
        installed.named("tiny:1b", model_folders())
    for folder in (".lmstudio", ".cache/lm-studio"):
        place = home / folder / "models/someone/tiny"
        place.mkdir(parents=True)
        (place / "tiny.gguf").write_bytes(b"x")
    with pytest.raises(SettingError, match="2 models are called"):
        installed.named("someone/tiny/tiny.gguf", model_folders())


def test_only_the_first_part_of_a_split_file_is_listed_with_the_size_of_all(
    home: Path, model: Path
) -> None:
    place = home / ".lmstudio/models/someone/tiny"
    place.mkdir(parents=True)
    for part in (1, 2):
        (place / f"tiny-{part:05}-of-00002.gguf").write_bytes(bytes(10))
    found = installed.find(model_folders())
    assert [(each.path.name, each.size_bytes) for each in found] == [
        ("tiny-00001-of-00002.gguf", 20)]
