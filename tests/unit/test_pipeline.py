"""A bundle is what was exported, on any day, and an export that went wrong writes nothing."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from executorch.runtime import Runtime

from cloister import pipeline, reference
from cloister.backend import XNNPACK
from cloister.bundle import Bundle
from cloister.errors import ExportMismatch, GateFailed, SettingError, VocabularyMismatch
from cloister.export import check
from cloister.message import Message
from cloister.model.checkpoint import Checkpoint
from cloister.model.recipe import Recipe
from cloister.quantize.apply import quantize
from cloister.settings import Settings
from cloister.tokenizer import Tokenizer
from cloister_kernels import reference as kernels

pytestmark = pytest.mark.slow


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
    with pytest.raises(ExportMismatch, match=r"Part layers\.0\.attn\.qkv of the program"):
        pipeline.export(quantized, tmp_path / "x.cloister")
    assert list(tmp_path.iterdir()) == []


def test_the_package_has_enough_text_to_check_on() -> None:
    path = reference.bundle_path("nano-1")
    for template in (path / "chat_template.jinja", None):
        tokenizer = Tokenizer.from_files(path / "tokenizer.json", template)
        assert sum(map(len, check.conversations(tokenizer, 1024))) >= check.TOKENS


def test_a_template_without_a_system_role_is_checked_too(tmp_path: Path) -> None:
    template = tmp_path / "chat_template.jinja"
    template.write_text(
        "{% for message in messages %}{% if message.role == 'system' %}"
        "{{ raise_exception('no') }}{% endif %}{{ message.content }}{% endfor %}"
    )
    tokenizer = Tokenizer.from_files(reference.bundle_path("nano-1") / "tokenizer.json", template)
    first = check.conversations(tokenizer, 1024)[0]
    assert tokenizer.decode(first).startswith("call: ")


def changed(source: Checkpoint, path: Path, **shape: int) -> Checkpoint:
    """A copy of `source` with another shape in its configuration, its weights as they are."""
    shutil.copytree(source.path, path)
    record = json.loads((path / "config.json").read_text())
    record["config"]["shape"].update(shape)
    (path / "config.json").write_text(json.dumps(record))
    return Checkpoint.open(path)


def test_program_and_checkpoint_are_measured_against_the_parent_that_lies_beside_it(
    quantized: Checkpoint, tmp_path: Path
) -> None:
    shutil.copytree(quantized.path, tmp_path / "q")
    shutil.copytree(reference.checkpoint_path("nano-1"), tmp_path / "its parent")
    shutil.copytree(reference.checkpoint_path("pro"), tmp_path / "another model")
    (tmp_path / "a broken one").mkdir()
    (tmp_path / "a broken one" / "config.json").write_text("{")
    (tmp_path / "a file").write_text("config.json")
    receipt = pipeline.export(tmp_path / "q", tmp_path / "x.cloister").receipt()
    against = receipt["against_parent"]
    assert against["parent"] == quantized.metadata.parent
    program, eager = against["program"], against["checkpoint"]
    assert program["n"] == eager["n"] == receipt["program_against_checkpoint"]["n"]
    assert program["mean_kld"] == pytest.approx(eager["mean_kld"], rel=0.1)
    assert eager["mean_kld"] > 10 * receipt["program_against_checkpoint"]["mean_kld"]


@pytest.mark.parametrize(("context", "chunk"), [(24, 24), (4, 1)])
def test_a_context_shorter_than_the_checks_conversations_is_exported(
    quantized: Checkpoint, tmp_path: Path, context: int, chunk: int
) -> None:
    source = changed(quantized, tmp_path / "short", context=context)
    bundle = pipeline.export(str(source.path), str(tmp_path / "x.cloister"), chunk=chunk)
    assert (bundle.manifest.context, bundle.manifest.prefill_chunk) == (context, chunk)
    assert isinstance(bundle.report, check.CheckReport)
    assert bundle.report.divergences.program_from_checkpoint.mean_kld < 1e-3
    assert all(len(row.prompt) + len(row.tokens) <= context for row in bundle.golden())
    pipeline.verify(bundle.path, Settings.from_environment())


def test_a_bundle_is_proved_on_any_day_though_its_template_writes_the_date(
    quantized: Checkpoint, tmp_path: Path
) -> None:
    source = changed(quantized, tmp_path / "dated", context=256)
    template = source.path / "chat_template.jinja"
    template.write_text(
        "<|system|>Now: {{ strftime_now('%d %b %Y %H:%M:%S.%f') }}<|end|>" + template.read_text()
    )
    path = tmp_path / "x.cloister"
    bundle = pipeline.export(source, path, prompts=[("call", "play some jazz on youtube")])
    assert bundle.manifest.prompt_format is None
    assert bundle.manifest.prompt_format_reason == "the template reads the clock"
    tokenizer = Tokenizer.from_files(bundle.tokenizer_path, bundle.template_path)
    asked = [Message(role="user", content="x")]
    assert tokenizer.encode_chat(asked) != tokenizer.encode_chat(asked)  # the time goes on
    found = pipeline.verify(path, Settings.from_environment())
    assert found["checks"]["golden_tokens"] == sum(len(row.tokens) for row in bundle.golden()) > 0
    assert not found["checks"]["prompt_format"]


def test_a_bundle_says_what_a_runner_needs(quantized: Checkpoint, tmp_path: Path) -> None:
    bundle = pipeline.export(quantized, tmp_path / "x.cloister")
    manifest = bundle.manifest
    (program,) = manifest.programs
    assert (program.methods, program.operator_abi) == (XNNPACK.methods, XNNPACK.operator_abi)
    assert program.weight_bytes == manifest.files[program.file].size
    assert program.kv_bytes == 1024 * quantized.metadata.config.shape.kv_bytes_per_token()
    assert manifest.modalities == ("text",)
    assert manifest.special_ids == (0, 1, 2, 3)
    assert manifest.prompt_format is not None
    assert manifest.prompt_format.answer == "<|assistant|>"
    assert manifest.special_tokens is None
    receipt = bundle.receipt()
    assert receipt["phone_tokenizer"] == {"reason": None}
    assert receipt["parts_against_checkpoint"]["parts"] > 100
    assert receipt["against_parent"] == {
        "parent": quantized.metadata.parent,
        "reason": "the parent's weights are not beside the checkpoint"}
    assert Bundle.open(bundle.path).manifest == manifest
    assert Bundle.open(bundle.path).report is None


@pytest.mark.parametrize("bos", [None, 3])
def test_a_stock_runner_is_told_a_begin_token_only_where_the_model_has_one(
    quantized: Checkpoint, tmp_path: Path, bos: int | None
) -> None:
    source = changed(quantized, tmp_path / "short", context=24)
    config = source.path / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "bos": bos}))
    bundle = pipeline.export(source.path, tmp_path / "x.cloister")
    program = Runtime.get().load_program(bundle.path / bundle.manifest.programs[0].file)
    said = {name: program.load_method(name).execute([]) for name in (
        "get_bos_id", "get_eos_ids", "get_vocab_size") if name in program.method_names}
    assert said == {"get_eos_ids": [0], "get_vocab_size": [4096]} | (
        {} if bos is None else {"get_bos_id": [bos]})


def test_a_bundle_that_the_gate_refuses_is_not_written(
    quantized: Checkpoint, tmp_path: Path
) -> None:
    def gate(directory: Path) -> None:
        assert Bundle.open(directory).golden()  # finished
        raise GateFailed("top1 is 0")

    with pytest.raises(GateFailed):
        pipeline.export(quantized, tmp_path / "x.cloister", gate=gate)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("options", "match"), [
    ({"backends": ("magic",)}, "xnnpack"), ({"chunk": 0}, "from 1 to 1024"),
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
