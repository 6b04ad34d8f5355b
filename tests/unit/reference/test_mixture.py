"""What the family learns is right, varied, repeatable, and apart from what it is measured on."""

import json
import random
import re
from pathlib import Path

import pytest

from cloister.corpus import Example, overlap, read, split, tool_call
from cloister.errors import DataError
from cloister.reference import mixture, outside, redaction
from cloister.reference.augment import Augmenter, pieces
from cloister.settings import Settings

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def data() -> Path:
    folder = Settings.from_environment().data
    if folder is None:
        pytest.skip("CLOISTER_DATA is not set")
    return folder


CALLS = [
    Example(task="call", input="play Blue by Joni", target=tool_call(
        "PlayMusic", [("album", "Blue"), ("artist", "Joni")])),
    Example(task="call", input="play Hits 2019 by Queen, rate it 1", target=tool_call(
        "PlayMusic", [("album", "Hits 2019"), ("artist", "Queen"), ("rating", "1")])),
    Example(task="call", input="add ABBA and Cher to pop", target=tool_call(
        "Add", [("artist", "ABBA"), ("artist", "Cher"), ("playlist", "pop")])),
]


def test_a_request_is_cut_at_the_values_it_holds_whole_words_first() -> None:
    assert pieces(CALLS[1]) == [
        ("play ", None), ("Hits 2019", "album"), (" by ", None), ("Queen", "artist"),
        (", rate it ", None), ("1", "rating"),
    ]
    assert pieces(CALLS[2]) == [
        ("add ", None), ("ABBA", "artist"), (" and ", None), ("Cher", "artist"), (" to ", None),
        ("pop", "playlist"),
    ]
    elsewhere = Example(task="call", input="play it", target=tool_call("P", [("album", "Blue")]))
    assert pieces(elsewhere) is None


def test_every_variant_of_a_request_holds_the_values_its_answer_names() -> None:
    augmenter, chance = Augmenter(CALLS), random.Random(0)
    variants = [augmenter.call(example, chance) for example in CALLS * 100]
    for variant, example in zip(variants, CALLS * 100, strict=True):
        call, origin = json.loads(variant.target), json.loads(example.target)
        assert call["name"] == origin["name"]
        assert list(call["arguments"]) == list(origin["arguments"])
        for held in call["arguments"].values():
            for value in held if isinstance(held, list) else [held]:
                assert value in variant.input
    assert len({variant.input for variant in variants}) > 100
    assert any(variant.input == variant.input.lower() for variant in variants)


def test_some_variants_hold_words_that_nobody_has_seen() -> None:
    example = Example(task="call", input="fly to Saint Louis", target=tool_call(
        "Fly", [("city", "Saint Louis")]))
    augmenter, chance = Augmenter([example]), random.Random(0)
    variants = [augmenter.call(example, chance) for _ in range(300)]
    cities = {json.loads(variant.target)["arguments"]["city"] for variant in variants}
    words = {word.lower() for city in cities for word in city.split()}
    assert len(words - {"saint", "louis"}) > 5


def test_questions_outside_every_intent_are_many_and_whole() -> None:
    chance = random.Random(0)
    asked = [outside.request(chance) for _ in range(2000)]
    assert len(set(asked)) > 1500
    assert all(text == text.lower() and not set(text) & set("{}") for text in asked)


def test_a_variant_of_an_intent_keeps_its_answer() -> None:
    example = Example(task="intent", input="what is my bank balance today", target="x")
    variants = [Augmenter([]).intent(example, random.Random(seed)) for seed in range(200)]
    assert {variant.target for variant in variants} == {"x"}
    assert len({variant.input for variant in variants}) > 20


REDACTED = list(redaction.generate(3000, seed=5))
CARRIERS = redaction.carriers([
    "The king gave her a golden ring. He told Hans to go. In May they came. She had 3 sons.",
    "what is the balance of my account", "text maria that i am late", "Grimbold slept till noon.",
    "Then he went home, for it was late! \"Come,\" said he.", "too short",
    "and so what the king then did",
])
CARRIED = list(redaction.generate(3000, seed=5, carriers=CARRIERS))


def test_the_same_seed_gives_the_same_redactions_and_another_gives_others() -> None:
    assert list(redaction.generate(50, seed=5)) == REDACTED[:50]
    assert list(redaction.generate(50, seed=6)) != REDACTED[:50]
    assert not overlap(REDACTED[:50], redaction.generate(50, seed=5, development=True))


def test_only_sentences_without_personal_data_carry_some() -> None:
    assert CARRIERS == [
        "The king gave her a golden ring.", "what is the balance of my account",
        "Then he went home, for it was late!"]


def test_in_development_every_sentence_is_a_given_one() -> None:
    """With words put between its own, and a few replaced."""
    made = list(redaction.generate(200, seed=5, development=True, carriers=CARRIERS))
    assert len({example.input for example in made}) > 150
    assert all(re.search(r"(?i)\b(golden|balance|late)\b", example.input) for example in made)
    assert sum(example.input == example.target for example in made) > 10


@pytest.mark.parametrize("made", [REDACTED, CARRIED], ids=["own", "given"])
def test_outside_its_labels_a_redacted_text_is_the_text(made: list[Example]) -> None:
    """And every label stands for something."""
    labels = re.compile(rf"\[(?:{'|'.join(redaction.LABELS)})\]")
    for example in made:
        kept = labels.split(example.target)
        pattern = "(.+?)".join(map(re.escape, kept))
        assert re.fullmatch(pattern, example.input, re.DOTALL), example.target
        assert not re.search(r"\s[,.]| {2}|[{}]", example.input), example.input
    for label in redaction.LABELS:
        assert sum(f"[{label}]" in example.target for example in made) > 30


def test_the_hard_cases_are_there() -> None:
    texts = [(example.input, example.target) for example in REDACTED]
    assert any(" rose " in text and " rose " in target for text, target in texts)  # a word
    assert any(re.search(r"\bRose\b", text) and "Rose" not in target
               and "[NAME]" in target for text, target in texts)  # a name
    assert any("Invoice" in text and "[" not in target for text, target in texts)
    assert any("Room" in text for text, target in texts if text == target)
    assert sum(text == target for text, target in texts) > 300


def test_no_personal_data_survives() -> None:
    for example in REDACTED:
        assert "@" not in example.target
        assert not re.search(r"\d{4}[ -]\d{4}[ -]\d{4}[ -]\d{4}", example.target) or (
            "racking" in example.target)


def test_card_numbers_pass_the_check_that_real_ones_pass() -> None:
    cards = re.findall(r"\d{4}([ -]?)\d{4}\1\d{4}\1\d{4}\b", " ".join(
        example.input for example in REDACTED if "[CARD]" in example.target))
    assert len(cards) > 30
    found = 0
    for example in REDACTED:
        for match in re.finditer(r"\b[45]\d{3}([ -]?)\d{4}\1\d{4}\1\d{4}\b", example.input):
            if example.target.count("[CARD]") == 1 and match[0] not in example.target:
                digits = [int(c) for c in match[0] if c.isdigit()][::-1]
                total = sum(d if i % 2 == 0 else sum(divmod(2 * d, 10))
                            for i, d in enumerate(digits))
                assert total % 10 == 0
                found += 1
    assert found > 30


def test_development_names_are_not_among_the_training_names(data: Path) -> None:
    people = [redaction._People(random.Random(0), development) for development in (False, True)]
    for attribute in ("first", "last", "streets", "hosts"):
        mine, held = (set(getattr(one, attribute)) for one in people)
        assert mine
        assert held
        assert not mine & held


def test_no_development_request_is_learnt(data: Path) -> None:
    mixed = mixture.Mixture.read(data)
    learnt = list(mixed.examples(1, 0))
    held = mixture.development(data)
    assert {task: len(rows) > 100 for task, rows in held.items()} == {
        "call": True, "intent": True, "redact": True, mixture.OTHER_SENTENCES: True, "story": True,
        "order": True, "read": True}
    for task in held:
        assert overlap(learnt, held[task]) == 0, task
    assert list(mixed.examples(1, 0)) == learnt


def test_the_tasks_have_the_answers_they_are_known_by(data: Path) -> None:
    counts: dict[str, int] = {}
    for example in mixture.Mixture.read(data).examples(1, 0):
        counts[example.task] = counts.get(example.task, 0) + 1
        if example.task in ("call", "intent", "order"):
            assert set(json.loads(example.target)) == {"name", "arguments"}
        if example.task == "read":
            assert example.target == example.input.strip()
    assert set(counts) == {"call", "intent", "redact", "story", "order", "read"}
    assert min(counts.values()) > 150


@pytest.mark.parametrize("broken", ["absent", "[]", '{"train": 3, "oos_train": []}', "{"])
def test_data_sets_that_are_missing_or_malformed_are_refused(tmp_path: Path, broken: str) -> None:
    (tmp_path / "snips").mkdir()
    (tmp_path / "snips" / "own.jsonl").write_text('{"task": "a", "input": "b", "target": "c"}')
    (tmp_path / "clinc150").mkdir()
    if broken != "absent":
        (tmp_path / "clinc150" / "train_val.json").write_text(broken)
    with pytest.raises(DataError, match=r"train_val\.json"):
        mixture.Mixture.read(tmp_path)


def test_snips_is_split_without_shared_requests(data: Path) -> None:
    training, held = split(read(data / "snips"))
    assert overlap(training, held) == 0
