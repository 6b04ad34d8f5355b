"""The C++ glue of `cloister embed`, built against the wheel: what it answers and refuses."""

from __future__ import annotations

import shutil
import signal
import subprocess
from pathlib import Path

import pytest
import tokenizers
import torch
from tests.phone import cpp_glue, old_export
from tests.phone.cpp_glue import ENVIRONMENT, FROM_A_SHELL, LOADS, Turn, driven, golden

from cloister import reference
from cloister.bundle import Bundle
from cloister.message import Message
from cloister.prompt_format import assemble
from cloister.runtime import _executorch

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(cpp_glue.missing()), reason=f"this machine lacks {cpp_glue.missing()}"),
]

SAID = ("Is it cold?", "Who are you?", "Tell me a story")


@pytest.fixture(scope="module")
def bundle() -> Bundle:
    return Bundle.open(reference.bundle_path("nano-1"))


@pytest.fixture(scope="module")
def glue(tmp_path_factory: pytest.TempPathFactory, bundle: Bundle) -> Path:
    return cpp_glue.embedded(bundle, tmp_path_factory.mktemp("cpp"))


@pytest.fixture(scope="module")
def drive(glue: Path) -> Path:
    return cpp_glue.build("drive", glue, glue.parent / "build")


class Reference:
    """Greedy decoding by Cloister's own runtime, on ids."""

    def __init__(self, bundle: Bundle) -> None:
        self.bundle = bundle
        self.plain = tokenizers.Tokenizer.from_file(str(bundle.tokenizer_path))
        self.program = _executorch.load(
            bundle.path / bundle.manifest.programs[0].file, bundle.manifest.shape.layers, threads=1)

    def ids(self, text: str) -> list[int]:
        return self.plain.encode(text, add_special_tokens=False).ids

    def answer(self, ids: list[int], limit: int = 256) -> list[int]:
        """Return the answer to `ids`, with the token that ends it."""
        for start, token in enumerate(ids):
            logits = self.program.forward(torch.tensor([[token]]), start)
        out: list[int] = []
        for start in range(len(ids), len(ids) + limit):
            out.append(int(logits.argmax()))
            if out[-1] in self.bundle.manifest.eos:
                break
            logits = self.program.forward(torch.tensor([out[-1:]]), start)
        return out

    def text(self, ids: list[int]) -> str:
        ended = ids[-1] in self.bundle.manifest.eos
        return self.plain.decode(ids[:-1] if ended else ids, skip_special_tokens=False)


@pytest.fixture(scope="module")
def reference_(bundle: Bundle) -> Reference:
    return Reference(bundle)


def turn(bundle: Bundle, text: str) -> str:
    format_ = bundle.manifest.prompt_format
    assert format_ is not None
    return format_.user.before + text + format_.user.after + format_.answer


def after(bundle: Bundle) -> str:
    format_ = bundle.manifest.prompt_format
    assert format_ is not None
    return format_.assistant.after


def events(turns: list[Turn]) -> list[str]:
    return [" ".join(each.events[-1].split()[:2]) for each in turns[1:]]


@pytest.mark.parametrize("load", LOADS)
@pytest.mark.parametrize("cache", ["on", "off"])
def test_golden_answers_are_given(
        drive: Path, glue: Path, bundle: Bundle, load: str, cache: str) -> None:
    same, asked = golden(drive, glue, bundle, load=load, cache=cache)
    assert same == asked == len(bundle.golden())


def test_a_conversation_goes_on_where_it_was(
        drive: Path, glue: Path, bundle: Bundle, reference_: Reference) -> None:
    turns = driven(drive, glue / "model", *(f"say 0 {text}" for text in SAID), limit=60)
    ids: list[int] = []
    for number, (text, said) in enumerate(zip(SAID, turns[1:], strict=True)):
        ids += reference_.ids((after(bundle) if number else "") + turn(bundle, text))
        answer = reference_.answer(ids, 60)
        assert said.text == reference_.text(answer)
        ids += answer[:-1] if answer[-1] in bundle.manifest.eos else answer


@pytest.mark.parametrize("how", ["stop", "limit", "throw"])
def test_after_a_stop_the_model_has_read_what_was_shown_and_no_more(
        drive: Path, glue: Path, bundle: Bundle, reference_: Reference, how: str) -> None:
    lines = [f"{'say' if how == 'limit' else how} 3 {SAID[2]}", f"say 0 {SAID[1]}"]
    turns = driven(drive, glue / "model", *lines, limit=3 if how == "limit" else 40)
    first = reference_.ids(turn(bundle, SAID[2]))
    shown = reference_.answer(first, 3)
    assert len(shown) == 3
    assert turns[1].text == reference_.text(shown)
    assert events(turns)[0] == {
        "stop": "result stopped", "limit": "result limit", "throw": "thrown the"}[how]
    second = [*first, *shown, *reference_.ids(after(bundle) + turn(bundle, SAID[1]))]
    wanted = reference_.answer(second, 3 if how == "limit" else 40)
    assert turns[2].text == reference_.text(wanted)


def test_a_first_token_that_ends_the_answer_ends_it(
        drive: Path, glue: Path, bundle: Bundle, reference_: Reference) -> None:
    first = reference_.ids(turn(bundle, SAID[0]))
    shown = reference_.answer(first, 1)  # the runner does not look at it
    turns = driven(drive, glue / "model", f"say 0 {SAID[0]}", f"say 0 {SAID[2]}", limit=40,
                   end=reference_.text(shown))
    assert (turns[1].text, events(turns)[0]) == ("", "result ended")
    second = [*first, *shown, *reference_.ids(after(bundle) + turn(bundle, SAID[2]))]
    said = b"".join(turns[2].pieces).decode().removesuffix(after(bundle))
    assert said == reference_.text(reference_.answer(second, 40))


def test_characters_are_whole_where_tokens_are_not(
        drive: Path, glue: Path, reference_: Reference) -> None:
    assert len(reference_.ids("\u00e3")) == 2
    lines = ["say 0 what is the weather in S\u00e3o Paulo",
             "say 0 play na\u00efve by M\u00f6tley Cr\u00fce"]  # answers with half a character
    turns = driven(drive, glue / "model", *lines, limit=60)
    assert "S\u00e3o Paulo" in turns[1].text
    assert "\u00e3".encode() in turns[1].pieces
    assert all(piece.decode() for each in turns for piece in each.pieces)


def test_a_system_prompt_opens_each_conversation(
        drive: Path, glue: Path, bundle: Bundle, reference_: Reference) -> None:
    format_ = bundle.manifest.prompt_format
    assert format_ is not None
    messages = [Message(role="system", content="Be brief."), Message(role="user", content=SAID[1])]
    wanted = reference_.text(reference_.answer(reference_.ids(assemble(format_, messages)), 40))
    turns = driven(drive, glue / "model", f"say 0 {SAID[1]}", f"say 0 {SAID[0]}", "reset",
                   f"say 0   {SAID[1]} \u3000", system=" Be brief.\u00a0", limit=40, strip="yes")
    assert [turns[1].text, turns[-1].text] == [wanted, wanted]


def test_the_end_of_the_context_is_a_result(drive: Path, glue: Path, bundle: Bundle) -> None:
    long = "again " * bundle.manifest.context
    lines = [f"say 0 {SAID[1]}"] + [f"say 0 {SAID[2]}"] * 40 + [f"say 0 {long}", "reset"]
    _, first, *rest = driven(
        drive, glue / "model", f"say 0 {long}", *lines, f"say 0 {SAID[1]}", limit=100)
    assert (first.pieces, first.events) == ([], ["result context_full"])
    *turns, last = rest
    full = [number for number, each in enumerate(turns) if "result context_full" in each.events]
    assert full
    assert turns[0].events == last.events
    assert turns[0].text == last.text  # a text that does not fit changes nothing, and reset all
    assert all(not each.pieces for each in turns[full[0] + 1:])


def test_two_at_once_are_refused_and_closing_stops(drive: Path, glue: Path) -> None:
    turns = driven(drive, glue / "model", f"twice 2 {SAID[2]}", limit=10)
    assert turns[1].events[0].startswith("refused busy ")
    assert len(turns[1].pieces) == 2
    assert turns[2].events == ["result limit"]
    turns = driven(drive, glue / "model", f"close 2 {SAID[2]}", f"say 0 {SAID[1]}", "reset")
    assert len(turns[1].pieces) == 2
    assert events(turns) == ["result stopped", "refused closed", "refused closed"]


REFUSED = [
    ({"memory": 1_000_000}, "too_little_memory"),
    ({"wrong": 0}, "wrong_answer"), ({"wrong": 1}, "wrong_answer"),
    ({"system": "Be <|user|>"}, "special_text"),
    ({"system": "Be brief.", "without": "yes"}, "no_system_prompt"),
    ({"limit": 0}, "bad_setting"), ({"temperature": 1.5}, "bad_setting"),
    ({"temperature": "nan"}, "bad_setting"),
]


@pytest.mark.parametrize(("options", "reason"), REFUSED)
def test_a_start_is_refused_by_name(
        drive: Path, glue: Path, bundle: Bundle, options: dict[str, object], reason: str) -> None:
    (start,) = driven(drive, glue / "model", f"say 0 {SAID[1]}", **options)
    assert start.events[-1].startswith(f"refused {reason} ")
    if "memory" in options:
        program, shape = bundle.manifest.programs[0], bundle.manifest.shape
        locked, later = 2 * shape.vocab_size * shape.hidden_size, 64 << 20
        needed = program.weight_bytes + program.kv_bytes + program.arena_bytes + locked + later
        assert f" {needed} bytes" in start.events[-1]
        assert " 1000000 are free" in start.events[-1]


@pytest.mark.parametrize("name", ["program.xnnpack.pte", "tokenizer.json"])
def test_files_are_checked_until_a_start_went_well(
        drive: Path, glue: Path, tmp_path: Path, name: str) -> None:
    model, mark = shutil.copytree(glue / "model", tmp_path / "model"), tmp_path / "mark"
    whole = (model / name).read_bytes()
    (model / name).write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    (start,) = driven(drive, model, mark=mark)
    assert start.events[-1].startswith(f"refused changed_file {name} ")
    (model / name).write_bytes(whole[:-1])
    (start,) = driven(drive, model, mark=mark)
    assert start.events[-1].startswith(f"refused changed_file {name} ")
    (model / name).unlink()
    (start,) = driven(drive, model, mark=mark)
    assert start.events[-1].startswith(f"refused missing_file {name} ")
    (model / name).write_bytes(whole)
    first, second = (driven(drive, model, mark=mark)[0] for _ in range(2))
    steps = {event.split()[2] for event in first.events[:-1]}
    assert steps == {"hashing", "loading", "checking"}
    assert {event.split()[2] for event in second.events[:-1]} == {"loading"}
    (model / name).write_bytes(b"no program")
    (start,) = driven(drive, model, mark=mark)
    assert start.events[-1].startswith("refused cannot_load ExecuTorch cannot ")
    assert name in start.events[-1]


def test_sanitizers_find_nothing(glue: Path, tmp_path: Path) -> None:
    drive = cpp_glue.build("drive", glue, tmp_path, cpp_glue.SANITIZED)
    lines = ["say 0 play na\u00efve by M\u00f6tley", "say 0 <|end|>", f"stop 3 {SAID[2]}", "reset",
             f"throw 2 {SAID[2]}", f"twice 2 {SAID[2]}", "say 0 " + "again " * 2000,
             f"close 1 {SAID[2]}", f"say 0 {SAID[1]}"]
    turns = driven(drive, glue / "model", *lines, limit=40)
    assert events(turns)[-2:] == ["result stopped", "refused closed"]


def test_a_text_that_spells_a_special_token_is_refused_and_not_repeated(
        drive: Path, glue: Path) -> None:
    turns = driven(drive, glue / "model", "say 0 my secret <|end|> x", f"say 0 {SAID[1]}")
    assert turns[1].events[0].startswith("refused special_text ")
    assert "secret" not in turns[1].events[0]
    assert turns[2].events == ["result ended"]


def test_an_export_that_lets_operators_read_freed_constants_is_found(tmp_path: Path) -> None:
    old = old_export.bundle(tmp_path)
    if old is None:
        pytest.skip("this checkout has no history, and so no old export")
    glue = cpp_glue.embedded(old, tmp_path)
    drive = cpp_glue.build("drive", glue, tmp_path / "build")
    assert driven(drive, glue / "model", cache="off")[0].events[-1] == "ready"
    try:
        said = driven(drive, glue / "model")[0].events[-1]
    except ChildProcessError as error:
        said = str(error)
    assert said.startswith(("refused wrong_answer ", "SIGSEGV"))


def test_three_commands_lead_from_a_bundle_to_the_first_answer(
        tmp_path: Path, bundle: Bundle, reference_: Reference) -> None:
    commands = cpp_glue.readme_commands()
    assert len(commands) == 3
    for command in commands:
        done = subprocess.run(
            command, shell=True, cwd=tmp_path, capture_output=True, text=True, env=FROM_A_SHELL)
        assert done.returncode == 0, done.stderr
    answer = reference_.text(reference_.answer(reference_.ids(turn(bundle, SAID[0]))))
    assert answer in done.stdout
    asked = subprocess.Popen(
        [tmp_path / "first" / "build" / "chat", "--cache", "on", "--limit", "100000"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=ENVIRONMENT)
    assert asked.stdin
    assert asked.stdout
    asked.stdin.write(f"{SAID[0]}\n".encode())
    asked.stdin.flush()
    while asked.stdout.read(1) == b"\n":  # the runner writes one where an answer ends
        pass
    asked.send_signal(signal.SIGINT)
    _, err = asked.communicate(timeout=60)
    assert b"[stopped]" in err or b"[ended]" in err
