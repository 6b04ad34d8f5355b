"""One command makes the family from the public data sets."""

import json
from pathlib import Path

import pytest
import torch
from pytorch_tokenizers import CppHFTokenizer

from cloister.errors import DataError
from cloister.model.checkpoint import Checkpoint
from cloister.model.config import ModelConfig
from cloister.model.transformer import Decoder
from cloister.reference import build, vocabulary
from cloister.settings import Settings
from cloister.tiers import Shape
from cloister.tokenizer import Message, Tokenizer

SHIPPED_TEXT = Path(build.__file__).parents[1] / "export" / "check.jsonl"


@pytest.fixture(scope="module")
def data() -> Path:
    folder = Settings.from_environment().data
    if folder is None:
        pytest.skip("CLOISTER_DATA is not set")
    return folder


@pytest.fixture(scope="module")
def trained(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("vocabulary")
    vocabulary.train(folder, data)
    return folder


def test_the_same_texts_give_the_same_tokenizer(data: Path, trained: Path, tmp_path: Path) -> None:
    vocabulary.train(tmp_path, data)
    name = "tokenizer.json"
    assert (tmp_path / name).read_bytes() == (trained / name).read_bytes()


def test_the_tokenizer_has_4096_entries_and_spells_every_byte(trained: Path) -> None:
    tokenizer = Tokenizer.from_files(trained / "tokenizer.json", None)
    assert tokenizer.vocab_size == 4096
    assert [tokenizer.id_of(marker) for marker in vocabulary.SPECIAL] == [0, 1, 2, 3]
    text = "".join(map(chr, range(0x250))) + "\u2603\u65e5\U0001f600 \n\n  1987"
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_the_phone_and_the_host_agree_on_every_token(trained: Path) -> None:
    phone = CppHFTokenizer()
    phone.load(str(trained / "tokenizer.json"))
    host = Tokenizer.from_files(trained / "tokenizer.json", None)
    for text in (SHIPPED_TEXT.read_text("utf-8"), "Cita Rom\u00e1ntica \u2014 12/3/2030,  x\n\n y"):
        assert list(phone.encode(text, 0, 0)) == host.encode(text)


def test_the_chat_template_lays_out_a_conversation_as_designed(trained: Path) -> None:
    tokenizer = Tokenizer.from_files(
        trained / "tokenizer.json", trained / "chat_template.jinja"
    )
    ids = tokenizer.encode_chat([
        Message(role="system", content="call"), Message(role="user", content="play jazz"),
    ])
    end, system, user, assistant = (tokenizer.id_of(marker) for marker in vocabulary.SPECIAL)
    assert ids == [
        system, *tokenizer.encode("call"), end, user, *tokenizer.encode("play jazz"), end, assistant
    ]


@pytest.mark.parametrize("broken", ["absent", "[]", '{"train": 3, "oos_train": []}', "{"])
def test_data_sets_that_are_missing_or_malformed_are_refused(tmp_path: Path, broken: str) -> None:
    (tmp_path / "snips").mkdir()
    (tmp_path / "snips" / "own.jsonl").write_text('{"task": "a", "input": "b", "target": "c"}')
    if broken != "absent":
        (tmp_path / "clinc150").mkdir()
        (tmp_path / "clinc150" / "train_val.json").write_text(broken)
    with pytest.raises(DataError, match="clinc150"):
        vocabulary.train(tmp_path, tmp_path)


def test_too_little_text_for_the_vocabulary_is_refused(tmp_path: Path) -> None:
    for name, file, text in (
        ("snips", "own.jsonl", '{"task": "a", "input": "b", "target": "c"}'),
        ("clinc150", "train_val.json", '{"train": [["a", "b"]], "oos_train": []}'),
        ("fairytaleqa", "stories_train.jsonl", '{"sections": ["once"]}\n'),
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / file).write_text(text)
    with pytest.raises(DataError, match="not 4096"):
        vocabulary.train(tmp_path, tmp_path)
    assert not (tmp_path / "tokenizer.json").exists()


def test_an_answer_in_a_batch_is_the_answer_alone() -> None:
    shape = Shape(vocab_size=24, hidden_size=16, layers=2, heads=2, kv_heads=1, head_size=8,
                  feed_forward=32, context=256, tied=False)
    torch.manual_seed(5)
    decoder = Decoder(ModelConfig(shape=shape)).eval()
    prompts = [[1, 2, 3], [4, 5], [6, 7, 8], [9, 10], [11, 12, 13]]
    free = build.answer(decoder, prompts, end=99)  # no such token: up to the limit
    end = free[0][3]
    together = build.answer(decoder, prompts, end)
    assert together == [build.answer(decoder, [prompt], end)[0] for prompt in prompts]
    for answer, long in zip(together, free, strict=True):
        assert end not in answer
        assert answer == (long[:long.index(end)] if end in long else long)


def test_one_command_gives_a_checkpoint_and_a_record_of_what_it_can_do(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(build, "_LONGEST", 2)
    given = ["--data", str(data), "--out", str(tmp_path), "--tiers", "nano-1", "--steps", "1"]
    assert build.main(given) == 0
    checkpoint = Checkpoint.open(tmp_path / "checkpoints" / "nano-1")
    record = json.loads((tmp_path / "nano-1.json").read_text())
    assert record["checkpoint"] == checkpoint.identity
    assert record["dev_examples"] > 500
    assert len(record["losses"]) == 1
    assert checkpoint.metadata.eos == (0,)
    assert checkpoint.tensor("embed.weight").dtype is torch.bfloat16
    assert str(tmp_path) not in json.dumps(record)
    assert "development requests" in capsys.readouterr().err


@pytest.mark.parametrize(("extra", "said"), [
    (["--tiers", "femto"], "femto"), (["--steps", "0"], "steps is 0"), ([], "snips"),
])
def test_wrong_usage_of_the_builder_ends_in_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], extra: list[str], said: str
) -> None:
    out = tmp_path / "out"
    given = ["--data", str(tmp_path / "no"), "--out", str(out), *extra]
    assert build.main(given) == 1
    assert said in capsys.readouterr().err
    assert not list(tmp_path.glob("out/*"))
