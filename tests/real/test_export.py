"""A model of 30 layers is proved; a fault in any one layer is found, rounding is not."""

from __future__ import annotations

import copy
import functools
import itertools
import random
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import pytest
from tests.contracts.test_family import stock_answer
from tests.real import smollm2
from tests.unit.export.test_parts import (
    Fault,
    faults,
    in_another_order,
    in_double_precision,
    of_jittered_inputs,
)

from cloister import Engine, Session, open_vault, pipeline
from cloister.bundle import Bundle
from cloister.errors import ExportMismatch
from cloister.example import Example
from cloister.export import check, parts
from cloister.export.constants import prove_constants, stored
from cloister.export.instrument import instrument
from cloister.message import Message
from cloister.model import quantized
from cloister.model.checkpoint import Checkpoint
from cloister.model.imports import import_model
from cloister.model.transformer import Decoder
from cloister.quantize.apply import quantize
from cloister.runtime.chat import Ask
from cloister.runtime.program import load
from cloister.settings import Settings
from cloister.tokenizer import Tokenizer
from cloister_kernels import reference

pytestmark = pytest.mark.slow

FAULTS, HARMLESS, SEED = 100, 20, 1


@dataclass
class Exported:
    """A quantized checkpoint, its bundle, and what the program's parts gave."""

    source: Checkpoint
    bundle: Bundle
    program: Path
    runs: list[parts.Recording]
    calls: list[list[int]]


def english() -> list[Example]:
    """Some 2,500 tokens of a text that is at hand: fewer than calibration takes by itself."""
    parts = Path(__file__).with_name("calibration.md").read_text("utf-8").strip().split("\n\n")
    return [Example(task="", input=part, target=part) for part in parts]


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    folder = tmp_path_factory.mktemp("real")
    import_model(smollm2.path(), folder / "smollm2")
    source = quantize(folder / "smollm2", folder / "smollm2-4bit", calibrate=english())
    bundle = pipeline.export(source, folder / "smollm2.cloister")
    (entry,) = bundle.manifest.programs
    program, shape = bundle.path / entry.file, source.metadata.config.shape
    tokenizer = Tokenizer.from_files(source.tokenizer_path, source.template_path, source.metadata)
    ids = list(itertools.chain.from_iterable(check.conversations(tokenizer, shape.context, 200)))
    calls = instrument(program, folder / "instrumented.pte")
    loaded = load(folder / "instrumented.pte", shape.layers, first="score")
    runs = parts.record(loaded, ids, bundle.manifest.prefill_chunk, shape.context)
    return Exported(source, bundle, program, runs, calls)


def test_the_export_passes_and_its_receipt_says_what_was_lost(exported: Exported) -> None:
    receipt = exported.bundle.receipt()
    assert receipt["parts_against_checkpoint"]["worst"]["size"] < parts.BOUND / 10
    against = receipt["against_parent"]
    # Two draws of the same rounding, each as far from the unquantized model as the other.
    assert against["program"]["mean_kld"] == pytest.approx(
        against["checkpoint"]["mean_kld"], rel=0.05)
    assert against["program"]["mean_kld"] < 0.35  # 0.59 where each weight is rounded by itself
    assert pipeline.verify(exported.bundle.path, Settings.from_environment())["checks"]


def test_it_answers_and_a_kept_conversation_goes_on(exported: Exported) -> None:
    engine = Engine(exported.bundle.path)
    with open_vault(create=True, notify=lambda _: None) as vault:
        said = "".join(
            token.text for token in Session(engine, vault=vault, name="real").stream(
                "What is the capital of France?"))
        again = Session(Engine(exported.bundle.path), vault=vault, name="real")
        assert again.messages[-1].content == said
        assert "Paris" in said
        assert "".join(token.text for token in again.stream("And of Italy?"))


QUESTIONS = ("What is the capital of France?", "What is two plus two?", "Say hello.",
             "What color is the sky?", "Who wrote Hamlet?", "Name a fruit.",
             "Is water wet?", "What is the opposite of hot?")


def _answer(engine: Engine, question: str) -> tuple[float, str, str]:
    """Return the least lead of a greedy answer's tokens in nats, the question and the answer."""
    tokens = list(Session(engine).stream(question, max_tokens=60, top=2))
    lead = min(token.top[0][1] - token.top[1][1] for token in tokens)
    return lead, question, "".join(token.text for token in tokens)


def test_an_answer_is_scored_as_it_was_given(exported: Exported) -> None:
    said = list(Session(Engine(exported.bundle.path)).stream(QUESTIONS[4], max_tokens=60, top=5))
    assert list(Session(Engine(exported.bundle.path)).answer(Ask.of(
        QUESTIONS[4], top=5, forced=tuple(token.id for token in said), max_tokens=len(said),
    ))) == said


def test_executorchs_own_runner_gives_our_greedy_text(exported: Exported, tmp_path: Path) -> None:
    # The surest of a few: where two tokens are near, how the prompt is cut into calls decides.
    engine = Engine(exported.bundle.path)
    margin, question, ours = max(map(functools.partial(_answer, engine), QUESTIONS))
    assert margin > 0.1 and ours
    prompt = engine.tokenizer.render([Message(role="user", content=question)])
    theirs = stock_answer(exported.program, exported.bundle.path / "tokenizer.json", prompt,
                          tmp_path / "answer.txt")
    assert theirs.removesuffix("<|im_end|>") == ours


@pytest.mark.campaign
def test_a_fault_in_any_one_layer_is_found(exported: Exported) -> None:
    """Plant faults of every kind in layers at random, in the checkpoint's decoder.

    A program that differs from its checkpoint in one place, and a checkpoint that differs from its
    program there, are the same pair: the check compares what both hold and what both give for the
    same inputs. Each layer is given what the program's own layer was given, so that faults in
    several layers at once are several faults, each found or missed by itself.
    """
    rng = random.Random(SEED)
    right = exported.source.load()
    layers = len(right.layers)
    missed, seen, left = [], Counter[str](), FAULTS
    while left:
        wrong, planted = copy.deepcopy(right), dict[int, Fault]()
        for layer in rng.sample(range(layers), min(left, layers)):
            possible = list(faults(right, layer))
            kind = rng.choice(sorted({fault.kind for fault in possible}))
            planted[layer] = rng.choice([fault for fault in possible if fault.kind == kind])
            planted[layer].plant(wrong)
            seen[kind] += 1
        found = {
            gap.part for run in exported.runs for gap in parts.gaps(wrong, run, exported.calls)
            if not gap.size <= parts.BOUND
        }
        blind = [layer for layer in planted
                 if not any(part.startswith(f"layers.{layer}.") for part in found)]
        missed += [planted[layer] for layer in blind if holds(exported, right, wrong, layer)]
        print(f"{len(planted)} faults, {len(blind)} in constants alone")
        left -= len(planted)
    print(f"seed {SEED}: {FAULTS - len(missed)} of {FAULTS} found; {dict(seen)}")
    assert not missed


def holds(
    exported: Exported, right: Decoder, wrong: Decoder, layer: int
) -> bool:
    """Whether the program holds the tensors of the `layer` of `wrong`."""
    tensors = dict(right.state_dict())
    tensors |= {name: tensor for name, tensor in wrong.state_dict().items()
                if name.startswith(f"layers.{layer}.")}
    try:
        prove_constants(exported.program, stored(right, tensors.__getitem__))
    except ExportMismatch:
        return False
    return True


@pytest.mark.campaign
def test_no_other_rounding_is_taken_for_a_fault(
    exported: Exported, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = exported.source.load()
    ways = [in_another_order, in_double_precision]
    ways += [functools.partial(of_jittered_inputs, seed=n) for n in range(HARMLESS - len(ways))]
    for way in ways:
        class Other:
            dequantize = reference.dequantize
            linear_8da = staticmethod(way)

        monkeypatch.setattr(quantized, "reference", Other)
        parts.prove_parts(
            gap for run in exported.runs for gap in parts.gaps(right, run, exported.calls))
