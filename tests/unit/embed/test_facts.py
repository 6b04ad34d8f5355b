"""What an app must know of a bundle, and the bundles that no stock runner could run."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import msgspec
import pytest

from cloister import family
from cloister.bundle import Bundle, Golden, finish, rewrite_receipt, write_golden
from cloister.embed.facts import facts_of
from cloister.errors import BundleCorrupt, EmbedError


@pytest.fixture
def nano(tmp_path: Path) -> Bundle:
    """A copy of the shipped Nano-1, to be altered."""
    path = tmp_path / "nano-1.cloister"
    shutil.copytree(family.bundle_path("nano-1"), path)
    return Bundle.open(path)


def altered(bundle: Bundle, **values: Any) -> Bundle:
    (bundle.path / "manifest.json").unlink()
    finish(bundle.path, lambda files: msgspec.structs.replace(
        bundle.manifest, files=files, **values))
    return Bundle.open(bundle.path)


def test_an_app_knows_the_files_the_format_and_how_to_check_itself(nano: Bundle) -> None:
    facts, said = facts_of(nano), nano.manifest
    assert facts.program.sha256 == said.files[said.programs[0].file].sha256
    assert facts.program.size_bytes == (nano.path / facts.program.name).stat().st_size
    assert facts.ends == ("<|end|>",) and set(facts.ends) < set(facts.special)
    assert facts.context == 1024 and facts.format == said.prompt_format
    assert facts.memory_bytes > facts.program.size_bytes
    check = facts.checks[0]
    assert check.prompt.endswith(facts.format.answer) and check.answer
    assert not any(end in check.answer for end in facts.ends)
    assert check.prompt not in repr(facts) and check.answer not in repr(facts)


def test_a_conversation_that_needs_jinja_is_refused_with_the_reason(nano: Bundle) -> None:
    bundle = altered(nano, prompt_format=None, prompt_format_reason="the template reads the clock")
    with pytest.raises(EmbedError, match="the template reads the clock"):
        facts_of(bundle)


def test_a_bundle_of_own_operators_alone_says_what_an_app_links_for_them(nano: Bundle) -> None:
    (program,) = nano.manifest.programs
    own = msgspec.structs.replace(program, backend="cloister", operator_abi=7)
    bundle = altered(nano, programs=(own,))
    with pytest.raises(EmbedError, match="link `cloister_kernels` of operator ABI 7"):
        facts_of(bundle)


def test_a_tokenizer_that_phones_cannot_read_is_refused_with_what_the_export_said(
    nano: Bundle
) -> None:
    reason = {"reason": "their tokenizer has no decoder Metaspace"}
    bundle = rewrite_receipt(nano, {**nano.receipt(), "phone_tokenizer": reason})
    with pytest.raises(EmbedError, match="no decoder Metaspace"):
        facts_of(bundle)


def test_a_bundle_that_is_not_what_it_says_is_refused(nano: Bundle) -> None:
    path = nano.path / nano.manifest.programs[0].file
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)
    with pytest.raises(BundleCorrupt, match="sha256"):
        facts_of(nano)


def test_an_answer_that_is_no_text_checks_nothing(nano: Bundle) -> None:
    """Half a character, or a prompt that would be other ids."""
    half = Golden(prompt=nano.golden()[0].prompt, tokens=(140,), margin=1.0)
    write_golden(nano.path, [half])
    with pytest.raises(EmbedError, match="golden"):
        facts_of(altered(nano))
    assert json.loads((nano.path / "golden.jsonl").read_text("utf-8"))["tokens"] == [140]
