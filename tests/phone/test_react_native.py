"""React Native: the glue fits the package's types, and keeps what it promises on the runner."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.phone import old_export, templates
from tests.phone.react_native_glue import (
    built,
    bytecode,
    golden,
    missing,
    results,
    type_errors,
    written,
)

from cloister import reference
from cloister.bundle import Bundle
from cloister.embed.facts import facts_of
from cloister.message import Message
from cloister.runtime import _executorch
from cloister.tokenizer import Tokenizer

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", autouse=True)
def tools() -> None:
    if lacking := missing():  # looked for here: it may fetch the packages first
        pytest.skip(lacking)


@pytest.fixture(scope="module")
def app(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written(tmp_path_factory.mktemp("app") / "glue")


@pytest.fixture(scope="module")
def came(app: Path) -> Mapping[str, Any]:
    return results(app, golden(Bundle.open(reference.bundle_path("nano-1"))))


def test_the_glue_fits_the_types_of_the_package(app: Path) -> None:
    assert type_errors(app) == ""


def test_what_the_readme_pastes_fits_too(tmp_path: Path) -> None:
    app = written(tmp_path / "glue")
    pasted = (app / "README.md").read_text().split("```tsx\n")[1].split("```")[0]
    (app / "src" / "App.tsx").write_text(pasted.replace("./cloister/src", "."))
    assert type_errors(app) == ""


def test_it_is_built_as_an_app_is_down_to_the_code_of_hermes(app: Path, tmp_path: Path) -> None:
    built(app, tmp_path / "built")
    assert bytecode(tmp_path / "built") == []
    assert (tmp_path / "built" / "useChat.hbc").stat().st_size > 1000
    (tmp_path / "built" / "chat.js").write_text("let answer = ;")
    assert bytecode(tmp_path / "built") == ["chat.js"]


def test_a_field_that_the_package_does_not_have_is_found(tmp_path: Path) -> None:
    app = written(tmp_path / "glue")
    chat = app / "src" / "chat.ts"
    chat.write_text(chat.read_text().replace("maxNewTokens: limit", "maxTokens: limit"))
    assert "'maxTokens' does not exist in type" in type_errors(app)


def test_golden_answers_are_given_without_the_text_of_the_end(came: Mapping[str, Any]) -> None:
    bundle = Bundle.open(reference.bundle_path("nano-1"))
    assert len(came["golden"]) == len(bundle.golden())
    assert [heard["text"] for heard in came["golden"]] == [row.answer for row in golden(bundle)]
    assert all("".join(heard["pieces"]) == heard["text"] for heard in came["golden"])
    assert {heard["ending"] for heard in came["golden"]} <= {"ended", "limit"}


def test_the_first_start_says_how_far_it_is(came: Mapping[str, Any]) -> None:
    assert came["progress"] == ["hashing", "loading", "ready"]  # its answers were compared before


def test_an_android_app_has_its_files_copied_out_once(came: Mapping[str, Any]) -> None:
    assert came["android"]["same"]
    assert came["android"]["answer"]["ending"] == "limit"


def test_a_conversation_is_what_the_model_would_say_to_the_whole_of_it(
        came: Mapping[str, Any]) -> None:
    bundle = Bundle.open(reference.bundle_path("nano-1"))
    messages = [Message(role="system", content="Be brief.")]
    asked = ((24, "What is the weather in Paris?"), (3, "What will it be in Rome on Sunday?"),
             (24, "Who are you?"))
    for heard, (limit, text) in zip(came["conversation"], asked, strict=True):
        messages.append(Message(role="user", content=text))
        text, read, cut = greedy(bundle, messages, limit)
        assert (heard["text"], heard["read"], heard["ending"] == "limit") == (text, read, cut)
        messages.append(Message(role="assistant", content=heard["text"]))
    assert [heard["ending"] for heard in came["conversation"]] == ["ended", "limit", "ended"]


def test_the_end_of_the_context_is_a_result_and_reset_begins_anew(
        came: Mapping[str, Any]) -> None:
    full = came["full"]
    assert 10 < full["turns"] < 100
    assert full["again"] == full["long"] == {"text": "", "ending": "context full", "lost": 0}
    assert full["anew"]["ending"] == "limit"


def test_an_answer_is_stopped_in_the_middle_and_before_it_began(came: Mapping[str, Any]) -> None:
    assert came["stopped"]["ending"] == came["stoppedAtOnce"]["ending"] == "stopped"
    assert 3 <= len(came["stopped"]["pieces"]) <= 6
    assert came["closedInTheMiddle"] == {"ending": "stopped", "after": "closed"}
    assert came["twice"] == {"first": "limit", "second": "asked twice"}


def test_a_first_token_that_ends_the_answer_ends_it(came: Mapping[str, Any]) -> None:
    at_once = came["endsAtOnce"]
    assert (at_once["text"], at_once["ending"], at_once["pieces"]) == ("", "ended", [])
    assert at_once["read"] == 1


def test_a_character_that_is_split_over_tokens_is_told_as_lost(came: Mapping[str, Any]) -> None:
    arguments = '"arguments": {"city": "S\ufffd\ufffdo Paulo"}'
    assert came["split"]["text"] == f'{{"name": "GetWeather", {arguments}}}'
    assert (came["split"]["ending"], came["split"]["lost"]) == ("ended", 2)


@pytest.mark.parametrize(("case", "reason", "said"), [
    ("special", "special token", "control token"),
    ("specialSystem", "special token", "control token"),
    ("noSystem", "no system prompt", "takes no system prompt"),
    ("changedByte", "file differs", "program.xnnpack.pte"),
    ("missing", "file missing", "tokenizer.json"),
    ("memory", "too little memory", "MB"),
    ("wrongGolden", "check failed", "does not answer on this device"),
    ("hot", "temperature", "within 0 and 1"),
    ("failed", "failed", "begins anew"),
])
def test_what_cannot_be_is_refused_by_name(
        came: Mapping[str, Any], case: str, reason: str, said: str) -> None:
    assert came[case]["refused"] == reason
    assert said in came[case]["message"]
    assert "Secret" not in came[case]["message"]


def test_memory_is_refused_with_both_numbers(came: Mapping[str, Any]) -> None:
    taken = facts_of(Bundle.open(reference.bundle_path("nano-1"))).memory_bytes
    assert f"takes {-(-taken // 10**6)} MB" in came["memory"]["message"]
    assert f"about {-(-(taken - 10**6) // 10**6)} MB" in came["memory"]["message"]


def test_the_chat_goes_on_after_a_failure(came: Mapping[str, Any]) -> None:
    assert came["failed"]["then"] == came["full"]["anew"]


def test_another_release_of_the_package_is_refused_by_name(app: Path) -> None:
    came = results(app, version="0.9.3")
    assert came["release"]["refused"] == "other release"
    assert "0.9.3" in came["release"]["message"] and "0.10.2" in came["release"]["message"]


def test_an_old_export_fails(tmp_path: Path) -> None:
    old = old_export.bundle(tmp_path)
    if old is None:
        pytest.skip("this checkout has no history, and so no old export")
    app = written(tmp_path / "glue", old)
    with pytest.raises((ChildProcessError, AssertionError), match=r"SIGSEGV|check failed"):
        assert "refused" not in results(app)["conversation"], "check failed"


def test_prompts_are_what_the_package_lays_out_by_jinja() -> None:
    found = templates.agreement(Bundle.open(reference.bundle_path("nano-1")))
    assert len(found) == 1 + len(templates.THEIRS)
    for name, (laid_out, equal, told, equally_told) in found.items():
        assert laid_out >= 10 and equal == len(templates.CONVERSATIONS), name
        assert told == equally_told, name
    in_strings = {name for name, (_, _, told, _) in found.items() if told}
    assert {"the bundle's", "llama3", "gemma", "qwen2_5", "lfm2"} <= in_strings


def greedy(bundle: Bundle, messages: Sequence[Message], limit: int) -> tuple[str, int, bool]:
    """What our own loop says to a conversation, what it has read then, and whether it was cut."""
    tokenizer = Tokenizer.from_files(
        bundle.tokenizer_path, bundle.template_path, bundle.manifest)
    program = _executorch.load(
        bundle.path / bundle.manifest.programs[0].file, bundle.manifest.shape.layers, threads=1)
    ids, out = tokenizer.encode_chat(messages), list[int]()
    logits = program.forward(torch.tensor([ids]), 0)
    while len(out) < limit:
        token = int(logits.argmax())
        if token in bundle.manifest.eos:
            break
        out.append(token)
        logits = program.forward(torch.tensor([[token]]), len(ids) + len(out) - 1)
    cut = len(out) == limit  # and the last token was not read
    return tokenizer.decode(out), len(ids) + len(out) - cut, cut
