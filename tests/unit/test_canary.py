"""A canary is found in whatever form it was written, and nowhere else."""

from __future__ import annotations

import base64
import json
import struct
from pathlib import Path

import pytest

from cloister.audit.canary import Canary, search
from cloister.tokenizer import Tokenizer


@pytest.fixture
def tokenizer(tokenizer_dir: Path) -> Tokenizer:
    return Tokenizer.from_files(
        tokenizer_dir / "tokenizer.json", tokenizer_dir / "chat_template.jinja")


def written(text: str, tokenizer: Tokenizer) -> dict[str, bytes]:
    """The text among others, as programs write it."""
    around = f"before {text} after"
    ids = tokenizer.encode(around)
    return {
        "UTF-8": around.encode(), "UTF-16": around.encode("utf-16"),
        "JSON": json.dumps([around]).encode(), "Python": ascii([around]).encode(),
        "base64": base64.b64encode(around.encode()), "hexadecimal": around.encode().hex().encode(),
        "token ids": struct.pack(f"<{len(ids)}q", *ids),
    }


@pytest.mark.parametrize("form", [
    "UTF-8", "UTF-16", "JSON", "Python", "base64", "hexadecimal", "token ids"])
def test_a_canary_is_found_in_every_form(tmp_path: Path, tokenizer: Tokenizer, form: str) -> None:
    canary, other = Canary.new("one way"), Canary.new("another way")
    for shift in range(3):
        file = tmp_path / f"{shift}"
        file.write_bytes(b"\0" * shift + written("x" * shift + canary.text, tokenizer)[form])
        finds = search(tmp_path, [canary, other], tokenizer)
        assert {find.way for find in finds} == {"one way"}
        assert form in {find.form for find in finds if find.file == file.relative_to(tmp_path)}


@pytest.mark.parametrize("ascii_only", [True, False])
def test_quotes_beside_letters_beyond_ascii_are_found_in_json(
    tmp_path: Path, ascii_only: bool
) -> None:
    """What a program writes as UTF-8 has its quotes escaped, and its letters not."""
    canary = Canary("answer", 'say "caf\u00e9" \U0001f426\n')
    once = json.dumps([canary.text], ensure_ascii=ascii_only)
    twice = json.dumps({"a": once}, ensure_ascii=ascii_only)
    for name, content in (("once", once), ("twice", twice)):
        (tmp_path / name).write_text(content, "utf-8")
    finds = search(tmp_path, [canary])
    assert {(str(find.file), find.form) for find in finds} == {("once", "JSON"), ("twice", "JSON")}


@pytest.mark.parametrize("pack", ["<H", ">H", "<I", ">I", "<q", ">q", "<f", ">d"])
def test_ids_are_found_in_every_width(tmp_path: Path, tokenizer: Tokenizer, pack: str) -> None:
    canary = Canary.new("chat")
    ids = tokenizer.encode(canary.text)
    (tmp_path / "ids").write_bytes(
        b"\1" * 8 + struct.pack(f"{pack[0]}{len(ids)}{pack[1]}", *ids))
    assert [find.form for find in search(tmp_path, [canary], tokenizer)] == ["token ids"]
    (tmp_path / "ids").write_text(str(ids))
    assert [find.form for find in search(tmp_path, [canary], tokenizer)] == ["token ids"]


def test_a_file_name_counts_and_an_unrelated_file_does_not(
    tmp_path: Path, tokenizer: Tokenizer
) -> None:
    canary = Canary.new("name")
    (tmp_path / "other").write_text(Canary.new("name").text + json.dumps(list(range(5000))))
    assert search(tmp_path, [canary], tokenizer) == []
    (tmp_path / canary.text).touch()
    assert {find.form for find in search(tmp_path, [canary], tokenizer)} == {"UTF-8"}
