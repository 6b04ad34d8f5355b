"""`cloister bench --against` measures what is installed, says what is not, and divides in turns."""

from __future__ import annotations

import json
import stat
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGUFReader, quants

from cloister.bench import against
from cloister.bench.weights import random_gguf, random_transformers
from cloister.cli import main
from cloister.commands import bench_tables
from cloister.errors import SettingError, WorkerError
from cloister.evaluate import peers
from cloister.tiers import Scale, Shape, Tier, ladder

SHAPE = ladder(Scale.REFERENCE)[Tier.NANO_1]
SPEED = {
    "load_s": 0.5, "first_token_s": 0.25, "anon_bytes": 3000, "empty_bytes": 1000,
    "prefill_tokens_per_s": {"128": 100.0}, "decode_tokens_per_s": {"0": 10.0},
}
VERSIONS = {name: "1.0" for peer in peers.PEERS.values() for name in peer.packages}


def fake(tmp_path: Path, **answers: Any) -> str:
    """Return an interpreter that prints what `answers` has for a command, or ends with its status.

    What it is asked is a line each in the file `asked` beside it.
    """
    path = tmp_path / "python"
    answers = {"about": {"system": "AVX2"}, **answers}
    path.write_text(
        f"#!{sys.executable}\nimport json, pathlib, sys\n"
        f"answers = json.loads({json.dumps(json.dumps(answers))})\n"
        "_, module, command, *rest = sys.argv[1:]\n"
        f"print(module, command, file=open({str(tmp_path / 'asked')!r}, 'a'))\n"
        "answer = answers.get(f'{module} {command}', answers.get(command))\n"
        "if command == 'versions': answer = {name: answer[name] for name in rest}\n"
        "if command == 'convert':\n"
        "    pathlib.Path(rest[1]).mkdir()\n"
        "    pathlib.Path(rest[1], 'weights').write_text('1')\n"
        "sys.exit(answer) if isinstance(answer, int) else print('noise'), print(\n"
        "    answer if isinstance(answer, str) else json.dumps(answer))\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


@pytest.fixture
def ours(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stand-ins for bundles: twice the speed of SPEED, in half the time."""
    def export(
        backend: str, source: Path, out: Path, *, kv: str | None, debug: bool
    ) -> dict[str, Any]:
        out.mkdir()
        (out / "program").write_bytes(bytes(500))
        return {"convert_s": 2.0, "convert_peak_bytes": 10_000}

    monkeypatch.setattr(against, "export_apart", export)
    monkeypatch.setattr(against, "random_checkpoint", lambda out, *_: out.mkdir())
    monkeypatch.setattr(against, "random_transformers", lambda out, _: out.mkdir())
    monkeypatch.setattr(against, "measure", lambda *_, **__: {
        **SPEED, "first_token_s": -0.125, "instruction_set": "avx2", "bandwidth_bytes_per_s": 3e10,
        "decode_tokens_per_s": {"0": 20.0}})


def compare(tmp_path: Path, names: list[str], python: str, *, turns: int = 1, keep: bool = False
            ) -> dict[str, Any]:
    return against.compare(
        against.Model(tier=Tier.NANO_1, scale=Scale.REFERENCE, recipe="8da4w-g32"), names,
        python=python, turns=turns,
        keep=tmp_path / "keep" if keep else None)


def test_every_peer_is_measured_in_each_turn_and_divided(tmp_path: Path, ours: None) -> None:
    python = fake(tmp_path, versions=VERSIONS, speed=SPEED, convert={
        "convert_s": 4.0, "convert_peak_bytes": 40_000})
    found = compare(tmp_path, list(against.NAMES), python, turns=2)
    assert list(found["measured"]) == ["cloister", *against.NAMES]
    assert all(len(turns) == 2 for turns in found["measured"].values())
    figures = found["figures"]
    assert figures["decode 0"]["ratio"]["openvino"] == {
        "median": 2.0, "lowest": 2.0, "highest": 2.0}
    assert figures["load_and_first_token_s"]["ratio"]["llama.cpp"]["median"] == 0.5
    assert figures["memory_bytes"]["median"]["llama.cpp"] == 2000
    assert figures["convert_s"]["ratio"]["onnxruntime-genai"]["median"] == 0.5
    assert "llama.cpp" not in figures["convert_s"]["median"]  # its model is written as it is
    medians, ratios = bench_tables.against(found)
    assert medians[1] == ("", "cloister", *against.NAMES)
    assert ("decode 0, tokens/s", "20.0", "20.0", "10.0", "10.0", "10.0") in medians[2]
    assert ("decode 0, tokens/s", "1.00", "2.00", "2.00", "2.00") in ratios[2]
    assert found["systems"] == {"llama.cpp": "AVX2"}


def test_a_ratio_is_the_median_of_those_of_turns() -> None:
    def turn(speed: float) -> dict[str, Any]:
        return {**SPEED, "decode_tokens_per_s": {"0": speed}}

    found = against.figures({"cloister": {}, "openvino": {}}, {
        "cloister": [turn(10), turn(30), turn(40)], "openvino": [turn(10), turn(10), turn(20)]})
    assert found["decode 0"] == {
        "median": {"cloister": 30, "openvino": 10},
        "ratio": {"openvino": {"median": 2.0, "lowest": 1.0, "highest": 3.0}}}


def test_what_is_missing_or_crashes_is_left_out_and_the_others_go_on(
    tmp_path: Path, ours: None
) -> None:
    python = fake(
        tmp_path, versions={**VERSIONS, "nncf": None}, speed=SPEED,
        **{"onnxruntime_int4 convert": 3})
    found = compare(tmp_path, list(against.NAMES), python)
    assert list(found["measured"]) == ["cloister", "executorch", "llama.cpp"]
    assert found["left_out"]["openvino"] == "nncf not installed"
    assert "exit status 3 (convert)" in found["left_out"]["onnxruntime-genai"]


def test_a_peer_that_fails_in_a_turn_is_left_out(tmp_path: Path, ours: None) -> None:
    python = fake(tmp_path, versions=VERSIONS, speed="{not JSON")
    found = compare(tmp_path, ["llama.cpp", "executorch"], python, turns=2)
    assert list(found["measured"]) == ["cloister", "executorch"]
    assert "printed no JSON object (speed)" in found["left_out"]["llama.cpp"]


def test_our_own_failure_ends_the_run(
    tmp_path: Path, ours: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise WorkerError("the export failed.")

    monkeypatch.setattr(against, "export_apart", refuse)
    with pytest.raises(WorkerError, match="the export failed"):
        compare(tmp_path, ["llama.cpp"], fake(tmp_path, versions=VERSIONS, speed=SPEED))


def test_kept_models_are_not_converted_again(tmp_path: Path, ours: None) -> None:
    python = fake(tmp_path, versions=VERSIONS, speed=SPEED, convert={
        "convert_s": 4.0, "convert_peak_bytes": 40_000})
    first = compare(tmp_path, ["openvino"], python, keep=True)
    again = compare(tmp_path, ["openvino"], python, keep=True)
    asked = (tmp_path / "asked").read_text().splitlines()
    assert asked.count("openvino_int4 convert") == 1
    assert asked.count("openvino_int4 speed") == 2
    assert again["converted"] == first["converted"]
    assert not list((tmp_path / "keep").glob("*/transformers"))


def test_a_failed_conversion_is_tried_again(tmp_path: Path, ours: None) -> None:
    fake(tmp_path, versions=VERSIONS, speed=SPEED, convert=1)
    found = compare(tmp_path, ["openvino"], str(tmp_path / "python"), keep=True)
    assert list(found["measured"]) == ["cloister"]
    python = fake(tmp_path, versions=VERSIONS, speed=SPEED, convert={"convert_s": 1.0})
    assert "openvino" in compare(tmp_path, ["openvino"], python, keep=True)["measured"]


@pytest.mark.parametrize(("arguments", "complaint"), [
    (("--against", "vllm"), "No peer is named 'vllm'; choose of executorch, llama.cpp"),
    (("--against", ""), "No peer is named ''"),
    (("--against", "executorch", "--turns", "0"), "turns is 0"),
    (("--against", "openvino", "--peer-python", "/nowhere/python"), "No Python interpreter is at"),
    (("--against", "executorch", "--profile"), "no --profile"),
    (("--profile",), "add --backend cloister"),
])
def test_bad_options_are_refused_in_one_sentence(
    capfd: pytest.CaptureFixture[str], arguments: tuple[str, ...], complaint: str
) -> None:
    assert main(["bench", "--shape", "nano-1", "--random", *arguments]) == 1
    assert complaint in capfd.readouterr().err.splitlines()[-1]


def test_none_installed_is_refused(tmp_path: Path) -> None:
    python = fake(tmp_path, versions=dict.fromkeys(VERSIONS))
    with pytest.raises(SettingError, match="numpy not installed; openvino: op"):
        compare(tmp_path, ["llama.cpp", "openvino"], python)


def test_versions_are_found_without_importing_the_peer() -> None:
    found = peers.versions(peers.PEERS["openvino"], sys.executable)
    assert found["torch"]
    assert set(found) == set(peers.PEERS["openvino"].packages)


@pytest.mark.parametrize("hidden", [256, 96])
def test_a_random_gguf_has_every_matrix_of_about_unit_gain(tmp_path: Path, hidden: int) -> None:
    shape = Shape(vocab_size=320, hidden_size=hidden, layers=2, heads=4, kv_heads=2, head_size=64,
                  feed_forward=512, context=128, tied=False)
    random_gguf(tmp_path / "m.gguf", shape)
    tensors = GGUFReader(tmp_path / "m.gguf").tensors
    assert len(tensors) == 3 + 9 * shape.layers
    assert {tensor.tensor_type.name for tensor in tensors} == {
        "Q4_0", "Q6_K" if hidden == 256 else "Q8_0", "F32"}
    for tensor in tensors:
        weights = quants.dequantize(tensor.data, tensor.tensor_type)
        if weights.ndim == 2:
            assert float(np.std(weights)) * weights.shape[1]**0.5 == pytest.approx(1, abs=0.1)


def test_transformers_opens_the_random_weights(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    random_transformers(tmp_path / "m", SHAPE)
    model, said = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "m", output_loading_info=True)
    assert not any(said[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert sum(each.numel() for each in model.parameters()) == (
        SHAPE.body_parameters + SHAPE.norm_parameters + 2 * SHAPE.embedding_parameters)


@pytest.mark.slow
def test_the_stock_program_is_measured_beside_ours(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--shape", "nano-1", "--size", "reference", "--random",
                 "--against", "executorch", "--turns", "1", "--json"]) == 0
    found = json.loads(capfd.readouterr().out)
    assert found["command"].startswith("cloister bench --shape nano-1 ")
    assert found["versions"]["executorch"]["executorch"]
    assert found["instruction_set"]
    for figure, each in found["figures"].items():
        assert set(each["median"]) == {"cloister", "executorch"}, figure
        assert figure == "memory_bytes" or min(each["median"].values()) > 0, figure
