"""iOS: the Swift of the glue and of every bundle's constants can be parsed. Not compiled."""

from __future__ import annotations

import plistlib
from pathlib import Path

import pytest

from cloister import reference
from cloister.bundle import Bundle
from cloister.embed import ios
from cloister.embed.facts import facts_of
from cloister.embed.write import embed

swift = pytest.importorskip(
    "tests.phone.swift", reason="no parser of Swift: tree-sitter, tree-sitter-swift",
    exc_type=ModuleNotFoundError)
faults = swift.faults


@pytest.fixture(scope="module")
def app(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("app") / "glue"
    embed(Bundle.open(reference.bundle_path("nano-1")), "ios", out)
    return out


def test_every_source_is_parsed(app: Path) -> None:
    sources = sorted(app.rglob("*.swift"))
    assert [path.name for path in sources] == [
        "Package.swift", "CloisterBundle.swift", "CloisterChat.swift", "CloisterFiles.swift"]
    assert {path.name: faults(path.read_text()) for path in sources} == {
        path.name: [] for path in sources}


def test_what_the_readme_pastes_is_parsed(app: Path) -> None:
    pasted = (app / "README.md").read_text().split("```swift\n")[1].split("```")[0]
    assert "CloisterChat.open" in pasted
    assert faults(f"func run() async throws {{\n{pasted}}}\n") == []


def test_what_is_no_swift_is_found(app: Path) -> None:
    source = (app / "Sources/CloisterChat/CloisterChat.swift").read_text()
    assert faults(source.replace("func reset() throws {", "func reset() throws", 1))


@pytest.mark.parametrize(
    "text", ['"', "\\", "\\(name)", "a\nb\r\t", "\u4f60\U0001f980", "\x00", ""])
def test_constants_are_the_same_text_in_swift(text: str) -> None:
    literal = ios._text(text)
    assert not faults(f"let a = {literal}\n")
    assert literal.isascii() and literal.isprintable()
    spelled = literal[1:-1].replace("\\u{", "\\N{").replace('\\"', '"')
    assert _read(spelled) == text


def _read(literal: str) -> str:
    """What Swift reads: \\\\ and the code points of \\N{...}."""
    out, rest = "", literal
    while rest:
        if rest.startswith("\\N{"):
            code, _, rest = rest[3:].partition("}")
            out += chr(int(code, 16))
        else:
            rest = rest.removeprefix("\\")
            out, rest = out + rest[0], rest[1:]
    return out


def test_the_privacy_manifest_says_that_nothing_is_collected(app: Path) -> None:
    told = plistlib.loads((app / "Sources/CloisterChat/PrivacyInfo.xcprivacy").read_bytes())
    assert told == {"NSPrivacyTracking": False, "NSPrivacyTrackingDomains": [],
                    "NSPrivacyCollectedDataTypes": [], "NSPrivacyAccessedAPITypes": []}


def test_the_constants_name_the_files_that_lie_beside_them(app: Path) -> None:
    bundle = Bundle.open(reference.bundle_path("nano-1"))
    facts = facts_of(bundle)
    told = (app / "Sources/CloisterChat/CloisterBundle.swift").read_text()
    for file in (facts.program, facts.tokenizer):
        assert file.sha256 in told and (app / "model" / file.name).stat().st_size == file.size_bytes
