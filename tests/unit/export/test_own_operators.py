"""Bundles whose programs call Cloister's own operators."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.unit.export.test_lower import LAYOUTS, quantized_decoder

from cloister import pipeline, reference
from cloister.audit.canary import Canary, search
from cloister.backend import KV
from cloister.bundle import Bundle
from cloister.cli import main
from cloister.errors import ExportError, SettingError
from cloister.export import write
from cloister.export.backends.cloister import program as own
from cloister.model.checkpoint import Checkpoint
from cloister.model.recipe import Recipe
from cloister.progress import silent
from cloister.quantize.apply import quantize
from cloister.runtime.chat import Sampling
from cloister.runtime.engine import Engine
from cloister.runtime.prefix import Precision
from cloister.runtime.session import Session
from cloister.settings import Settings
from cloister.vault.local import open_vault
from cloister_kernels import library

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def quantized(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    path = tmp_path_factory.mktemp("quantized") / "nano-1"
    quantize(Checkpoint.open(reference.checkpoint_path("nano-1")), path, Recipe.parse("8da4w-g32"))
    return Checkpoint.open(path)


@pytest.fixture(scope="module")
def bundle(quantized: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return pipeline.export(
        quantized, tmp_path_factory.mktemp("out") / "own.cloister", backends=("cloister",))


def test_a_bundle_is_proved_as_others_are(bundle: Bundle, quantized: Checkpoint) -> None:
    (entry,), shape = bundle.manifest.programs, quantized.metadata.config.shape
    assert (entry.backend, entry.methods) == ("cloister", ("forward", "score"))
    assert entry.operator_abi == library.ABI
    assert entry.kv_bytes == shape.context * shape.kv_bytes_per_token(entry.kv)
    once = entry.required_bytes(shape)
    assert entry.required_bytes(shape, methods=2) == once  # nothing is packed for a method
    found = bundle.receipt()
    assert found["parts_against_checkpoint"]["parts"] > 100
    assert found["program_against_checkpoint"]["mean_kld"] < 1e-3
    assert [each["weights_cache"] for each in found["ran"]] == [False]
    proved = pipeline.verify(bundle.path, Settings.from_environment())
    assert proved["checks"]["golden_tokens"] > 50 and not proved["checks"]["as_on_phones"]


def test_a_matrix_that_is_another_is_not_written(
    quantized: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = Checkpoint.tensor

    def other(self: Checkpoint, name: str) -> torch.Tensor:
        tensor = read(self, name)
        return tensor.flip(0) if name == "layers.3.mlp.up.weight.q" and writing else tensor

    writing = True
    monkeypatch.setattr(Checkpoint, "tensor", other)
    check = pipeline._check_runs

    def written(entry: object) -> None:
        nonlocal writing
        writing = False
        check(entry)  # type: ignore[arg-type]

    monkeypatch.setattr(pipeline, "_check_runs", written)
    with pytest.raises(ExportError, match=r"Tensor layers\.3\.mlp\.gate, layers\.3\.mlp\.up of"):
        pipeline.export(quantized, tmp_path / "x.cloister", backends=("cloister",))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kv", ["float32", "int8"])
def test_a_conversation_goes_on_with_its_keys_and_values_of_16_bits(
    bundle: Bundle, tmp_path: Path, kv: str
) -> None:
    greedy, canary = Sampling(), Canary.new("question")
    whole = Session(Engine(bundle.path), system="call")
    expected = [whole.ask(text, sampling=greedy).text for text in (canary.text, "play some jazz")]
    settings = Settings(home=tmp_path / "home", data=None, provider="keyfile")
    with open_vault(settings=settings, create=True, notify=lambda notice: None) as vault:
        first = Session(Engine(bundle.path), system="call", vault=vault, name="work", kv=kv)
        assert first.ask(canary.text, sampling=greedy).text == expected[0]
        again = Session(Engine(bundle.path), vault=vault, name="work", kv=kv)
        assert again.restored_tokens > 20
        answer = again.ask("play some jazz", sampling=greedy).text
        if kv == "float32":  # sealed as they are
            assert answer == expected[1]
        else:  # the canary's random words may be spelled otherwise
            assert answer.startswith('{"name": "PlayMusic"')
        assert search(tmp_path, [canary]) == []


@pytest.mark.parametrize("kv", [KV.INT8, KV.FLOAT32])
def test_keys_and_values_are_kept_in_what_is_asked_for(
    quantized: Checkpoint, tmp_path: Path, kv: KV
) -> None:
    shape = quantized.metadata.config.shape
    made = pipeline.export(quantized, tmp_path / "a.cloister", backends=("cloister",), kv=kv)
    (entry,) = made.manifest.programs
    assert entry.kv is kv
    assert entry.kv_bytes == 2 * shape.layers * shape.kv_heads * shape.context * (
        shape.head_size + 4 if kv is KV.INT8 else 4 * shape.head_size)
    for precision in Precision:
        settings = Settings(home=tmp_path / precision, data=None, provider="keyfile")
        with open_vault(settings=settings, create=True, notify=lambda notice: None) as vault:
            said = Session(Engine(made.path), vault=vault, name="work", kv=precision)
            said.ask("set a timer for ten minutes", sampling=Sampling())
            again = Session(Engine(made.path), vault=vault, name="work", kv=precision)
            assert again.restored_tokens > 20
            if kv is KV.INT8 or precision is Precision.EXACT:
                kept, restored = (each.engine.buffers(0, 20) for each in (said, again))
                assert all(map(torch.equal, kept, restored))


def test_a_checkpoint_is_quantized_on_the_way_as_before_it(
    bundle: Bundle, quantized: Checkpoint, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, out = str(reference.checkpoint_path("nano-1")), tmp_path / "a.cloister"
    words = ["export", source, "--backend", "cloister", "--recipe", "8da4w-g32", "--json"]
    assert main([*words, "-o", str(out)]) == 0
    said, made = json.loads(capsys.readouterr().out), Bundle.open(out)
    assert said["against_parent"]["program"]["mean_kld"] < 1
    assert made.manifest.programs == bundle.manifest.programs
    assert made.manifest.files["program.cloister.pte"] == (
        bundle.manifest.files["program.cloister.pte"])
    assert [each.name for each in tmp_path.iterdir()] == [out.name]
    words[-1:] = ["-o", str(tmp_path / "b.cloister")]
    assert main([words[0], str(quantized.path), *words[2:]]) == 1
    assert "quantized already" in capsys.readouterr().err
    words[words.index("--recipe") + 1] = "8da4w-g33"
    assert main(words) == 1
    assert "No recipe is named" in capsys.readouterr().err
    assert [each.name for each in tmp_path.iterdir()] == [out.name]


def test_what_a_backend_does_not_keep_is_refused(quantized: Checkpoint, tmp_path: Path) -> None:
    with pytest.raises(SettingError, match="keep keys and values in float32, not int8"):
        pipeline.export(quantized, tmp_path / "a.cloister", kv="int8")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("sampling", [
    Sampling(), Sampling(temperature=1.0, seed=3)], ids=["greedy", "drawn"])
def test_guessed_tokens_change_no_answer(
    bundle: Bundle, sampling: Sampling
) -> None:
    plain, lower = Engine(bundle.path, draft="off"), reference.bundle_path("nano-2")
    assert Engine(bundle.path).drafts_by == "lookup"
    engines = [Engine(bundle.path, draft=draft) for draft in ("lookup", lower)]
    drafted = [0, 0]
    for text in ("play Blue in Green by Miles Davis", "add Blue in Green to my Blue playlist"):
        for tools in (None, reference.tools()):
            def answer(engine: Engine, text: str = text, tools: Any = tools) -> tuple[Any, int]:
                session = Session(engine, system="call")
                ids = [token.id for token in session.stream(
                    text, sampling=sampling, tools=tools, max_tokens=60)]
                return ids, session.stats.drafted_tokens

            wanted, none = answer(plain)
            assert none == 0
            for number, engine in enumerate(engines):
                found, count = answer(engine)
                assert found == wanted
                drafted[number] += count
    assert min(drafted) > 0


def test_what_there_are_no_operators_for_is_refused(quantized: Checkpoint, tmp_path: Path) -> None:
    config = LAYOUTS["llama"]
    decoder = quantized_decoder(
        replace(config, shape=replace(config.shape, head_size=24)), "8da4w-g32")
    with pytest.raises(ExportError, match="Heads of 24 entries"):
        own(decoder, decoder.state_dict().__getitem__, {"forward": 16}, {}, tmp_path / "p.pte",
            KV.FLOAT16, silent)
    with pytest.raises(ExportError, match="do not read pictures or recordings yet"):
        write._cloister(
            quantized, tmp_path / "p.pte", {"forward": 16}, KV.FLOAT16, silent,
            object())  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())


def test_without_a_compiler_a_bundle_and_a_command_say_what_to_do(
    bundle: Bundle, tmp_path: Path
) -> None:
    environment = {**os.environ, "CLOISTER_COMPILER": "nowhere", "CLOISTER_HOME": str(tmp_path)}
    for words, sentence in (
        (("run", str(bundle.path), "hello"), "`cloister kernels build` says why"),
        (("kernels", "build"), "No C++ compiler is named 'nowhere' here"),
    ):
        done = subprocess.run(
            [sys.executable, "-m", "cloister.cli", *words], capture_output=True, text=True,
            env=environment, check=False)
        assert done.returncode == 1 and sentence in done.stderr


def test_where_they_cannot_be_built_xnnpacks_program_answers_and_one_line_says_so(
    quantized: Checkpoint, tmp_path: Path
) -> None:
    path = tmp_path / "both.cloister"
    both = pipeline.export(quantized, path, backends=("cloister", "xnnpack"))
    assert [entry.backend for entry in both.manifest.programs] == ["cloister", "xnnpack"]
    (said,) = both.receipt()["further_programs"]
    assert said["backend"] == "xnnpack"
    assert said["program_against_checkpoint"]["mean_kld"] < 1e-3
    proved = pipeline.verify(path, Settings.from_environment())["checks"]["programs"]
    assert proved["cloister"] == "golden prompts" and proved["xnnpack"].startswith("sha256 only")
    for compiler, line in (("c++", ""), ("nowhere", "the program for xnnpack answers")):
        environment = {**os.environ, "CLOISTER_HOME": str(tmp_path / compiler),
                       "CLOISTER_COMPILER": compiler}
        done = subprocess.run(
            [sys.executable, "-m", "cloister.cli", "run", str(path), "play some jazz",
             "--system", "call"], capture_output=True, text=True, env=environment, check=False)
        assert done.returncode == 0 and json.loads(done.stdout)["name"] == "PlayMusic"
        said_so = " ".join(done.stderr.split())
        assert line in said_so and ("own operators" in said_so) == bool(line)


def test_the_command_says_which_instruction_set_is_used(
    bundle: Bundle, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.setenv("CLOISTER_HOME", str(tmp_path))
    assert main(["kernels", "status", "--json"]) == 0
    assert not json.loads(capsys.readouterr().out)["built"]
    assert main(["kernels", "build", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["built"] and found["instruction_set"] == found["instruction_sets"][0]
    assert found["instruction_sets"][-1] == "portable"
