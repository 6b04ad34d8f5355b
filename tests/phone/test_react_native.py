"""React Native: the glue fits the package's types, and keeps what it promises on the runner."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from tests.phone import npm, templates
from tests.phone.react_native_glue import CASES, missing, results, type_errors, written

from cloister import prompt_format, reference
from cloister.bundle import Bundle
from cloister.embed.facts import Check, facts_of
from cloister.errors import TokenizerError
from cloister.message import Message
from cloister.tokenizer import Tokenizer
from cloister.tokenizer_config import tokenizer_config

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(missing()), reason=str(missing())),
]


@pytest.fixture(scope="module")
def app(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written(tmp_path_factory.mktemp("app") / "glue")


@pytest.fixture(scope="module")
def golden() -> tuple[Check, ...]:
    return facts_of(Bundle.open(reference.bundle_path("nano-1"))).checks


@pytest.fixture(scope="module")
def came(app: Path, golden: tuple[Check, ...]) -> Mapping[str, Any]:
    rows = [{"prompt": row.prompt, "tokens": row.tokens} for row in golden]
    return results(app, rows)


def test_the_glue_fits_the_types_of_the_package(app: Path) -> None:
    assert type_errors(app) == ""


def test_a_field_that_the_package_does_not_have_is_found(tmp_path: Path) -> None:
    app = written(tmp_path / "glue")
    chat = app / "src" / "chat.ts"
    chat.write_text(chat.read_text().replace("maxNewTokens: limit", "maxTokens: limit"))
    assert "'maxTokens' does not exist in type" in type_errors(app)


def test_golden_answers_are_given_without_the_text_of_the_end(
        came: Mapping[str, Any], golden: tuple[Check, ...]) -> None:
    assert [heard["text"] for heard in came["golden"]] == [row.answer for row in golden]
    assert all("".join(heard["pieces"]) == heard["text"] for heard in came["golden"])
    assert {heard["ending"] for heard in came["golden"]} <= {"ended", "limit"}


def test_the_first_start_says_how_far_it_is(came: Mapping[str, Any]) -> None:
    assert came["progress"] == ["hashing", "loading", "ready"]  # its answers were compared before


def test_an_android_app_has_its_files_copied_out_once(came: Mapping[str, Any]) -> None:
    assert came["android"]["same"]
    assert came["android"]["answer"]["ending"] == "limit"
