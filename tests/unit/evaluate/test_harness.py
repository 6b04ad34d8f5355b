"""lm-eval, on a bundle, gives the numbers that the bundle's own logits give."""

from __future__ import annotations

import importlib.util
import json
import logging
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from lm_eval.api.instance import Instance
from tests.conftest import make_bundle

from cloister import reference
from cloister.bundle import Bundle
from cloister.errors import (
    ContextExceeded,
    EmptyPrompt,
    IncompatibleProgram,
    InvalidText,
    SettingError,
    TokenizerError,
)
from cloister.evaluate import harness
from cloister.evaluate.harness import CloisterLM
from cloister.message import Message
from cloister.runtime.core import Rows
from cloister.runtime.engine import Engine
from cloister.runtime.program import FakeProgram
from cloister.runtime.session import Session

CONTEXT, CHUNK = 64, 8


def fake(bundle: Bundle, **options: Any) -> CloisterLM:
    engine = Engine(
        bundle.path, runs_here=lambda backend: True,
        load=lambda path, layers, *, threads: FakeProgram(300, CONTEXT),
    )
    return CloisterLM(engine, **options)


@pytest.fixture
def model(bundle: Bundle) -> CloisterLM:
    return fake(bundle)


def by_hand(engine: Engine, before: Sequence[int], after: Sequence[int]) -> tuple[float, bool]:
    """Token after token, through the method that does not score."""
    total, greedy = 0.0, True
    for place, token in enumerate(after):
        logits = engine.extend([*before, *after[:place]][-engine.context:])[-1]
        total += float(logits.double().log_softmax(-1)[token])
        greedy = greedy and int(logits.argmax()) == token
    return total, greedy


def rounding(engine: Engine, before: Sequence[int], after: Sequence[int]) -> float:
    """How far this processor's sums over other calls may lie apart, in nats.

    Activations are rounded to 8 bits, so that calls of another length give other last digits, and
    those other logits: what reading at once changes in each token is what another cut may change.
    """
    ids, wanted = [*before, *after], torch.tensor(after)[:, None]
    engine.truncate(0)
    at_once = engine.extend(ids[:-1], Rows.ALL)[len(before) - 1:].double().log_softmax(-1)
    one_by_one = torch.cat([engine.extend(ids[:end]) for end in range(len(before), len(ids))])
    moved = (at_once - one_by_one.double().log_softmax(-1)).gather(1, wanted)
    return 1e-3 + 3 * float(moved.abs().sum())


def greedy_ids(engine: Engine, ids: Sequence[int], limit: int) -> list[int]:
    """The most likely tokens after `ids`, up to the end token."""
    answer: list[int] = []
    while len(answer) < limit:
        logits = engine.extend([*ids, *answer])[-1]
        if int(logits.argmax()) in engine.bundle.manifest.eos:
            break
        answer.append(int(logits.argmax()))
    return answer


def ask(kind: Any, *arguments: Any) -> list[Instance]:
    return [Instance(request_type=kind, doc={}, arguments=a, idx=0) for a in arguments]


def likelihoods(model: CloisterLM, *pairs: tuple[str, str]) -> Any:
    return model.loglikelihood(ask("loglikelihood", *pairs), disable_tqdm=True)


def answers(model: CloisterLM, context: str, **arguments: Any) -> str:
    request = ask("generate_until", (context, {"until": [], **arguments}))
    return str(model.generate_until(request, disable_tqdm=True)[0])


DOCUMENTS = [
    {"question": "What is the weather in", "options": [" Paris", " London", " Rome"], "answer": 0},
    {"question": "Play some music by", "options": [" the", " a long name here", "!"], "answer": 2},
    {"question": "", "options": ["Once upon a time", "Rate"], "answer": 1},
]


@pytest.mark.slow
def test_lm_eval_runs_its_tasks_offline_on_the_shipped_nano_1(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        monkeypatch.setenv(name, "1")
    import lm_eval
    from lm_eval.tasks import TaskManager

    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, DOCUMENTS)))
    base = {
        "dataset_path": "json", "test_split": "test",
        "dataset_kwargs": {
            "data_files": {"test": str(tmp_path / "data.jsonl")}, "cache_dir": str(tmp_path),
        },
    }
    model = CloisterLM(reference.bundle_path("nano-1"))
    result = lm_eval.simple_evaluate(
        model=model, task_manager=TaskManager(include_defaults=False), bootstrap_iters=10,
        tasks=[
            {**base, "task": "choose", "output_type": "multiple_choice",
             "doc_to_text": "{{question}}", "doc_to_choice": "options",
             "doc_to_target": "answer", "target_delimiter": ""},
            {**base, "task": "read", "output_type": "loglikelihood_rolling",
             "doc_to_text": "", "doc_to_target": "{{options | join}}",
             "metric_list": [{"metric": "bits_per_byte"}]},
            {**base, "task": "write", "output_type": "generate_until",
             "doc_to_text": "Say {{question}}.", "doc_to_target": "{{options[answer]}}",
             "generation_kwargs": {"until": ["zzz"], "max_gen_toks": 8}},
        ],
    )
    assert result is not None
    engine, encode = model.engine, model.engine.tokenizer.encode
    correct, bits, slack = 0, 0.0, 0.0
    for place, document in enumerate(DOCUMENTS):
        hand, bounds = [], []
        for option in document["options"]:
            before = encode(document["question"]) if document["question"] else [0]
            whole = encode(document["question"] + option)
            after = whole[len(before):] if document["question"] else whole
            hand.append(by_hand(engine, before, after))
            bounds.append(rounding(engine, before, after))
        got = result["samples"]["choose"][place]["filtered_resps"]
        assert max(bounds) < 1  # a token that stands wrong costs more
        for (total, _), (expected, _), bound in zip(got, hand, bounds, strict=True):
            assert total == pytest.approx(expected, abs=bound)
        assert [greedy for _, greedy in got] == [greedy for _, greedy in hand]
        correct += max(range(len(hand)), key=lambda i: hand[i][0]) == document["answer"]

        ids = encode("".join(document["options"]))
        total, _ = by_hand(engine, [0], ids)
        bound = rounding(engine, [0], ids)
        slack += bound / math.log(2)
        bits -= total / math.log(2)
        assert result["samples"]["read"][place]["filtered_resps"][0] == pytest.approx(
            total, abs=bound
        )

        ids = greedy_ids(engine, encode(f"Say {document['question']}."), 8)
        assert result["samples"]["write"][place]["filtered_resps"] == [
            engine.tokenizer.decode(ids)
        ]
    scores = result["results"]
    size = sum(len("".join(document["options"]).encode()) for document in DOCUMENTS)
    assert scores["choose"]["acc,none"] == pytest.approx(correct / len(DOCUMENTS))
    assert scores["read"]["bits_per_byte,none"] == pytest.approx(bits / size, abs=slack / size)


def test_a_chat_template_lays_requests_out_as_a_session_does() -> None:
    model = CloisterLM(reference.bundle_path("nano-1"))
    turns = [
        {"role": "system", "content": "intent"},
        {"role": "user", "content": "wake me at 7, na\u00efve caf\u00e9"},
    ]
    text = model.apply_chat_template(turns)
    messages = [Message(role=turn["role"], content=turn["content"]) for turn in turns]
    assert model.tok_encode(text) == model.engine.tokenizer.encode_chat(messages)
    session = Session(model.engine, system="intent")
    said = "".join(t.text for t in session.stream(turns[1]["content"], max_tokens=24))
    assert said
    assert answers(model, text, max_gen_toks=24) == said
    assert model.tokenizer_name == f"nano-1-{model.engine.model_id}"


def test_a_conversation_that_its_text_does_not_give_back_is_refused(model: CloisterLM) -> None:
    # Typed, the marker is text to a session, and lm-eval would read it as the end of the turn.
    with pytest.raises(TokenizerError, match="without its chat template"):
        model.apply_chat_template([{"role": "user", "content": "a <|end|> b"}])


def test_likelihoods_are_those_of_the_logits_over_chunks_and_past_the_context(
    model: CloisterLM, caplog: pytest.LogCaptureFixture
) -> None:
    encode = model.tok_encode
    for words in (1, 3, CHUNK, 11, 40, 80):
        before, after = "fox" + " dog" * words, " the lazy" + " cat" * 10
        whole = encode(before + after)
        expected = by_hand_cut(model.engine, encode(before), whole[len(encode(before)):])
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            got, greedy = likelihoods(model, (before, after))[0]
        assert got == pytest.approx(expected, rel=1e-6)
        assert not greedy
        assert bool(caplog.records) is (len(whole) - 1 > CONTEXT)
        assert "dog" not in caplog.text
    assert len(whole) - 1 > CONTEXT  # the last one was cut
    caplog.clear()
    model._loglikelihood_tokens([(("", ""), [5] * CONTEXT, [6])])
    assert not caplog.records  # the last token is predicted, not read


def by_hand_cut(engine: Engine, before: list[int], after: list[int]) -> float:
    """As `by_hand`, with the one window that ends in `after`."""
    kept = max(0, len(before) + len(after) - 1 - engine.context)
    return by_hand(engine, before[kept:], after)[0]


def test_a_continuation_is_greedy_only_if_every_token_is(model: CloisterLM) -> None:
    best = greedy_ids(model.engine, [5, 6, 7], 12)
    assert len(best) == 12
    for place in (None, 0, 6, 11):
        after = list(best)
        if place is not None:  # one token that is not, and greedy ones after it
            after[place:] = [(best[place] + 1) % 300]
            after += greedy_ids(model.engine, [5, 6, 7, *after], 11 - place)
        assert len(after) == 12
        [(total, greedy)] = model._loglikelihood_tokens([(("", ""), [5, 6, 7], after)])
        assert greedy is (place is None)
        assert total == pytest.approx(by_hand(model.engine, [5, 6, 7], after)[0], rel=1e-6)


@pytest.mark.parametrize("length", [1, CONTEXT - 1, CONTEXT, CONTEXT + 1, 3 * CONTEXT + 5])
def test_a_rolling_score_counts_every_token_once_in_the_fullest_windows(
    model: CloisterLM, length: int
) -> None:
    ids = torch.randint(20, 120, (length,), generator=torch.Generator().manual_seed(1)).tolist()
    text = model._encoder.decode(ids)
    ids = model.tok_encode(text)
    expected, begin = 0.0, 0
    while begin < len(ids):
        end = min(begin + CONTEXT, len(ids))
        first = 0 if begin == 0 else end - CONTEXT  # the last window is as full as the others
        before = [0, *ids][first:begin + 1]
        expected += by_hand(model.engine, before, ids[begin:end])[0]
        begin = end
    got = model.loglikelihood_rolling(ask("loglikelihood_rolling", (text,)), disable_tqdm=True)
    assert got == [pytest.approx(expected, rel=1e-6)]
    assert model.loglikelihood_rolling(ask("loglikelihood_rolling", ("",))) == [0.0]


def test_an_answer_ends_at_a_stop_text_at_the_length_or_at_the_end_token(
    model: CloisterLM, tmp_path: Path, tokenizer_dir: Path
) -> None:
    ids = greedy_ids(model.engine, model.tok_encode("the fox"), 20)
    decode = model.engine.tokenizer.decode
    whole = decode(ids)
    assert answers(model, "the fox", max_gen_toks=20) == whole
    assert answers(model, "the fox", max_gen_toks=3) == decode(ids[:3])
    first = min(i for i in range(1, 20) if len(decode([ids[i]])) > 2)
    piece = decode([ids[first]])
    for until in ([piece[2:], piece[1:], "\0", ""], piece[1:]):  # both come with one token
        got = answers(model, "the fox", max_gen_toks=20, until=until)
        assert got == decode(ids[:first]) + piece[0]
    ending = fake(make_bundle(tmp_path / "ending.cloister", tokenizer_dir, eos=(ids[4],)))
    assert answers(ending, "the fox", max_gen_toks=20) == decode(ids[:ids.index(ids[4])])


def test_an_answer_to_a_long_context_has_the_room_it_asks_for(
    model: CloisterLM, caplog: pytest.LogCaptureFixture
) -> None:
    ids = model.tok_encode("the quick brown fox jumps over the lazy dog" * 9)
    decode = model._encoder.decode
    kept = decode(ids[-(CONTEXT - 10):])
    assert model.tok_encode(kept) == ids[-(CONTEXT - 10):]
    with caplog.at_level(logging.WARNING):
        expected = answers(model, kept, max_gen_toks=10)
        assert not caplog.records
        assert expected == model.engine.tokenizer.decode(
            greedy_ids(model.engine, ids[-(CONTEXT - 10):], 10)
        )
        for length in (CONTEXT - 9, CONTEXT + 9):
            assert answers(model, decode(ids[-length:]), max_gen_toks=10) == expected
    assert len(caplog.records) == 2
    assert "fox" not in caplog.text


def test_sampling_follows_the_task_and_the_seed_of_torch(model: CloisterLM) -> None:
    def draw(**arguments: Any) -> str:
        return answers(model, "the fox", max_gen_toks=12, **arguments)

    greedy = draw()
    assert draw(do_sample=False, temperature=2.0) == greedy
    assert draw(do_sample=True, top_k=1) == greedy
    torch.manual_seed(1)
    drawn = [draw(do_sample=True), draw(do_sample=True), draw(temperature=1.5, top_p=0.9)]
    assert len({greedy, *drawn}) == 4
    torch.manual_seed(1)
    again = [draw(do_sample=True), draw(do_sample=True), draw(temperature=1.5, top_p=0.9)]
    assert again == drawn


def test_a_repetition_penalty_counts_the_answer_alone(model: CloisterLM) -> None:
    for start in range(20, 220, 10):  # some of them hold their own greedy answer
        context = model._encoder.decode(list(range(start, start + 40)))
        expected = answers(model, context, max_gen_toks=1)
        assert answers(model, context, max_gen_toks=1, repetition_penalty=50.0) == expected


@pytest.mark.parametrize(("arguments", "match"), [
    ({"num_beams": 4}, "num_beams"), ({"temperature": -1.0}, "temperature"),
    ({"max_gen_toks": 0}, "max_gen_toks is 0"), ({"max_gen_toks": CONTEXT}, "from 1 to 63"),
])
def test_a_generation_argument_that_is_unknown_or_out_of_bounds_is_refused_by_name(
    model: CloisterLM, arguments: dict[str, Any], match: str
) -> None:
    with pytest.raises(SettingError, match=match):
        answers(model, "the fox", **{"max_gen_toks": 4, **arguments})


def test_requests_that_cannot_be_scored_are_refused_without_quoting_them(
    model: CloisterLM,
) -> None:
    with pytest.raises(EmptyPrompt):
        likelihoods(model, ("secret", ""))
    with pytest.raises(ContextExceeded, match=str(CONTEXT)) as error:
        likelihoods(model, ("the", " secret" * 200))
    assert "secret" not in str(error.value)
    with pytest.raises(InvalidText):
        likelihoods(model, ("secret", " \ud800"))


def test_a_context_of_nothing_but_spaces_is_scored_like_none(model: CloisterLM) -> None:
    assert likelihoods(model, ("  ", "fox")) == likelihoods(model, ("", "  fox"))


def test_logits_that_are_not_finite_are_no_score(
    model: CloisterLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        FakeProgram, "score",
        lambda self, tokens, start: torch.full((1, tokens.shape[1], 300), math.nan),
    )
    with pytest.raises(IncompatibleProgram, match="finite"):
        likelihoods(model, ("the", " fox"))


def test_the_begin_token_comes_once_and_only_when_asked_for(
    tmp_path: Path, tokenizer_dir: Path
) -> None:
    bundle = make_bundle(tmp_path / "bos.cloister", tokenizer_dir, bos=3)
    plain, begun = fake(bundle), fake(bundle, add_bos=True)
    ids = plain.tok_encode("the fox")
    assert begun.tok_encode("the fox") == plain.tok_encode("the fox", True) == [3, *ids]
    assert begun.tok_encode("the fox", False) == ids
    marker = begun._encoder.id_to_token(3)
    assert begun.tok_encode(f"{marker}the fox") == [3, *ids]
    assert (plain.prefix_token_id, plain.eot_token_id) == (3, 0)
    expected, _ = by_hand(begun.engine, [3, *begun.tok_encode("the", False)], ids[1:])
    assert likelihoods(begun, ("the", " fox"))[0][0] == pytest.approx(expected, rel=1e-6)


def test_a_bundle_without_begin_or_end_token_scores_only_texts_with_a_context(
    tmp_path: Path, tokenizer_dir: Path
) -> None:
    bundle = make_bundle(tmp_path / "none.cloister", tokenizer_dir, eos=())
    model = fake(bundle)
    assert math.isfinite(likelihoods(model, ("the", " fox"))[0][0])
    with pytest.raises(SettingError, match="begin or end token"):
        likelihoods(model, ("", "fox"))
    with pytest.raises(SettingError, match="add_bos"):
        fake(bundle, add_bos=True)


def test_without_lm_eval_the_import_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval.api.model", None)
    spec = importlib.util.spec_from_file_location("without_lm_eval", harness.__file__)
    assert spec is not None and spec.loader is not None
    with pytest.raises(ModuleNotFoundError, match=r'pip install "cloister\[train\]"'):
        spec.loader.exec_module(importlib.util.module_from_spec(spec))


def test_nothing_of_a_request_shows_in_the_repr(model: CloisterLM) -> None:
    likelihoods(model, ("secret", " word"))
    assert repr(model) == "CloisterLM(Engine('tiny.cloister'))"
