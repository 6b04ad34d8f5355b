"""A notebook is searched wherever it keeps text, and what is found is not quoted."""

from __future__ import annotations

import base64
import html
import json
import random
import re
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cloister import cli
from cloister.audit.canary import Canary
from cloister.audit.notebook import GRAM, TEXT, Finding, Fingerprints, Trail, check, personal
from cloister.errors import DataError
from cloister.reference.redaction import generate
from cloister.settings import Settings
from cloister.vault import local
from cloister.vault.namespace import Kind
from cloister.vault.store import Vault

SAID = ("my landlord Zephyr Quartz wants the caf\u00e9 keys back by Friday "
        "\u0436\u0438\u0432\u043e \U0001f426 \u4f60\u597d")


@pytest.fixture
def vault() -> Iterator[Vault]:
    settings = Settings.from_environment()
    with local.open_vault(settings=settings, create=True, notify=lambda notice: None) as opened:
        yield opened


@pytest.fixture
def trail(vault: Vault) -> Trail:
    made = Trail(vault.namespace(), Kind.HISTORY)
    made.record([SAID])
    return made


def notebook(source: Any = "1 + 1", outputs: Any = (), **more: Any) -> dict[str, Any]:
    return {
        "nbformat": 4, "nbformat_minor": 5, "metadata": more.pop("metadata", {}), "cells": [
            {"cell_type": "markdown", "id": "a1", "metadata": {}, "source": ["# A title\n"]},
            {"cell_type": "code", "id": "b2", "execution_count": 1, "metadata": {},
             "source": source, "outputs": list(outputs), **more}]}


def written(path: Path, value: Any, *, ascii_: bool = False) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(value, ensure_ascii=ascii_, indent=1), "utf-8")
    return path


def found(path: Path, *trails: Trail) -> list[tuple[int, str, str]]:
    return [(each.cell, each.place, each.kind) for each in check(path, trails).findings]


PLACES: dict[str, tuple[int, str, Callable[[str], dict[str, Any]]]] = {
    "source": (2, "source", lambda text: notebook(["x = 1\n", f'lab("{text}")\n'])),
    "stream": (2, "outputs", lambda text: notebook(outputs=[
        {"output_type": "stream", "name": "stdout", "text": ["Answer:\n", text]}])),
    "stream in pieces": (2, "outputs", lambda text: notebook(outputs=[
        {"output_type": "stream", "name": "stdout", "text": text[n:n + 3]}
        for n in range(0, len(text), 3)])),
    "error": (2, "outputs", lambda text: notebook(outputs=[
        {"output_type": "error", "ename": "X", "evalue": "", "traceback": [f"\x1b[31m{text}"]}])),
    "HTML": (2, "outputs", lambda text: notebook(outputs=[{
        "output_type": "display_data", "metadata": {}, "data": {
            "text/html": "".join(f"<b>{html.escape(w)}</b> " for w in text.split())}}])),
    "cell metadata": (2, "metadata", lambda text: notebook(metadata_=text)),
    "attachment": (2, "attachments", lambda text: notebook(
        attachments={"a.txt": {"text/plain": text}})),
    "metadata": (0, "metadata", lambda text: notebook(metadata={"lab": {"asked": text}})),
    "widget state": (0, "widget state", lambda text: notebook(metadata={"widgets": {
        "application/vnd.jupyter.widget-state+json": {"state": {"m1": {"state": {
            "value": text}}}}}})),
    "widget tokens": (0, "widget state", lambda text: notebook(metadata={"widgets": {"state": [
        {"id": n, "text": f" {word}"} for n, word in enumerate(text.split())]}})),
    "widget buffer": (0, "widget state", lambda text: notebook(metadata={"widgets": {"buffers": [
        {"encoding": "base64", "data": base64.b64encode(text.encode()).decode()}]}})),
    "name of a field": (0, "metadata", lambda text: notebook(metadata={text: 1})),
    "format 3": (1, "source", lambda text: {"worksheets": [{"cells": [{"input": text}]}]}),
}


@pytest.mark.parametrize("place", PLACES)
def test_a_text_is_found_in_every_place(tmp_path: Path, trail: Trail, place: str) -> None:
    cell, name, write = PLACES[place]
    assert found(written(tmp_path / "a.ipynb", write("x" * 50)), trail) == []
    for text in (SAID, SAID.upper(), SAID[10:]):
        assert found(written(tmp_path / "a.ipynb", write(text)), trail) == [(cell, name, TEXT)]


@pytest.mark.parametrize("form", [
    json.dumps, ascii, html.escape, quote, lambda text: json.dumps(json.dumps(text)),
    lambda text: base64.b64encode(text.encode()).decode(),
    lambda text: base64.urlsafe_b64encode(text.encode("utf-16-le")).decode(),
    lambda text: base64.b64encode(json.dumps([text]).encode()).decode(),
    lambda text: text.encode().hex(), lambda text: text.replace(" ", "\u00a0\u200b"),
    lambda text: text.replace(" ", "\n> "), lambda text: "".join(
        chr(ord(sign) + 0xfee0) if "!" <= sign <= "~" else sign for sign in text)])
def test_a_text_is_found_in_every_form(
    tmp_path: Path, trail: Trail, form: Callable[[str], str]
) -> None:
    value = notebook(outputs=[{"output_type": "stream", "name": "stdout", "text": form(SAID)}])
    for ascii_ in (True, False):
        path = written(tmp_path / "a.ipynb", value, ascii_=ascii_)
        assert found(path, trail) == [(2, "outputs", TEXT)]


def test_a_canary_is_found_and_another_one_is_not(tmp_path: Path, trail: Trail) -> None:
    mine, other = Canary.new("prompt").text, Canary.new("prompt").text
    trail.record([mine])
    for text, wanted in ((mine, [(2, "source", TEXT)]), (other, [])):
        assert found(written(tmp_path / "a.ipynb", notebook(text)), trail) == wanted
    token = mine.split()[2]
    assert found(written(tmp_path / "a.ipynb", notebook(f"x{token}")), trail) == []
    assert found(written(tmp_path / "a.ipynb", notebook(f"x={token}")), trail) != []


def test_the_checkpoint_is_searched_even_where_half_of_it_was_written(
    tmp_path: Path, trail: Trail
) -> None:
    path = written(tmp_path / "a b.ipynb", notebook())
    checkpoint = tmp_path / ".ipynb_checkpoints" / "a b-checkpoint.ipynb"
    written(checkpoint, notebook(SAID))
    name = ".ipynb_checkpoints/a b-checkpoint.ipynb"
    assert check(path, [trail]).findings == (
        Finding(file=name, cell=2, place="source", kind=TEXT, count=check(
            path, [trail]).findings[0].count),)
    whole = checkpoint.read_bytes()
    checkpoint.write_bytes(whole[:len(whole) - 20])
    assert found(path, trail) == [(0, "text", TEXT)]


def test_a_short_text_is_found_where_it_stands_alone(tmp_path: Path, trail: Trail) -> None:
    trail.record(["Jane Quartz", "I don't know him", "yes", "Zephyr Quartz\n5 Long Lane"])
    for source in ("Zephyr Quartz\n5 Long Lane", 'x = """Zephyr Quartz\n5 Long Lane"""',
                   "Jane Quartz", 'ask("jane quartz!")', "x = ['Jane Quartz']",
                   'a\n"I don\'t know him"'):
        assert found(written(tmp_path / "a.ipynb", notebook(source)), trail) != [], source
    for source in ("Jane Quartz is here", "yes", "I don't know him yet"):
        assert found(written(tmp_path / "a.ipynb", notebook(source)), trail) == [], source


@given(st.lists(st.text(st.characters(categories=["L", "N"]), min_size=1, max_size=8),
                min_size=GRAM, max_size=12), st.text(max_size=10), st.text(max_size=10))
def test_any_words_in_a_row_are_found_among_others(
    words: list[str], before: str, after: str
) -> None:
    prints = Fingerprints(b"key")
    text = " ".join(words)
    assert prints.of(text) <= prints.within([f"{before} {text} {after}"])
    if prints.of(text):
        assert not prints.of(text) & Fingerprints(b"other key").within([text])


@given(st.lists(st.text(st.characters(max_codepoint=127)), min_size=GRAM))
def test_words_beside_other_scripts_are_the_same_words(parts: list[str]) -> None:
    prints, text = Fingerprints(b"key"), "x".join(parts)
    if len(re.findall(r"\w+", text)) < GRAM:
        return
    assert prints.of(text) <= prints.within([f"{text}\n\u00e9"])


def test_fingerprints_are_kept_once_survive_the_vault_and_are_forgotten(vault: Vault) -> None:
    space = vault.namespace("lab")
    trail = Trail(space, Kind.HISTORY)
    trail.record([SAID, SAID])
    trail.record([SAID])
    assert len(space.records(Kind.HISTORY, b"\xfflab fingerprints")) == 1
    assert Trail(space, Kind.HISTORY).known == trail.known != set()
    vault.rotate()
    assert Trail(space, Kind.HISTORY).fingerprints.of(SAID) == trail.known
    assert "landlord" not in repr(trail) and trail.forget() and not trail.forget()
    assert Trail(space, Kind.HISTORY).known == set()


def test_the_forms_of_personal_data_are_found_in_invented_texts() -> None:
    """As often as is said here: what has no form of its own, a bare number, is left alone."""
    wanted, hit, false = Counter[str](), Counter[str](), Counter[str]()
    for example in generate(3000, seed=1):
        labels = Counter(re.findall(r"\[([A-Z]+)\]", example.target.upper()))
        said = personal(example.input)
        for kind in ("email", "account", "card", "phone"):
            count, here = labels[kind.upper()], len(said.get(kind, ()))
            wanted[kind] += count
            hit[kind] += min(count, here)
            false[kind] += max(0, here - count)
    rates = {kind: hit[kind] / wanted[kind] for kind in wanted}
    assert rates["email"] == 1 and rates["account"] > 0.99 and rates["card"] > 0.99
    assert rates["phone"] > 0.85
    assert sum(false.values()) < 0.01 * sum(wanted.values())


@pytest.mark.parametrize("text", [
    "0.1234567890123 3.14159265 1e-10", "2026-11-26T21:16:19.123456Z", "1764191779123456789",
    "123e4567-e89b-12d3-a456-426614174000", "192.168.100.200", "git@github.com:a/b.git",
    "4111 1111 1111 1112", "%timeit -n 1000000", "v1.10.2024", "torch.Size([1024, 1024, 4096])",
    "https://example.org/2024/10/12/1234567890", "a@b", "ISBN 978-3-16-148410-0 "])
def test_what_only_looks_like_personal_data_is_left_alone(text: str) -> None:
    assert personal(text) == {}


def test_personal_data_is_found_where_a_notebook_keeps_it(tmp_path: Path) -> None:
    value = notebook(
        "mail('Jane.Doe@doe.org')",
        [{"output_type": "execute_result", "data": {
            "text/plain": "+49 30 1234567", "image/png": "Jane.Doe@doe.org"}}],
        metadata={"card": 4539578763621486, "authors": [{"iban": "GB33 BUKB 2020 1555 5555 55"}]})
    assert found(written(tmp_path / "a.ipynb", value)) == [
        (0, "metadata", "account"), (0, "metadata", "card"), (2, "outputs", "phone"),
        (2, "source", "email")]


@pytest.mark.parametrize("text", [
    "call 020 7946 0958", "+44 20 7946 0958", "(212) 555-0123", "+1 212-555-0199", "01632 960123",
    "06 39 98 12 34", "+49 30 23125 123", "0491 570 156", "mail ada@example.com", "b@mail.Example",
    "x@localhost.test", "4111 1111 1111 1111", "GB82 WEST 1234 5698 7654 32"])
def test_what_is_reserved_for_examples_is_counted_and_no_finding(
    tmp_path: Path, text: str
) -> None:
    assert personal(text) != {}
    report = check(written(tmp_path / "a.ipynb", notebook(text)), [])
    assert (report.findings, report.reserved) == ((), 1)


@pytest.mark.parametrize("text", [
    "020 7946 1958", "(212) 555-0223", "ada@notexample.com", "ada@example.com.co",
    "4111 1111 1111 1129", "+44 212 555 0123"])
def test_what_is_only_like_an_example_is_found(tmp_path: Path, text: str) -> None:
    assert len(found(written(tmp_path / "a.ipynb", notebook(text)))) == 1


@pytest.mark.parametrize("raw", [
    b"", b"no JSON", b"[]", b"{}", b'{"cells": 1}', b"\xff\xfe", b"[" * 100_000])
def test_what_is_no_notebook_is_refused(tmp_path: Path, raw: bytes) -> None:
    (tmp_path / "a.ipynb").write_bytes(raw)
    with pytest.raises(DataError, match=r"a\.ipynb is no notebook"):
        check(tmp_path / "a.ipynb", [])
    with pytest.raises(DataError, match="cannot be read"):
        check(tmp_path / "none.ipynb", [])


def test_what_is_no_unicode_has_fingerprints_or_none() -> None:
    prints = Fingerprints(b"key")
    assert prints.of("\ud800 \ud800") == prints.of("\u2026 \u2026") == set()
    assert prints.of(f"a \ud800 {SAID}") & prints.within([SAID])


ANY = st.text(st.characters(), max_size=5)  # halves of pairs, too, which JSON can spell


class Nothing:
    """A trail of nothing."""

    fingerprints, known = Fingerprints(b"key"), frozenset[bytes]()


@given(st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | ANY,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(
        ANY | st.sampled_from(["source", "outputs", "text"]), inner, max_size=3)))
def test_whatever_a_cell_holds_is_searched(
    tmp_path_factory: pytest.TempPathFactory, cell: object
) -> None:
    path = tmp_path_factory.mktemp("cell") / "a.ipynb"
    written(path, {"cells": [cell], "metadata": cell}, ascii_=True)
    assert check(path, [Nothing()]).files == ("a.ipynb",)  # type: ignore[list-item]


def test_the_command_says_where_and_ends_with_1_and_quotes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = written(tmp_path / "a.ipynb", notebook(SAID))
    assert cli.main(["lab", "check", str(path), "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["ok"] and record["fingerprints"] is None and record["findings"] == []
    assert not Settings.from_environment().vault.exists()  # a search makes none
    assert cli.main(["lab", "check", str(path)]) == 0
    assert "no vault is here" in capsys.readouterr().out
    with local.open_vault(create=True, notify=lambda notice: None) as vault:
        Trail(vault.namespace("someone"), Kind.HISTORY).record([SAID])
    assert cli.main(["lab", "check", str(path), "--json"]) == 1
    out, err = capsys.readouterr()
    record = json.loads(out)
    (finding,) = record["findings"]
    assert (record["ok"], finding["cell"], finding["place"]) == (False, 2, "source")
    assert record["fingerprints"] > 5 and "by hand" in record["cures"][0]
    assert "landlord" not in out + err
    written(path, notebook(outputs=[{"output_type": "stream", "name": "x", "text": SAID}]))
    assert cli.main(["lab", "check", str(path)]) == 1
    out, err = capsys.readouterr()
    assert "`nbstripout a.ipynb`" in out and "landlord" not in out + err
    assert cli.main(["lab", "check", str(tmp_path / "none.ipynb"), "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["error"] == "DataError"


def test_a_long_notebook_is_searched_in_time(tmp_path: Path, trail: Trail) -> None:
    rng = random.Random(0)
    words = [str(rng.random()) for _ in range(1000)]
    value = notebook(outputs=[
        {"output_type": "stream", "text": " ".join(rng.choices(words, k=2000))} for _ in range(20)])
    assert found(written(tmp_path / "a.ipynb", value), trail) == []
