"""What is rounded for what it reads loses less than what is rounded by itself."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

from cloister import family
from cloister.corpus import Example
from cloister.distill.schedule import Schedule
from cloister.errors import DataError, NonFiniteTensor
from cloister.model.checkpoint import Checkpoint, Metadata, plan
from cloister.model.config import ModelConfig
from cloister.model.recipe import Recipe
from cloister.model.transformer import Decoder
from cloister.model.writer import CheckpointWriter
from cloister.quantize.apply import QuantizeReport, quantize
from cloister.quantize.calibrate import Calibration, Inputs
from cloister.quantize.columns import Moments, improve, round_columns, search_scales
from cloister.quantize.texts import COUNT, calibration_texts, most
from cloister.quantize.train import QatSettings
from cloister.tiers import Shape
from cloister_kernels.reference import dequantize

if TYPE_CHECKING:
    from collections.abc import Callable

SHAPE = Shape(vocab_size=300, hidden_size=64, layers=2, heads=2, kv_heads=1, head_size=32,
              feed_forward=96, context=64, tied=True)


def checkpoint(path: Path, tokenizer_dir: Path, **changes: Any) -> Checkpoint:
    config = ModelConfig(shape=SHAPE, **changes)
    decoder, rng = Decoder(config), torch.Generator().manual_seed(1)
    for parameter in decoder.parameters():
        parameter.data = torch.randn(parameter.shape, generator=rng) * 0.1
    tensors = plan(config, None)
    with CheckpointWriter(
        path, metadata=Metadata(name="tiny", config=config, eos=(1,)), tensors=tensors,
        tokenizer=tokenizer_dir / "tokenizer.json", template=tokenizer_dir / "chat_template.jinja",
    ) as writer:
        for name, value in decoder.state_dict().items():
            if name in tensors:
                writer.add(name, value)
    return Checkpoint.open(path)


def divergence(one: Decoder, other: Decoder, texts: torch.Tensor) -> float:
    with torch.no_grad():
        p, q = (decoder(texts).log_softmax(-1) for decoder in (one, other))
    return float((p.exp() * (p - q)).sum(-1).mean())


def test_columns_that_have_nothing_to_do_with_each_other_are_rounded_to_the_nearest() -> None:
    weight = torch.randn(8, 64)
    scale = search_scales(weight, torch.ones(64), 32)
    q = round_columns(weight, scale, Moments(torch.eye(64)))
    nearest = (weight.unflatten(1, (2, 32)) / scale.float()[..., None]).round().clamp(-8, 7)
    assert torch.equal(q, nearest.flatten(1))


def test_columns_that_are_read_together_make_up_for_each_others_error() -> None:
    rng = torch.Generator().manual_seed(2)
    read = torch.randn(500, 8, generator=rng) @ torch.randn(8, 64, generator=rng)
    weight = torch.randn(16, 64, generator=rng)
    moments = Moments(read.T @ read)
    scale = search_scales(weight, moments.cost_K, 32)
    nearest = round_columns(weight, scale, Moments(torch.eye(64)))
    chosen = round_columns(weight, scale, moments)
    improved = improve(weight, chosen, scale, moments)

    def error(q: torch.Tensor, scale: torch.Tensor) -> float:
        return float((read @ (dequantize(q.to(torch.int8), scale) - weight).T).square().mean())

    assert error(chosen, scale) < 0.1 * error(nearest, scale)
    assert error(*improved) < 0.9 * error(chosen, scale)


def test_weights_are_moved_to_undo_what_happened_to_their_inputs() -> None:
    exact = torch.randn(500, 32)
    rounded = exact * 0.8 + 0.01 * torch.randn(500, 32)
    weight = torch.randn(4, 32)
    moved = Inputs(rounded, exact).moved(weight)
    before = (rounded @ weight.T - exact @ weight.T).square().mean()
    assert (rounded @ moved.T - exact @ weight.T).square().mean() < 0.05 * before


@pytest.mark.parametrize("changes", [
    {}, {"qkv_bias": True, "output_bias": True, "mlp_bias": True, "qk_norm": True},
    {"post_norms": True, "norm_offset": True, "embedding_scale": 8.0, "window": 9,
     "windowed_layers": (0,), "local_rope_theta": 500.0, "attention_softcap": 20.0},
], ids=["llama", "biases", "gemma"])
@pytest.mark.parametrize(("recipe", "share"), [
    ("8da4w-g32", 0.8), ("8da4w-g32-d8", 0.8), ("8da8w", 1.0)])
def test_every_layout_is_calibrated_and_comes_closer(
    tmp_path: Path, tokenizer_dir: Path, changes: dict[str, Any], recipe: str, share: float
) -> None:
    source = checkpoint(tmp_path / "plain", tokenizer_dir, **changes)
    texts = torch.randint(300, (24, 40), generator=torch.Generator().manual_seed(3))
    calibration = Calibration(source, Recipe.parse(recipe), texts.tolist())
    made = dict(calibration.tensors())
    assert list(made) == list(plan(replace(
        source.metadata.config, shape=replace(SHAPE, tied=False)), Recipe.parse(recipe)))
    assert [error.layer for error in calibration.errors] == [0, 1]
    plain = quantize(source, tmp_path / "by-itself", recipe).load()
    calibrated = quantize(source, tmp_path / "again", recipe).load()
    calibrated.load_state_dict(made, strict=False)
    exact = source.load()
    held_out = torch.randint(300, (8, 40), generator=torch.Generator().manual_seed(4))
    lost = divergence(exact, calibrated, held_out)
    assert lost < share * divergence(exact, plain, held_out)


def test_data_or_the_models_own_texts_calibrate_and_the_report_tells_of_every_layer(
    tmp_path: Path, tokenizer_dir: Path
) -> None:
    source = checkpoint(tmp_path / "plain", tokenizer_dir)
    texts = calibration_texts(source, "self")
    assert len(texts) == COUNT
    assert {len(ids) for ids in texts} == {SHAPE.context}
    assert texts == calibration_texts(source, "self")
    data = [Example(task="story", input="the quick fox", target="jumps over " * 3)] * 20
    report = quantize(source, tmp_path / "x", calibrate=data).report
    assert isinstance(report, QuantizeReport)
    assert [row["layer"] for row in report.to_dict()["layers"]] == [0, 1]  # type: ignore[attr-defined]


def test_what_cannot_be_calibrated_is_refused_and_nothing_is_written(
    tmp_path: Path, tokenizer_dir: Path
) -> None:
    source = checkpoint(tmp_path / "plain", tokenizer_dir)
    few = [Example(task="story", input="a", target="b")]
    with pytest.raises(DataError, match="the model's own texts"):
        quantize(source, tmp_path / "x", calibrate=few)
    assert [path.name for path in tmp_path.iterdir()] == ["plain"]


def edited(path: Path, tokenizer_dir: Path, change: Callable[[Decoder], object]) -> Checkpoint:
    source = checkpoint(path / "before", tokenizer_dir)
    decoder, tensors = source.load(), plan(source.metadata.config, None)
    with torch.no_grad():
        change(decoder)
    with CheckpointWriter(
        path / "edited", metadata=source.metadata, tensors=tensors,
        tokenizer=source.tokenizer_path, template=source.template_path,
    ) as writer:
        for name in tensors:
            writer.add(name, decoder.state_dict()[name])
    return Checkpoint.open(path / "edited")


@pytest.mark.parametrize("share", [0.0, 1e-20])
def test_a_model_that_says_nothing_is_calibrated_without_an_error(
    tmp_path: Path, tokenizer_dir: Path, share: float
) -> None:
    source = edited(tmp_path, tokenizer_dir, lambda decoder: [
        parameter.mul_(share) for parameter in decoder.parameters()])
    calibration = Calibration(source, Recipe.parse("8da4w-g32"), [[1, 2, 3, 4]] * 4)
    assert all(tensor.isfinite().all() for _, tensor in calibration.tensors())
    assert [error.error for error in calibration.errors] == [0.0, 0.0]


@pytest.mark.parametrize("size", [1e20, 1e38])
def test_a_model_whose_layers_overflow_is_refused_by_name(
    tmp_path: Path, tokenizer_dir: Path, size: float
) -> None:
    source = edited(
        tmp_path, tokenizer_dir, lambda decoder: decoder.layers[1].mlp_norm.weight.fill_(size))
    with pytest.raises(NonFiniteTensor, match="Layer 1 of edited computes"):
        quantize(source, tmp_path / "x", calibrate="self")
    assert not (tmp_path / "x").exists()


@pytest.mark.slow
def test_a_trained_model_loses_less_on_texts_of_its_own(tmp_path: Path) -> None:
    """Nano-1, calibrated on what it samples, and measured on other samples of it."""
    source = Checkpoint.open(family.checkpoint("nano-1"))
    exact = source.load()
    plain = quantize(source, tmp_path / "plain").load()
    calibrated = quantize(source, tmp_path / "calibrated", calibrate="self").load()
    rng = torch.Generator().manual_seed(5)
    tokens = torch.tensor(calibration_texts(source, "self"))[:, :1]
    with torch.no_grad():
        for _ in range(64):
            logits = exact(tokens)[:, -1]
            tokens = torch.cat((tokens, torch.multinomial(logits.softmax(-1), 1, generator=rng)), 1)
    assert divergence(exact, calibrated, tokens) < 0.5 * divergence(exact, plain, tokens)


def test_training_goes_on_from_the_calibrated_weights_on_texts_of_its_own(
    tmp_path: Path, tokenizer_dir: Path
) -> None:
    source = checkpoint(tmp_path / "plain", tokenizer_dir)
    calibrated = quantize(source, tmp_path / "calibrated", calibrate="self")
    still = QatSettings(schedule=Schedule(steps=1, tokens=128, micro=128, peak=1e-12, warmup=0))
    kept = quantize(source, tmp_path / "kept", calibrate="self", settings=still)
    # A step of no length changes nothing.
    for name in plan(kept.metadata.config, kept.metadata.schemes):
        torch.testing.assert_close(kept.tensor(name), calibrated.tensor(name), rtol=0, atol=1e-6)
    assert not list(tmp_path.glob("*/unrounded")) and not list(tmp_path.glob("*/calibrated"))


def test_a_training_that_was_killed_does_not_calibrate_again(
    tmp_path: Path, tokenizer_dir: Path
) -> None:
    source, stages = checkpoint(tmp_path / "plain", tokenizer_dir), list[str]()
    steps = QatSettings(schedule=Schedule(steps=2, tokens=128, micro=128, warmup=0))

    def killed(stage: str, done: int = 0, total: int = 0, note: str = "") -> None:
        stages.append(stage)
        if stage == "train 4 bits":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize(source, tmp_path / "x", calibrate="self", settings=steps, progress=killed)
    assert "calibrate" in stages
    assert not (tmp_path / "x").exists()
    again = list[str]()
    quantize(source, tmp_path / "x", calibrate="self", settings=steps,
             progress=lambda stage, *_: again.append(stage))
    assert "train 4 bits" in again
    assert "calibrate" not in again


def test_a_large_model_is_calibrated_on_fewer_texts() -> None:
    assert [most(size) for size in (10**6, 135 * 10**6, 18 * 10**8, 10**11)] == [128, 128, 35, 32]
