"""What is trained is what is quantized, bit for bit."""

import copy
import functools
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn
from torchao.quantization import (
    Int8DynamicActivationIntxWeightConfig,
    IntxWeightOnlyConfig,
    quantize_,
)
from torchao.quantization.granularity import PerAxis, PerGroup
from torchao.quantization.qat import IntxFakeQuantizeConfig, IntxFakeQuantizer, QATConfig

from cloister.distill.loop import train
from cloister.distill.losses import Objective
from cloister.distill.schedule import Schedule, TrainSettings
from cloister.errors import GroupSizeError
from cloister.model.checkpoint import Checkpoint, Metadata, plan
from cloister.model.config import ModelConfig
from cloister.model.quantized import scale_dtype
from cloister.model.recipe import RECIPES, Recipe, Scheme
from cloister.model.transformer import Decoder
from cloister.model.writer import CheckpointWriter
from cloister.pairs import Pair
from cloister.quantize.apply import quantize
from cloister.quantize.qat import round_rows, round_weight, rounded, untied
from cloister.tiers import Shape

SHAPE = Shape(vocab_size=300, hidden_size=128, layers=2, heads=4, kv_heads=2, head_size=32,
              feed_forward=128, context=64, tied=True)
TOKENS = torch.randint(300, (3, 20), generator=torch.Generator().manual_seed(0))
DATA: list[Pair] = [([1, i, 2], [i, i, 3]) for i in range(4, 200)]
SCHEMES = (
    Scheme(bits=8, group=None), *(Scheme(bits=4, group=group) for group in (32, 64, 128))
)
ACTIVATIONS = IntxFakeQuantizeConfig(torch.int8, "per_token", is_symmetric=False)
COMPILES = pytest.mark.skipif(
    not (shutil.which("g++") or shutil.which("clang++")), reason="torch.compile needs a compiler"
)


def settings(steps: int, hard: float = 0.0, **changes: object) -> TrainSettings:
    given = {"steps": steps, "tokens": 512, "micro": 256, "autocast": False, **changes}
    return TrainSettings(schedule=Schedule(**given), objective=Objective(hard=hard))


def model(**changes: object) -> Decoder:
    decoder = Decoder(replace(ModelConfig(shape=SHAPE), **changes)).eval()
    generator = torch.Generator().manual_seed(1)
    for parameter in decoder.parameters():
        if parameter.dim() == 2:
            torch.nn.init.normal_(parameter, std=0.08, generator=generator)
    return decoder


def prepare(decoder: Decoder, recipe: Recipe) -> Decoder:
    """A copy that rounds."""
    made = Decoder(untied(decoder.config))
    made.load_state_dict(decoder.state_dict())
    return rounded(made, recipe)


def quantized(prepared: Decoder, recipe: str, folder: Path, tokenizer_dir: Path) -> Decoder:
    """Through a checkpoint and `quantize`, as they are run in earnest."""
    weights = dict(prepared.named_parameters())
    tensors = plan(prepared.config, None)
    with CheckpointWriter(
        folder / "plain", metadata=Metadata(name="x", config=prepared.config), tensors=tensors,
        tokenizer=tokenizer_dir / "tokenizer.json", template=None,
    ) as writer:
        for name in tensors:
            writer.add(name, weights[name])
    quantize(Checkpoint.open(folder / "plain"), folder / "quantized", Recipe.parse(recipe))
    return Checkpoint.open(folder / "quantized").load()


def weight_config(scheme: Scheme) -> IntxFakeQuantizeConfig:
    if scheme.group is None:
        return IntxFakeQuantizeConfig(torch.int8, "per_channel")
    return IntxFakeQuantizeConfig(
        torch.int4, group_size=scheme.group, is_symmetric=True, scale_precision=torch.bfloat16
    )


def convert_config(
    scheme: Scheme, *, linear: bool
) -> Int8DynamicActivationIntxWeightConfig | IntxWeightOnlyConfig:
    dtype = torch.int8 if scheme.group is None else torch.int4
    granularity = PerAxis(0) if scheme.group is None else PerGroup(scheme.group)
    if linear:
        return Int8DynamicActivationIntxWeightConfig(
            weight_dtype=dtype, weight_granularity=granularity,
            weight_scale_dtype=scale_dtype(scheme),
        )
    return IntxWeightOnlyConfig(
        weight_dtype=dtype, granularity=granularity, scale_dtype=scale_dtype(scheme)
    )


def awkward(rows: int, inputs: int) -> torch.Tensor:
    """Random rows of every size, some of zeros, of one sign, of ties, of a large entry."""
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(rows, inputs, generator=generator)
    x *= 10 ** torch.empty(rows, 1).uniform_(-9, 4, generator=generator)
    x[0] = 0
    x[1] = x[1].abs()
    x[2] = -x[2].abs()
    x[3] = torch.arange(inputs) % 16 - 7.5
    x[4, 0] = 1e4
    x[5] = x[3] * (1 + 2 ** -8)  # the scale lies between two of bfloat16
    return x


@pytest.mark.parametrize("scheme", [None, *SCHEMES], ids=str)
def test_rounding_is_that_of_torchao_to_the_bit(scheme: Scheme | None) -> None:
    ours = round_rows if scheme is None else functools.partial(round_weight, scheme=scheme)
    theirs = IntxFakeQuantizer(ACTIVATIONS if scheme is None else weight_config(scheme))
    sides = [awkward(400, 256).requires_grad_() for _ in range(2)]
    rounded = [side(x) for side, x in zip((ours, theirs), sides, strict=True)]
    assert torch.equal(*rounded)
    upstream = torch.randn(400, 256, generator=torch.Generator().manual_seed(8))
    for x in rounded:
        x.backward(upstream)
    mine, reference = (x.grad for x in sides)
    assert mine is not None and reference is not None
    # Theirs is multiplied by a scale and by its rounded inverse, which is not quite one.
    torch.testing.assert_close(mine, reference, rtol=2 ** -7, atol=0)
    assert torch.equal(mine, torch.where(reference == 0, 0, upstream))
    assert scheme is None or (reference == 0).any()


@pytest.mark.slow
@pytest.mark.parametrize("recipe", RECIPES)
def test_the_integers_and_scales_are_those_of_torchaos_own_conversion(
    recipe: str, tmp_path: Path, tokenizer_dir: Path
) -> None:
    plain, chosen = model(), Recipe.parse(recipe)
    prepared = prepare(plain, chosen)
    train(prepared, DATA, settings(5, peak=1e-3), tmp_path, teacher=plain)
    held = quantized(prepared, recipe, tmp_path, tokenizer_dir).state_dict()
    compared = 0
    for name, module in prepared.named_modules():
        scheme = chosen.scheme_of(f"{name}.weight")
        if scheme is None or not isinstance(module, nn.Linear | nn.Embedding):
            continue
        rows, inputs = module.weight.shape
        linear = isinstance(module, nn.Linear)
        layer = nn.Linear(inputs, rows, bias=False) if linear else nn.Embedding(rows, inputs)
        layer.weight = nn.Parameter(module.weight.detach().clone())
        holder = nn.Sequential(layer)
        quantize_(holder, QATConfig(
            activation_config=ACTIVATIONS if linear else None,
            weight_config=weight_config(scheme), step="prepare",
        ), filter_fn=lambda module, name: name == "0")
        quantize_(
            holder, QATConfig(convert_config(scheme, linear=linear), step="convert"),
            filter_fn=lambda module, name: name == "0",
        )
        converted = holder[0].weight
        assert torch.equal(converted.qdata, held[f"{name}.weight.q"]), name
        assert torch.equal(
            converted.scale.view(rows, -1), held[f"{name}.weight.scale"].view(rows, -1)), name
        compared += 1
    assert compared == 2 + 7 * SHAPE.layers


@pytest.mark.slow
@COMPILES
@pytest.mark.parametrize("scheme", [None, SCHEMES[0], SCHEMES[1]], ids=str)
def test_compiled_rounding_is_the_same_rounding(scheme: Scheme | None) -> None:
    ours = round_rows if scheme is None else functools.partial(round_weight, scheme=scheme)
    x = awkward(64, 128)
    assert torch.equal(torch.compile(ours, dynamic=False)(x), ours(x))


def test_autocast_rounds_other_numbers(tmp_path: Path, tokenizer_dir: Path) -> None:
    prepared = prepare(model(), Recipe.parse("8da4w-g32")).eval()
    after = quantized(prepared, "8da4w-g32", tmp_path, tokenizer_dir)
    with torch.no_grad():
        wide, ran = prepared(TOKENS), after(TOKENS)
        with torch.autocast("cpu", torch.bfloat16):
            narrow = prepared(TOKENS).float()
    assert torch.equal(wide, ran)
    assert (narrow - ran).abs().max() > 1e-2 * ran.std()


@pytest.mark.slow
@pytest.mark.parametrize("recipe", RECIPES)
def test_a_trained_decoder_computes_what_its_quantized_self_computes(
    recipe: str, tmp_path: Path, tokenizer_dir: Path
) -> None:
    plain = model(qkv_bias=True)
    prepared = prepare(plain, Recipe.parse(recipe))
    train(prepared, DATA, settings(5, peak=1e-3), tmp_path, teacher=plain)
    after = quantized(prepared, recipe, tmp_path, tokenizer_dir)
    with torch.no_grad():
        trained, ran, before = prepared(TOKENS), after(TOKENS), plain(TOKENS)
    assert torch.equal(trained, ran)
    assert (trained - before).abs().max() > 1e-3


def test_every_weight_is_rounded_and_every_weight_learns() -> None:
    plain = model()
    prepared = prepare(plain, Recipe.parse("8da4w-g32-e4"))
    torch.autograd.backward(prepared(TOKENS).logsumexp(-1).mean())
    for name, parameter in prepared.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name
        if parameter.dim() == 2:
            # A change below a step of the rounding changes nothing.
            with torch.no_grad():
                before, kept = prepared(TOKENS), parameter.clone()
                place = parameter.abs().argmin()
                parameter.view(-1)[place] += 1e-7
                assert torch.equal(prepared(TOKENS), before), name
                parameter.copy_(kept)


def test_the_decoder_that_was_prepared_stays_as_it_was() -> None:
    plain = model()
    before = copy.deepcopy(plain.state_dict())
    prepared = prepare(plain, Recipe.parse("8da4w-g32"))
    with torch.no_grad():
        for parameter in prepared.parameters():
            parameter.add_(1.0)
    assert plain.config.shape.tied
    assert prepared.head.weight is not prepared.embed.weight
    for name, weight in plain.state_dict().items():
        assert torch.equal(weight, before[name]), name


@pytest.mark.slow
def test_learning_from_its_unquantized_self_a_decoder_comes_closer_to_it(tmp_path: Path) -> None:
    plain = model()
    for folder in ("plain", "qat"):
        (tmp_path / folder).mkdir()
    train(plain, DATA, settings(100, hard=1.0, peak=5e-3, save_every=200), tmp_path / "plain")

    @torch.no_grad()
    def apart(decoder: Decoder) -> float:
        p, q = (m(TOKENS).double().log_softmax(-1) for m in (plain, decoder))
        return float((p.exp() * (p - q)).sum(-1).mean())

    prepared = prepare(plain, Recipe.parse("8da4w-g128-e4"))
    before = apart(prepared.eval())
    generator = torch.Generator().manual_seed(5)
    data = [
        (row[:2], row[2:]) for row in torch.randint(300, (2000, 20), generator=generator).tolist()
    ]
    train(prepared, data, settings(240, tokens=1024, micro=1024, peak=3e-4, save_every=300),
          tmp_path / "qat", teacher=plain)
    after = apart(prepared)
    assert after < 0.5 * before


def test_a_group_that_does_not_divide_a_layer_is_refused_by_name() -> None:
    plain = Decoder(ModelConfig(shape=replace(SHAPE, feed_forward=96)))
    with pytest.raises(GroupSizeError, match=r"layers\.0\.mlp\.down has 96 inputs.*64"):
        prepare(plain, Recipe.parse("8da4w-g64"))
