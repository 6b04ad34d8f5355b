"""A pruned student is as much of its teacher as fits."""

from dataclasses import replace

import pytest
import torch

from cloister.distill import prune as module
from cloister.distill.data import Batch, batch, one_pass
from cloister.distill.parallel import Parallel, Sharded
from cloister.distill.prune import Cut, Usage, fitted
from cloister.errors import SettingError, VocabularyMismatch
from cloister.model.checkpoint import expected_tensors
from cloister.model.config import ModelConfig
from cloister.model.transformer import Decoder
from cloister.tiers import Shape

SHAPE = Shape(vocab_size=64, hidden_size=48, layers=3, heads=6, kv_heads=3, head_size=8,
              feed_forward=64, context=64, tied=True)
LAYOUTS = {
    "plain": {},
    "gemma": {"norm_offset": True, "post_norms": True, "attention_softcap": 20.0,
              "final_softcap": 10.0, "window": 6, "windowed_layers": (0, 2)},
    "qwen": {"qk_norm": True, "qkv_bias": True},
    "biases": {"qkv_bias": True, "output_bias": True, "mlp_bias": True, "no_rope_layers": (1,)},
}
TOKENS = [torch.randint(64, (4, 20), generator=torch.Generator().manual_seed(i)) for i in range(8)]


def model(layout: str = "plain", **changes: object) -> Decoder:
    config = ModelConfig(shape=replace(SHAPE, **changes), **LAYOUTS[layout])
    decoder = Decoder(config).eval()
    generator = torch.Generator().manual_seed(3)
    for parameter in decoder.parameters():
        torch.nn.init.normal_(parameter, std=0.25, generator=generator)
    return decoder


def usage(teacher: Decoder, batches: list[torch.Tensor]) -> Usage:
    return Usage(Sharded(teacher, Parallel()), [
        Batch(tokens_BT=tokens, labels_BT=tokens, segments_BT=torch.zeros_like(tokens), keys=())
        for tokens in batches])


def prune(teacher: Decoder, shape: Shape, batches: list[torch.Tensor]) -> Decoder:
    """As `cloister.distill.run` does it, without files."""
    cut = Cut(teacher.config, shape, usage(teacher, batches))
    weights, student = teacher.state_dict(), Decoder(cut.config).eval()
    student.load_state_dict(
        {name: cut.tensor(name, weights.__getitem__) for name in expected_tensors(cut.config)},
        strict=False)  # a tied head is its embedding
    return student


@torch.no_grad()
def apart(teacher: Decoder, student: Decoder) -> float:
    """Mean KL divergence on tokens that decided nothing."""
    tokens = torch.randint(64, (8, 24), generator=torch.Generator().manual_seed(99))
    p, q = (decoder(tokens).double().log_softmax(-1) for decoder in (teacher, student))
    return float((p.exp() * (p - q)).sum(-1).mean())


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("tied", [True, False])
def test_pruned_to_its_own_shape_a_teacher_stays_itself(layout: str, tied: bool) -> None:
    teacher = model(layout, tied=tied)
    student = prune(teacher, teacher.config.shape, TOKENS)
    assert student.config == teacher.config
    assert torch.equal(student(TOKENS[0]), teacher(TOKENS[0]))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_is_used_does_not_depend_on_how_examples_share_rows(layout: str) -> None:
    teacher = model(layout, context=128)
    data = [(ids[:3].tolist(), ids[3:length].tolist()) for ids, length in zip(
        torch.cat(TOKENS), range(5, 20), strict=False)]
    (length, rows), = one_pass(data, 256, 0, 128)
    assert len([row for row in rows if row]) == 2  # seven or so to a row, which none fills
    packed = Usage(Sharded(teacher, Parallel()), [batch(data, length, rows)])
    alone = usage(teacher, [torch.tensor([prompt + answer]) for prompt, answer in data])
    for name in ("channels", "layers"):
        torch.testing.assert_close(getattr(packed, name), getattr(alone, name))
    for name in ("neurons", "heads", "squares"):
        torch.testing.assert_close(getattr(packed, name), getattr(alone, name))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_parts_that_do_nothing_are_the_ones_that_go(layout: str) -> None:
    """Neurons and heads without output, and channels that are always zero."""
    teacher = model(layout, tied=False)
    dead = torch.tensor([3, 10, 11, 40])
    with torch.no_grad():
        for layer in teacher.layers:
            layer.mlp.down.weight[:, 5:21] = 0  # whatever they compute
            for part in (layer.mlp.gate, layer.mlp.up):
                part.weight[5:21] = 0
                if part.bias is not None:
                    part.bias[5:21] = 0
            for part in (layer.attn.qkv.v,):
                part.weight[8:16] = 0  # the second KV head, so query heads 2 and 3
                if part.bias is not None:
                    part.bias[8:16] = 0
            for part in (layer.attn.o, layer.mlp.down):
                part.weight[dead] = 0
                if part.bias is not None:
                    part.bias[dead] = 0
        teacher.embed.weight[:, dead] = 0
    shape = replace(teacher.config.shape, feed_forward=48, heads=4, kv_heads=2, hidden_size=44)
    student = prune(teacher, shape, TOKENS)
    torch.testing.assert_close(student(TOKENS[0]), teacher(TOKENS[0]), atol=2e-4, rtol=2e-4)


def test_a_layer_that_passes_everything_on_is_the_one_that_goes() -> None:
    teacher = model("biases")
    with torch.no_grad():
        for part in (teacher.layers[1].attn.o, teacher.layers[1].mlp.down):
            part.weight.zero_()
            part.bias.zero_()
    student = prune(teacher, replace(SHAPE, layers=2), TOKENS)
    assert student.config.no_rope_layers == ()
    torch.testing.assert_close(student(TOKENS[0]), teacher(TOKENS[0]))


def test_a_pattern_of_layers_goes_on_as_it_began_in_another_depth() -> None:
    config = model("gemma").config
    for depth, windowed in ((1, (0,)), (2, (0,)), (7, (0, 2, 3, 5, 6))):
        shape = replace(SHAPE, layers=depth)
        assert fitted(config, shape, [at % 3 for at in range(depth)]).windowed_layers == windowed


def test_settings_of_a_layer_follow_it() -> None:
    teacher = model("gemma")
    with torch.no_grad():
        teacher.layers[0].attn_post_norm.weight.fill_(-1.0)  # times zero
        teacher.layers[0].mlp_post_norm.weight.fill_(-1.0)
    student = prune(teacher, replace(SHAPE, layers=2), TOKENS)
    assert student.config.windowed_layers == (1,)
    torch.testing.assert_close(student(TOKENS[0]), teacher(TOKENS[0]))


@pytest.mark.parametrize(("heads", "kv_heads"), [(3, 3), (4, 2), (2, 2), (2, 1), (1, 1)])
def test_heads_keep_the_keys_and_values_they_were_taught_with(heads: int, kv_heads: int) -> None:
    teacher = model("qwen")
    with torch.no_grad():
        for layer in teacher.layers:
            qkv = layer.attn.qkv
            for head in range(6):
                qkv.q.bias[8 * head:8 * head + 8] = head
            for group in range(3):
                qkv.k.bias[8 * group:8 * group + 8] = group
                qkv.v.bias[8 * group:8 * group + 8] = 10 + group
    student = prune(teacher, replace(SHAPE, heads=heads, kv_heads=kv_heads), TOKENS)
    for layer in student.layers:
        qkv = layer.attn.qkv
        kept = qkv.q.bias[::8].tolist()
        assert kept == sorted(kept)
        shared = [head // (heads // kv_heads) for head in range(heads)]
        assert [qkv.k.bias[8 * at].item() for at in shared] == [head // 2 for head in kept]
        assert [qkv.v.bias[8 * at].item() for at in shared] == [10 + head // 2 for head in kept]


@pytest.mark.parametrize("kv_heads", [2, 1])
def test_where_more_heads_share_keys_and_values_they_share_the_mean(kv_heads: int) -> None:
    teacher = model("biases")
    with torch.no_grad():
        for layer in teacher.layers:
            for part in (layer.attn.qkv.k, layer.attn.qkv.v):
                for whole in (part.weight, part.bias):
                    whole[8:16] = whole[16:] = whole[:8]  # so that the mean is each of them
    student = prune(teacher, replace(SHAPE, kv_heads=kv_heads), TOKENS)
    torch.testing.assert_close(student(TOKENS[0]), teacher(TOKENS[0]), atol=1e-4, rtol=1e-4)


def test_what_is_used_most_is_kept_and_norms_are_made_up_for() -> None:
    """A few strong channels and neurons carry most, as in trained models."""
    teacher = model()
    rng = torch.Generator().manual_seed(5)
    with torch.no_grad():
        strong = torch.rand(48, generator=rng) ** 3 * 4
        teacher.embed.weight *= strong
        for layer in teacher.layers:
            layer.attn.o.weight *= strong[:, None]
            layer.mlp.down.weight *= strong[:, None]
            layer.mlp.up.weight *= (torch.rand(64, generator=rng) ** 3 * 4)[:, None]
    shape = replace(SHAPE, hidden_size=32, feed_forward=40)
    pruned = apart(teacher, prune(teacher, shape, TOKENS))
    # The same amount cut by numbers drawn from a hat.
    blind = []
    for seed in range(5):
        generator = torch.Generator().manual_seed(seed)
        shuffled = model()
        shuffled.load_state_dict(teacher.state_dict())
        noise = [torch.randint(64, (4, 20), generator=generator)]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(module, "_top", lambda usage, count, g=generator: sorted(
                torch.randperm(len(usage), generator=g)[:count].tolist()))
            blind.append(apart(teacher, prune(shuffled, shape, noise)))
    assert pruned < 0.6 * min(blind)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Cut, "_norm", lambda self, name, weight: weight[self._channels])
        assert pruned < 0.9 * apart(teacher, prune(teacher, shape, TOKENS))


@pytest.mark.parametrize(("changes", "said"), [
    ({"hidden_size": 56}, "hidden_size is 56"), ({"layers": 4}, "layers is 4"),
    ({"feed_forward": 65}, "feed_forward is 65"), ({"heads": 12}, "heads is 12"),
    ({"head_size": 4}, "Heads have size 8 in the teacher and 4"),
])
def test_a_student_that_is_larger_somewhere_is_refused_by_name(
    changes: dict[str, int], said: str
) -> None:
    with pytest.raises(SettingError, match=said):
        prune(model(), replace(SHAPE, **changes), TOKENS)


def test_another_vocabulary_is_refused() -> None:
    with pytest.raises(VocabularyMismatch, match="64 tokens and the student 60"):
        prune(model(), replace(SHAPE, vocab_size=60), TOKENS)
