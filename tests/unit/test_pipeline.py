"""An export that went wrong writes nothing."""

from __future__ import annotations

from pathlib import Path

import pytest

from cloister import pipeline, reference
from cloister.errors import ExportMismatch, SettingError, VocabularyMismatch
from cloister.model.checkpoint import Checkpoint
from cloister.model.recipe import Recipe
from cloister.quantize.apply import quantize
from cloister.tokenizer import Tokenizer
from cloister_kernels import reference as kernels


@pytest.fixture(scope="module")
def quantized(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    path = tmp_path_factory.mktemp("quantized") / "nano-1"
    source = Checkpoint.open(reference.checkpoint_path("nano-1"))
    quantize(source, path, Recipe.parse("8da4w-g32"))
    return Checkpoint.open(path)


def test_nibbles_in_the_wrong_order_are_caught_before_anything_is_written(
    quantized: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "pack_4bit", kernels.pack_4bit_embedding)
    with pytest.raises(ExportMismatch, match="KL divergence"):
        pipeline.export(quantized, tmp_path / "x.cloister")
    assert list(tmp_path.iterdir()) == []


def test_the_package_has_enough_text_to_check_on() -> None:
    path = reference.bundle_path("nano-1")
    for template in (path / "chat_template.jinja", None):
        conversations = pipeline.check_ids(
            Tokenizer.from_files(path / "tokenizer.json", template)
        )
        assert sum(map(len, conversations)) >= pipeline.CHECK_TOKENS


def test_a_template_without_a_system_role_is_checked_too(tmp_path: Path) -> None:
    template = tmp_path / "chat_template.jinja"
    template.write_text(
        "{% for message in messages %}{% if message.role == 'system' %}"
        "{{ raise_exception('no') }}{% endif %}{{ message.content }}{% endfor %}"
    )
    tokenizer = Tokenizer.from_files(reference.bundle_path("nano-1") / "tokenizer.json", template)
    assert tokenizer.decode(pipeline.check_ids(tokenizer)[0]).startswith("call: ")


@pytest.mark.parametrize(("options", "match"), [
    ({"backend": "magic"}, "xnnpack"), ({"chunk": 0}, "from 1 to 1024"),
])
def test_an_impossible_setting_is_refused_before_any_work(
    quantized: Checkpoint, tmp_path: Path, options: dict[str, object], match: str
) -> None:
    with pytest.raises(SettingError, match=match):
        pipeline.export(quantized, tmp_path / "x.cloister", **options)  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


def test_a_tokenizer_of_another_vocabulary_is_refused(
    quantized: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Tokenizer, "vocab_size", property(lambda self: 5000))
    with pytest.raises(VocabularyMismatch, match=r"5000.*4096"):
        pipeline.export(quantized, tmp_path / "x.cloister")
