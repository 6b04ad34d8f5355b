"""Packing loses no token, and no example sees another."""

import itertools
import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from cloister.corpus import Example
from cloister.distill.data import IGNORE, Packed, batch, one_pass, schedule_rows
from cloister.errors import ContextExceeded, DataError, TokenizerError
from cloister.model.config import ModelConfig
from cloister.model.transformer import Decoder
from cloister.pairs import Pair, encode, pairs
from cloister.tiers import Shape
from cloister.tokenizer import Tokenizer

SHAPE = Shape(vocab_size=64, hidden_size=32, layers=2, heads=4, kv_heads=2, head_size=8,
              feed_forward=48, context=64, tied=True)


def some(count: int, longest: int, seed: int = 0) -> list[Pair]:
    rng = random.Random(seed)
    return [
        ([rng.randrange(1, 64) for _ in range(rng.randint(1, longest // 2))],
         [rng.randrange(1, 64) for _ in range(rng.randint(1, longest // 2))])
        for _ in range(count)
    ]


@pytest.mark.parametrize("changes", [
    {}, {"attention_softcap": 5.0}, {"window": 4, "windowed_layers": (0,)},
    {"qk_norm": True, "no_rope_layers": (1,)},
])
def test_in_a_row_with_others_an_example_has_the_logits_it_has_alone(
    changes: dict[str, object]
) -> None:
    decoder = Decoder(replace(ModelConfig(shape=SHAPE), **changes))  # type: ignore[arg-type]
    torch.manual_seed(1)
    for parameter in decoder.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    data = some(6, 20)
    made = batch(data, 64, [[0, 1, 2], [3, 4], [5], []])
    together = decoder.logits(decoder.hidden(
        made.tokens_BT, 0, Packed(decoder.config, made.segments_BT)))
    assert made.keys == (0, 1, 2, 3, 4, 5)
    for at, row in enumerate([[0, 1, 2], [3, 4], [5]]):
        start = 0
        for number in row:
            ids = data[number][0] + data[number][1]
            alone = decoder(torch.tensor([ids]))[0]
            torch.testing.assert_close(
                together[at, start:start + len(ids)], alone, atol=1e-4, rtol=1e-4)
            start += len(ids)


def test_labels_are_the_answers_and_nothing_else() -> None:
    data: list[Pair] = [([5, 6, 7], [8, 9]), ([10], [11, 12, 13])]
    made = batch(data, 12, [[0, 1]])
    assert made.tokens_BT.tolist() == [[5, 6, 7, 8, 9, 10, 11, 12, 13, 0, 0, 0]]
    x = IGNORE
    assert made.labels_BT.tolist() == [[x, x, 8, 9, x, 11, 12, 13, x, x, x, x]]
    assert made.segments_BT.tolist() == [[0] * 5 + [1] * 4 + [-1] * 3]


def test_a_pass_holds_every_example_once_in_batches_of_a_few_shapes() -> None:
    data = some(500, 60)
    batches, seen = schedule_rows(data, 256, seed=3, context=64), []
    shapes = set()
    while len(seen) < 500:
        length, rows = next(batches)
        shapes.add((length, len(rows)))
        assert length * len(rows) <= 256
        for row in rows:
            assert sum(len(data[n][0]) + len(data[n][1]) for n in row) <= length
            seen += row
    assert sorted(seen) == list(range(500))
    assert shapes == {(64, 4)}


def test_rows_are_filled_well() -> None:
    data = some(2000, 60)
    taken = list(itertools.islice(schedule_rows(data, 4096, seed=0, context=1024), 10))
    used = sum(len(data[n][0]) + len(data[n][1]) for _, rows in taken for row in rows for n in row)
    assert used / sum(length for length, rows in taken for row in rows if row) > 0.96


def test_the_same_seed_plans_the_same_batches_and_passes_differ() -> None:
    data = some(40, 60)
    first, again = (list(itertools.islice(schedule_rows(data, 4096, 1, 64), 6)) for _ in range(2))
    assert first == again
    assert first[0] != first[1]
    assert first != list(itertools.islice(schedule_rows(data, 4096, 2, 64), 6))


def test_no_examples_are_refused() -> None:
    with pytest.raises(DataError, match="no examples"):
        next(schedule_rows([], 256, 0, 64))


@pytest.mark.parametrize("world", [1, 2, 3, 5])
def test_the_processes_of_a_run_share_the_rows_of_a_batch(world: int) -> None:
    whole = batch(some(7, 20), 64, [[0, 1], [2], [3, 4, 5], []])
    parts = [whole.part(rank, world) for rank in range(world)]
    assert all(len(part.tokens_BT) >= 1 for part in parts)
    assert sorted(key for part in parts for key in part.keys) == list(range(6))
    learnt = sum(int((part.labels_BT != IGNORE).sum()) for part in parts)
    assert learnt == int((whole.labels_BT != IGNORE).sum())
    for part in parts:
        assert len(part.keys) == sum(len(row.unique()) - int(-1 in row) for row in part.segments_BT)


def test_an_example_longer_than_the_context_is_refused_by_number(tokenizer_dir) -> None:
    tokenizer = Tokenizer.from_files(
        tokenizer_dir / "tokenizer.json", tokenizer_dir / "chat_template.jinja")
    short = Example(task="a", input="zebra", target="c")
    long = Example(task="a", input="zebra " * 50, target="c")
    assert len(pairs(tokenizer, [short], 64, "tiny")) == 1
    with pytest.raises(ContextExceeded, match="Example 2 has") as caught:
        pairs(tokenizer, [short, long], 64, "tiny")
    assert "zebra" not in str(caught.value)
    with pytest.raises(ContextExceeded, match=r"own\.jsonl:7 has"):
        pairs(tokenizer, [short, replace(long, place="own.jsonl:7")], 64, "tiny")


def test_what_is_longer_than_the_context_is_left_out_by_its_place(tokenizer_dir) -> None:
    tokenizer = Tokenizer.from_files(
        tokenizer_dir / "tokenizer.json", tokenizer_dir / "chat_template.jinja")
    short = Example(task="a", input="zebra", target="c")
    long = [replace(short, input="zebra " * 50, place=f"own.jsonl:{line}")
            for line in (3, 3, *range(5, 12))]
    found = encode(tokenizer, [short, *long, short], 64)
    assert found.examples == [short, short]
    assert found.pairs == pairs(tokenizer, [short, short], 64, "tiny")
    assert [place for place, _ in found.too_long] == [each.place for each in long]
    assert found.places == "own.jsonl:3, own.jsonl:5, own.jsonl:6, own.jsonl:7, own.jsonl:8"
    assert "zebra" not in repr(found)
    assert len(encode(tokenizer, [short, *long]).pairs) == 10


def test_long_examples_get_rows_of_twice_the_length_and_no_more() -> None:
    for size, length in ((60, 128), (1100, 2048), (2047, 2048), (2048, 4096), (9000, 16384)):
        data = [([1] * size, [2])]
        assert one_pass(data, 1024, 0, 131_072)[0][0] == length
    assert one_pass([([1] * 9000, [2])], 1024, 0, 10_000)[0][0] == 10_000


def test_no_text_is_in_a_batchs_repr() -> None:
    assert "tokens_BT" not in repr(batch(some(2, 8), 64, [[0, 1]]))


def test_a_conversation_that_the_template_refuses_is_named_by_its_place(
    tokenizer_dir: Path, tmp_path: Path
) -> None:
    template = tmp_path / "chat_template.jinja"
    template.write_text("{% for m in messages %}{% if m.content == 'no' %}"
                        "{{ raise_exception('Roles must alternate') }}{% endif %}"
                        "<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}")
    tokenizer = Tokenizer.from_files(tokenizer_dir / "tokenizer.json", template)
    examples = [Example(task="", input=text, target="b", place=f"a.jsonl:{number}")
                for number, text in enumerate(("yes", "no"), start=1)]
    with pytest.raises(TokenizerError, match=r"^a\.jsonl:2: .*Roles must alternate"):
        encode(tokenizer, examples)
