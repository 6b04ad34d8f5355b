"""A program of Cloister's own operators holds a GGUF file's own blocks, packed and each once."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tests.unit.model import gguf_files as files
from tests.unit.model.test_blocks import MIXED

from cloister import pipeline
from cloister.bundle import Bundle
from cloister.cli import main
from cloister.errors import ExportMismatch
from cloister.evaluate.speed import read_bytes
from cloister.export.backends import cloister as own
from cloister.export.backends.cloister import matrices
from cloister.export.streamed import bare
from cloister.model.checkpoint import Checkpoint
from cloister.model.imports import import_model
from cloister.runtime.chat import Sampling
from cloister.runtime.engine import Engine
from cloister.runtime.session import Session
from cloister.settings import Settings
from cloister.vault.local import open_vault
from cloister_kernels.pack import Format

pytestmark = pytest.mark.slow


def kept(path: Path, *given: str, **changes: object) -> Checkpoint:
    files.write_blocks(path, MIXED, *given, **changes)
    return import_model(path, path.with_name("kept"), keep_quantization=True)


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return kept(tmp_path_factory.mktemp("tied") / "tiny.gguf", vocab_size=4000)


@pytest.fixture(scope="module")
def bundle(tied: Checkpoint) -> Bundle:
    return pipeline.export(tied, tied.path.with_name("tiny.cloister"), backends=("cloister",))


def test_matrices_of_one_type_and_one_input_are_one_and_a_tied_one_is_there_once(
    tied: Checkpoint
) -> None:
    found = {matrix.names: matrix.form for matrix in matrices(bare(tied))}
    assert found[("embed",)] is Format.Q6_K and ("head",) not in found
    layers = [{names[0].split(".", 2)[2] + "".join(name[-1] for name in names[1:]): form
               for names, form in found.items() if names[0].startswith(f"layers.{number}.")}
              for number in range(2)]
    assert layers[0] == {
        "attn.qkv.qk": Format.Q4_K, "attn.qkv.v": Format.Q6_K, "attn.o": Format.Q4_K,
        "mlp.gate": Format.Q4_K, "mlp.up": Format.Q8_0, "mlp.down": Format.Q4_1}
    assert {key: layers[1][key] for key in ("attn.qkv.q", "attn.qkv.k")} == {
        "attn.qkv.q": Format.Q4_K, "attn.qkv.k": Format.Q4_0}


def test_a_bundle_is_proved_as_others_are_and_says_what_its_weights_are(
    bundle: Bundle, tied: Checkpoint
) -> None:
    found, (entry,) = bundle.receipt(), bundle.manifest.programs
    assert bundle.manifest.recipe == found["weights"]["recipe"] == tied.metadata.recipe
    assert found["weights"]["origin"]["types"]["Q4_K"] == 7
    assert found["parts_against_checkpoint"]["worst"]["size"] < 1e-3
    assert found["program_against_checkpoint"]["mean_kld"] < 5e-3
    blocks = sum(tied.tensor(f"{name}.blocks").numel() for name in tied.metadata.types or ())
    # Packed, a block of Q4_K takes 148 bytes of 144; the embedding, most of all, is there once.
    assert blocks < found["parts_against_checkpoint"]["constants_bytes"] < 1.1 * blocks
    assert entry.weight_bytes < 1.2 * blocks
    assert read_bytes(bundle.manifest, entry, 0) == entry.weight_bytes  # the head reads all of it
    assert pipeline.verify(bundle.path, Settings.from_environment())["checks"]["files"]


def test_a_conversation_is_kept_and_goes_on(
    bundle: Bundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    greedy = Sampling()
    whole = Session(Engine(bundle.path))
    expected = [whole.ask(text, sampling=greedy, max_tokens=8).text for text in ("the fox", "dog")]
    settings = Settings(home=tmp_path / "home", data=None, provider="keyfile")
    with open_vault(settings=settings, create=True, notify=lambda notice: None) as vault:
        first = Session(Engine(bundle.path), vault=vault, name="work")
        assert first.ask("the fox", sampling=greedy, max_tokens=8).text == expected[0]
        again = Session(Engine(bundle.path), vault=vault, name="work")
        assert again.restored_tokens
        assert again.ask("dog", sampling=greedy, max_tokens=8).text == expected[1]
    assert main(["run", str(bundle.path), "the fox", "--max-tokens", "8"]) == 0
    assert capsys.readouterr().out.strip() == expected[0].strip()


def test_biases_and_a_head_of_its_own_go_with_them(tmp_path: Path) -> None:
    source = kept(tmp_path / "a.gguf", "qwen2", tie_word_embeddings=False)
    bundle = pipeline.export(source, tmp_path / "a.cloister", backends=("cloister",))
    found, (entry,) = bundle.receipt(), bundle.manifest.programs
    assert found["parts_against_checkpoint"]["worst"]["size"] < 1e-3
    assert found["program_against_checkpoint"]["mean_kld"] < 5e-3
    assert entry.weight_bytes - read_bytes(bundle.manifest, entry, 0) == 416 * 210


@pytest.mark.parametrize("options", [(), ("--backend", "cloister", "--also", "xnnpack"),
                                     ("--backend", "cloister", "--also", "coreml")])
def test_no_other_backend_is_given_them(
    tied: Checkpoint, tmp_path: Path, options: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["export", str(tied.path), "-o", str(tmp_path / "x.cloister"), *options]) == 1
    said = " ".join(capsys.readouterr().err.split())
    assert f"a program for {options[-1] if options else 'xnnpack'} cannot hold" in said
    assert "use --backend cloister alone" in said
    assert not list(tmp_path.iterdir())


def test_a_matrix_that_is_another_is_not_written(
    tied: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, check, writing = Checkpoint.tensor, pipeline._check_runs, True

    def other(self: Checkpoint, name: str) -> torch.Tensor:
        tensor = read(self, name)
        return tensor.flip(0) if name == "layers.1.attn.qkv.v.weight.blocks" and writing else tensor

    def written(entry: object) -> None:
        nonlocal writing
        writing = False
        check(entry)  # type: ignore[arg-type]

    monkeypatch.setattr(Checkpoint, "tensor", other)
    monkeypatch.setattr(pipeline, "_check_runs", written)
    with pytest.raises(ExportMismatch, match=r"Tensor layers\.1\.attn\.qkv\.v of the checkpoint"):
        pipeline.export(tied, tmp_path / "x.cloister", backends=("cloister",))
    assert not list(tmp_path.iterdir())


def test_values_that_are_joined_in_another_order_are_found(
    tied: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(own._Joined, "forward", lambda self, x: torch.cat(
        [part(x) for part in reversed(self.parts)], dim=-1))
    with pytest.raises(ExportMismatch, match=r"Part layers\.0\.attn\.qkv of the program differs"):
        pipeline.export(tied, tmp_path / "x.cloister", backends=("cloister",))
