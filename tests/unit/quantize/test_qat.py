"""What is trained is what is quantized, bit for bit."""

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from cloister.distill.data import Pair
from cloister.distill.loop import Schedule, train
from cloister.distill.losses import Objective
from cloister.errors import GroupSizeError
from cloister.model.checkpoint import Checkpoint, CheckpointWriter, Metadata, plan
from cloister.model.config import ModelConfig
from cloister.model.recipe import RECIPES, Recipe
from cloister.model.transformer import Decoder
from cloister.quantize.apply import quantize
from cloister.quantize.qat import prepare
from cloister.tiers import Shape

SHAPE = Shape(vocab_size=300, hidden_size=128, layers=2, heads=4, kv_heads=2, head_size=32,
              feed_forward=128, context=64, tied=True)
TOKENS = torch.randint(300, (3, 20), generator=torch.Generator().manual_seed(0))
DATA: list[Pair] = [([1, i, 2], [i, i, 3]) for i in range(4, 200)]


def model(**changes: object) -> Decoder:
    decoder = Decoder(replace(ModelConfig(shape=SHAPE), **changes)).eval()
    generator = torch.Generator().manual_seed(1)
    for parameter in decoder.parameters():
        if parameter.dim() == 2:
            torch.nn.init.normal_(parameter, std=0.08, generator=generator)
    return decoder


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


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_trained_decoder_computes_what_its_quantized_self_computes(
    recipe: str, tmp_path: Path, tokenizer_dir: Path
) -> None:
    plain = model(qkv_bias=True)
    prepared = prepare(plain, Recipe.parse(recipe))
    train(
        prepared, DATA, Schedule(steps=5, tokens=512, micro=256, peak=1e-3, autocast=False),
        tmp_path / "state", teacher=plain, objective=Objective(hard=0.0),
    )
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


def test_learning_from_its_unquantized_self_a_decoder_comes_closer_to_it(tmp_path: Path) -> None:
    plain = model()
    train(plain, DATA, Schedule(steps=150, tokens=512, micro=256, peak=5e-3), tmp_path / "plain")

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
    train(
        prepared, data, Schedule(steps=60, tokens=1024, micro=1024, peak=3e-4, autocast=False),
        tmp_path / "qat", teacher=plain, objective=Objective(hard=0.0),
    )
    assert apart(prepared) < 0.5 * before


def test_a_group_that_does_not_divide_a_layer_is_refused_by_name() -> None:
    plain = Decoder(ModelConfig(shape=replace(SHAPE, feed_forward=96)))
    with pytest.raises(GroupSizeError, match=r"layers\.0\.mlp\.down has 96 inputs.*64"):
        prepare(plain, Recipe.parse("8da4w-g64"))
