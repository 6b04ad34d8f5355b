"""A bundle is what its manifest says, or it is refused by name."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.conftest import make_bundle

from cloister import bundle as bundles
from cloister.backend import CLOISTER
from cloister.bundle import Bundle
from cloister.errors import (
    BundleCorrupt,
    BundleError,
    BundleVersionError,
    CloisterError,
    IncompatibleProgram,
    ManifestInvalid,
    NotEnoughDisk,
    OutputExists,
    OutputUnwritable,
)
from cloister.manifest import FileEntry, Manifest, ProgramEntry
from cloister.runtime import _executorch
from cloister.settings import Settings

FILES = (
    "program.xnnpack.pte", "tokenizer.json", "chat_template.jinja", "receipt.json", "golden.jsonl",
)


PROGRAM = {
    "file": "program.xnnpack.pte", "backend": "xnnpack", "methods": ["forward"], "operator_abi": 1,
    "weight_bytes": 1, "kv_bytes": 1, "arena_bytes": 1,
}
AROUND = {"before": "<", "after": ">"}
PROMPT_FORMAT = {
    "begin": "", "system": None, "user": AROUND, "assistant": AROUND, "answer": "", "strip": False,
}


def edit(bundle: Bundle, change: dict[str, Any]) -> None:
    path = bundle.path / "manifest.json"
    record = json.loads(path.read_text())
    record.update(change)
    path.write_text(json.dumps(record))


def test_reading_what_was_written_gives_the_same_bundle(bundle: Bundle) -> None:
    bundle.verify()
    again = Bundle.open(bundle.path)
    assert again.manifest == bundle.manifest
    assert again.golden()[0].tokens == (5, 6)
    assert again.receipt() == {"weights": {}}
    assert Manifest.from_json(bundle.manifest.to_json().encode()) == bundle.manifest


@pytest.mark.parametrize("name", FILES)
def test_a_truncated_file_is_refused(bundle: Bundle, name: str) -> None:
    path = bundle.path / name
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(BundleCorrupt, match=f"{name}.*truncated"):
        Bundle.open(bundle.path).verify()


@pytest.mark.parametrize("name", FILES)
def test_a_flipped_bit_is_refused(bundle: Bundle, name: str) -> None:
    path = bundle.path / name
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(BundleCorrupt, match=name):
        Bundle.open(bundle.path).verify()


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_refused(bundle: Bundle, name: str) -> None:
    (bundle.path / name).unlink()
    with pytest.raises(BundleCorrupt, match=name):
        Bundle.open(bundle.path)


@pytest.mark.parametrize("name", FILES)
def test_a_renamed_file_is_refused(bundle: Bundle, name: str) -> None:
    (bundle.path / name).rename(bundle.path / f"x{name}")
    with pytest.raises(BundleCorrupt):
        Bundle.open(bundle.path)


def test_two_swapped_files_are_refused(bundle: Bundle) -> None:
    one, two = bundle.path / "receipt.json", bundle.path / "golden.jsonl"
    first, second = one.read_bytes(), two.read_bytes()
    one.write_bytes(second)
    two.write_bytes(first)
    with pytest.raises(BundleCorrupt):
        Bundle.open(bundle.path)


def test_an_extra_file_or_directory_is_refused_without_naming_it(bundle: Bundle) -> None:
    (bundle.path / "diary of mine").write_text("x")
    with pytest.raises(BundleCorrupt) as caught:
        Bundle.open(bundle.path)
    assert "diary" not in str(caught.value)
    (bundle.path / "diary of mine").unlink()
    (bundle.path / "more").mkdir()
    with pytest.raises(BundleCorrupt):
        Bundle.open(bundle.path)


def test_a_link_out_of_the_bundle_is_refused(bundle: Bundle, tmp_path: Path) -> None:
    outside = tmp_path / "receipt.json"
    shutil.copy(bundle.path / "receipt.json", outside)
    (bundle.path / "receipt.json").unlink()
    (bundle.path / "receipt.json").symlink_to(outside)
    with pytest.raises(BundleCorrupt, match="regular"):
        Bundle.open(bundle.path)


@pytest.mark.parametrize("kind", ["pipe", "link", "directory"])
def test_a_manifest_that_is_no_regular_file_is_refused_at_once(
    bundle: Bundle, tmp_path: Path, kind: str
) -> None:
    path = bundle.path / "manifest.json"
    path.rename(tmp_path / "manifest.json")
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "link":
        path.symlink_to(tmp_path / "manifest.json")
    else:
        path.mkdir()
    with pytest.raises(BundleError, match="no readable manifest"):
        Bundle.open(bundle.path)


def test_a_file_that_the_disk_does_not_give_back_is_named(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(file: object, digest: str) -> None:
        raise OSError(errno.EIO, "input/output error")

    monkeypatch.setattr(hashlib, "file_digest", fail)
    with pytest.raises(BundleCorrupt, match="cannot be read"):
        Bundle.open(bundle.path)


def test_a_program_that_went_away_is_named(bundle: Bundle) -> None:
    entry = bundle.manifest.programs[0]
    (bundle.path / entry.file).unlink()
    with pytest.raises(BundleCorrupt, match=entry.file):
        bundle.check_program(entry, Settings.from_environment())


@pytest.mark.parametrize("version", [0, 3, "2", None, 2.0, True])
def test_a_foreign_format_version_is_refused(bundle: Bundle, version: object) -> None:
    edit(bundle, {"format": version})
    with pytest.raises(BundleVersionError):
        Bundle.open(bundle.path)


def test_a_bundle_of_an_earlier_format_is_refused_with_what_to_do(bundle: Bundle) -> None:
    record = json.loads((bundle.path / "manifest.json").read_text())
    record |= {"format": 1, "weight_bytes": 1, "kv_bytes": 1, "arena_bytes": 1}
    record["programs"] = [{"file": "program.xnnpack.pte", "backend": "xnnpack"}]
    for name in ("special_ids", "prompt_format", "prompt_format_reason", "modalities"):
        del record[name]
    (bundle.path / "manifest.json").write_text(json.dumps(record))
    with pytest.raises(BundleVersionError, match=r"earlier release.*export its checkpoint again"):
        Bundle.open(bundle.path)


@pytest.mark.parametrize("name", [
    "../secret", "/etc/passwd", "a/b", "a\\b", "..", ".hidden", "nul\0", "", "manifest.json",
])
def test_a_path_that_leaves_the_bundle_is_refused(bundle: Bundle, name: str) -> None:
    files = json.loads((bundle.path / "manifest.json").read_text())["files"]
    edit(bundle, {"files": {**files, name: {"sha256": "0" * 64, "size": 1}}})
    with pytest.raises(ManifestInvalid, match="plain name"):
        Bundle.open(bundle.path)


@pytest.mark.parametrize("change", [
    {"name": 1}, {"context": "64"}, {"context": True}, {"context": -1}, {"context": 65},
    {"prefill_chunk": 0}, {"prefill_chunk": 65}, {"recipe": None}, {"programs": []},
    {"programs": [{**PROGRAM, "file": "other.pte"}]}, {"programs": [{**PROGRAM, "more": 1}]},
    *({"programs": [{**PROGRAM, **change}]} for change in (
        {"weight_bytes": 1.5}, {"kv_bytes": -1}, {"arena_bytes": 2**80}, {"operator_abi": True},
        {"operator_abi": "1"}, {"methods": "forward"}, {"methods": [1]}, {"methods": ["\n"]},
    )),
    {"programs": [{"file": "program.xnnpack.pte"}]}, {"programs": "x"}, {"eos": [300]},
    {"programs": [PROGRAM, PROGRAM]},
    {"eos": 0}, {"eos": [0.5]}, {"bos": -1}, {"special_ids": [300]}, {"special_ids": None},
    {"modalities": []}, {"modalities": ["text", 1]}, {"modalities": "text"}, {"parent": "abc"},
    {"prompt_format_reason": None}, {"prompt_format_reason": "\x1b[2J"}, {"weight_bytes": 1},
    {"prompt_format": {"begin": ""}, "prompt_format_reason": None},
    {"prompt_format": PROMPT_FORMAT}, {"prompt_format_reason": None, "prompt_format": {
        **PROMPT_FORMAT, "user": {"before": "", "after": "", "more": ""}}},
    {"prompt_format_reason": None, "prompt_format": {**PROMPT_FORMAT, "strip": 1}},
    {"files": []}, {"shape": {}}, {"shape": None},
    {"executorch": 1.4}, {"surprise": 1}, {"name": "\ud800"}, {"name": "\x1b[2J"},
    {"recipe": "x" * 101}, {"programs": [{**PROGRAM, "backend": "\n"}]},
    {"programs": [{**PROGRAM, "file": "tokenizer.json"}]},
    {"programs": [{**PROGRAM, "file": ["x"]}]},
    {"files": {"tokenizer.json": {"sha256": 5, "size": 1}}},
    {"files": {"tokenizer.json": {"sha256": "0" * 64, "size": "1"}}},
])
def test_a_manifest_with_a_wrong_value_is_refused(bundle: Bundle, change: dict[str, Any]) -> None:
    edit(bundle, change)
    with pytest.raises(ManifestInvalid):
        Bundle.open(bundle.path)


@pytest.mark.parametrize("name", [
    "vocab_size", "hidden_size", "layers", "heads", "kv_heads", "head_size", "feed_forward",
])
@pytest.mark.parametrize("value", [0, -1, "8", 1.5, True, None])
def test_a_shape_with_a_wrong_value_is_refused(bundle: Bundle, name: str, value: object) -> None:
    shape = json.loads((bundle.path / "manifest.json").read_text())["shape"]
    edit(bundle, {"shape": {**shape, name: value}})
    with pytest.raises(ManifestInvalid):
        Bundle.open(bundle.path)


@pytest.mark.parametrize("raw", [
    b"", b"{", b"[]", b"\xff\xfe", b"[" * 100_000, b'{"format": 2, "format": 2}', b"NaN",
    b'{"format": ' * 40 + b"2" + b"}" * 40, b'{"format": 2, "name": "\\ud800"}',
])
def test_a_manifest_that_is_no_json_object_is_refused(bundle: Bundle, raw: bytes) -> None:
    (bundle.path / "manifest.json").write_bytes(raw)
    with pytest.raises(ManifestInvalid):
        Bundle.open(bundle.path)


def test_two_mebibytes_of_manifest_are_refused(bundle: Bundle) -> None:
    edit(bundle, {"name": "x" * 2**21})
    with pytest.raises(ManifestInvalid, match="1 MiB"):
        Bundle.open(bundle.path)


def test_a_directory_without_manifest_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="manifest"):
        Bundle.open(tmp_path)
    with pytest.raises(BundleError):
        Bundle.open(tmp_path / "nothing")
    with pytest.raises(BundleError):
        Bundle.open("nul\0")


@pytest.mark.parametrize("release", ["1.2.0", "1.5.0", "2.4.0", "0.9", "1.\u00b2", ""])
def test_a_program_of_an_incompatible_executorch_is_refused(bundle: Bundle, release: str) -> None:
    edit(bundle, {"executorch": release})
    with pytest.raises(IncompatibleProgram):
        Bundle.open(bundle.path).program(lambda backend: True)


def test_the_program_of_the_previous_minor_release_still_runs(bundle: Bundle) -> None:
    edit(bundle, {"executorch": "1.3.9"})
    assert Bundle.open(bundle.path).program(lambda backend: True).backend == "xnnpack"


def test_a_bundle_without_a_program_for_this_machine_is_refused(bundle: Bundle) -> None:
    with pytest.raises(IncompatibleProgram, match="xnnpack"):
        bundle.program(lambda backend: False)


def test_a_malformed_golden_file_is_refused_though_its_hash_is_right(bundle: Bundle) -> None:
    row = {"prompt": [5], "tokens": [1], "margin": 1.0}
    for text in (
        "{", "[]\n", "[" * 100_000, '{"prompt": [1]}\n', '{"tokens": [1], "surprise": 1}\n',
        "\n", json.dumps(row)[:-1] + ', "tokens": [2]}',
        *(json.dumps({**row, **change}) for change in (
            {"system": 1}, {"prompt": 1}, {"prompt": []}, {"prompt": [300]}, {"prompt": "x"},
            {"tokens": "abc"}, {"tokens": [True]}, {"tokens": 1}, {"tokens": [-1]},
            {"tokens": [300]}, {"tokens": [1.0]}, {"margin": "x"}, {"margin": float("nan")},
            {"margin": float("inf")}, {"margin": True},
        )),
    ):
        path = bundle.path / "golden.jsonl"
        path.write_text(text)
        digest = hashlib.sha256(text.encode()).hexdigest()
        files = json.loads((bundle.path / "manifest.json").read_text())["files"]
        edit(bundle, {"files": {**files, path.name: {"sha256": digest, "size": len(text)}}})
        with pytest.raises(BundleCorrupt):
            Bundle.open(bundle.path).golden()


def test_the_model_id_changes_with_all_that_shapes_an_answer_and_with_nothing_else(
    bundle: Bundle,
) -> None:
    def id_with(**changes: Any) -> str:
        manifest = msgspec.structs.replace(bundle.manifest, **changes)
        return Bundle(bundle.path, manifest).model_id(manifest.programs[0])

    files = dict(bundle.manifest.files)
    other = FileEntry(sha256="1" * 64, size=1)
    before = bundle.model_id(bundle.manifest.programs[0])
    same = [id_with(files={**files, name: other}) for name in ("receipt.json", "golden.jsonl")]
    assert {*same, id_with(name="other")} == {before}
    changed = [id_with(files={**files, name: other}) for name in (
        "program.xnnpack.pte", "tokenizer.json", "chat_template.jinja")]
    del files["chat_template.jinja"]
    changed += [id_with(files=files), id_with(recipe="8da8w"), id_with(bos=1), id_with(eos=(1,)),
                id_with(eos=()), id_with(bos=0, eos=()), id_with(special_tokens={}),
                id_with(special_tokens={"bos_token": "<s>"})]
    assert len({before, *changed}) == len(changed) + 1


def test_a_program_is_hashed_once(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    entry, settings_ = bundle.manifest.programs[0], Settings.from_environment()
    bundle.check_program(entry, settings_)
    monkeypatch.setattr(hashlib, "file_digest", None)  # not called any more
    bundle.check_program(entry, settings_)


def test_a_changed_program_is_hashed_again_though_its_time_was_set_back(bundle: Bundle) -> None:
    entry, settings_ = bundle.manifest.programs[0], Settings.from_environment()
    bundle.check_program(entry, settings_)
    path = bundle.path / entry.file
    before = path.stat()
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0xFF
    with path.open("r+b") as file:
        file.write(data)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    after = path.stat()
    assert (after.st_ino, after.st_size, after.st_mtime_ns) == (
        before.st_ino, before.st_size, before.st_mtime_ns)
    with pytest.raises(BundleCorrupt, match="sha256"):
        bundle.check_program(entry, settings_)


def test_a_program_of_operators_that_are_not_known_here_is_passed_over(
    tmp_path: Path, tokenizer_dir: Path
) -> None:
    bundle = make_bundle(tmp_path / "one.cloister", tokenizer_dir)
    (entry,), file = bundle.manifest.programs, bundle.manifest.files["program.xnnpack.pte"]
    later = msgspec.structs.replace(entry, operator_abi=entry.operator_abi + 1, file="a.pte")
    foreign = msgspec.structs.replace(entry, backend="elsewhere", file="b.pte")

    def holding(*programs: ProgramEntry) -> Bundle:
        files = {name: each for name, each in bundle.manifest.files.items() if each is not file}
        files |= {program.file: file for program in programs}
        return Bundle(bundle.path, msgspec.structs.replace(
            bundle.manifest, programs=programs, files=files))

    for programs in ((later, entry), (foreign, later, entry), (entry, later)):
        assert holding(*programs).program(_executorch.runs_here) == entry
    with pytest.raises(IncompatibleProgram, match=r"xnnpack \(operators 2\), elsewhere"):
        holding(later, foreign).program(_executorch.runs_here)


def test_own_operators_of_another_abi_are_refused_by_name_before_anything_is_loaded(
    tmp_path: Path, tokenizer_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = make_bundle(tmp_path / "one.cloister", tokenizer_dir)
    (entry,), file = bundle.manifest.programs, bundle.manifest.files["program.xnnpack.pte"]
    other = msgspec.structs.replace(
        entry, backend="cloister", operator_abi=CLOISTER.operator_abi + 1, file="a.pte")
    monkeypatch.setattr(_executorch, "own_operators", pytest.fail)

    def holding(*programs: ProgramEntry) -> Bundle:
        files = {name: each for name, each in bundle.manifest.files.items() if each is not file}
        files |= {program.file: file for program in programs}
        return Bundle(bundle.path, msgspec.structs.replace(
            bundle.manifest, programs=programs, files=files))

    assert holding(other, entry).program(_executorch.runs_here) == entry
    with pytest.raises(IncompatibleProgram, match=(
            rf"cloister \(operators {other.operator_abi}\) only.*for another backend\.$")):
        holding(other).program(_executorch.runs_here)


@pytest.mark.parametrize("memory", ["", "{", "[]", '{"x": 1}', "[" * 100_000])
def test_a_damaged_memory_of_programs_costs_a_hash_only(bundle: Bundle, memory: str) -> None:
    settings_ = Settings.from_environment()
    settings_.seen_programs.parent.mkdir(parents=True, exist_ok=True)
    settings_.seen_programs.write_text(memory)
    bundle.check_program(bundle.manifest.programs[0], settings_)


def leftovers(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir() if path.name != "tiny.cloister")


def test_only_a_bundle_is_ever_replaced(tmp_path: Path) -> None:
    mine = tmp_path / "documents"
    mine.mkdir()
    (mine / "thesis").write_text("years of work")
    with pytest.raises(OutputExists, match="no bundle"), bundles.writer(mine, replace=True):
        raise AssertionError("not reached")
    assert (mine / "thesis").read_text() == "years of work"
    assert leftovers(tmp_path) == ["documents"]


def test_replacing_a_bundle_leaves_the_new_one_alone(bundle: Bundle) -> None:
    with bundles.writer(bundle.path, replace=True) as directory:
        for name in FILES:
            shutil.copy(bundle.path / name, directory)
        (directory / "receipt.json").write_text('{"new": true}')
        bundles.finish(
            directory, lambda files: msgspec.structs.replace(bundle.manifest, files=files))
    again = Bundle.open(bundle.path)
    again.verify()
    assert again.receipt() == {"new": True}
    assert leftovers(bundle.path.parent) == []


@pytest.mark.parametrize("where", ["/proc/x.cloister", "no/such/x.cloister", "x" * 300])
def test_a_place_that_cannot_be_written_to_is_named(tmp_path: Path, where: str) -> None:
    with pytest.raises(OutputUnwritable), bundles.writer(tmp_path / where):
        raise AssertionError("not reached")
    assert leftovers(tmp_path) == []


def test_an_existing_output_is_kept(bundle: Bundle) -> None:
    with pytest.raises(OutputExists), bundles.writer(bundle.path):
        pass
    bundle.verify()


@pytest.mark.parametrize("error", [ValueError("x"), KeyboardInterrupt(), OSError(errno.EIO, "x")])
def test_a_failure_leaves_nothing_behind_and_the_old_bundle_whole(
    bundle: Bundle, error: BaseException
) -> None:
    with pytest.raises((type(error), OutputUnwritable)), \
            bundles.writer(bundle.path, replace=True) as directory:
        (directory / "program.xnnpack.pte").write_bytes(b"half")
        raise error
    bundle.verify()
    assert leftovers(bundle.path.parent) == []


def test_a_full_disk_is_named_and_leaves_nothing_behind(tmp_path: Path) -> None:
    with pytest.raises(NotEnoughDisk), bundles.writer(tmp_path / "x.cloister"):
        raise OSError(errno.ENOSPC, "no space")
    assert leftovers(tmp_path) == []


def test_too_little_disk_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(NotEnoughDisk, match="GB"), \
            bundles.writer(tmp_path / "x.cloister", size_bytes=2**60):
        raise AssertionError("not reached")
    assert leftovers(tmp_path) == []


@given(data=st.data())
@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_no_change_of_a_manifest_gets_through_unnamed(
    bundle: Bundle, data: st.DataObject
) -> None:
    """Any damage either leaves the bundle equal, or raises an error of ours."""
    raw = bytearray(bundle.manifest.to_json().encode())
    for _ in range(data.draw(st.integers(1, 4))):
        position = data.draw(st.integers(0, len(raw) - 1))
        kind = data.draw(st.sampled_from(("flip", "cut", "insert")))
        if kind == "flip":
            raw[position] ^= data.draw(st.integers(1, 255))
        elif kind == "cut":
            del raw[position:position + data.draw(st.integers(1, 40))]
        else:
            raw[position:position] = data.draw(st.binary(min_size=1, max_size=20))
        if not raw:
            break
    (bundle.path / "manifest.json").write_bytes(raw)
    try:
        opened = Bundle.open(bundle.path)
        opened.verify()  # the programs too, which opening leaves to the first load
    except CloisterError:
        return
    finally:
        (bundle.path / "manifest.json").write_text(bundle.manifest.to_json())
    assert opened.manifest.files == bundle.manifest.files
