"""One command makes the family from the public data sets."""

import itertools
import json
from pathlib import Path

import pytest
import torch
from pytorch_tokenizers import CppHFTokenizer

from cloister.bundle import Bundle
from cloister.errors import DataError
from cloister.message import Message
from cloister.model.checkpoint import Checkpoint
from cloister.reference import build, mixture, vocabulary
from cloister.settings import Settings
from cloister.tiers import Tier
from cloister.tokenizer import Tokenizer

pytestmark = pytest.mark.slow

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
    vocabulary.train(folder, mixture.vocabulary_texts(mixture.Mixture.read(data)))
    return folder


def test_the_same_texts_give_the_same_tokenizer(data: Path, trained: Path, tmp_path: Path) -> None:
    vocabulary.train(tmp_path, mixture.vocabulary_texts(mixture.Mixture.read(data)))
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


def test_a_tool_calls_fixed_parts_are_one_token_each(trained: Path) -> None:
    """Half the length of an answer, so twice the speed of it."""
    tokenizer = Tokenizer.from_files(trained / "tokenizer.json", None)
    for text, most in (
        ('{"name": "transfer", "arguments": {}}', 1), ('{"name": "PlayMusic", "arguments": {', 1),
        ('"artist": "', 1), ('", "playlist": "', 1), ('"}}', 1), (" [NAME]", 1),
    ):
        assert len(tokenizer.encode(text)) <= most, text


def test_too_little_text_for_the_vocabulary_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="not 4096"):
        vocabulary.train(tmp_path, ["once", "upon", "a time"])
    assert not (tmp_path / "tokenizer.json").exists()


@pytest.mark.parametrize(("extra", "said"), [
    (["--tiers", "femto"], "femto"), ([], "snips"), (["--tiers", "pro", "--mean"], "add --begin"),
])
def test_wrong_usage_of_the_builder_ends_in_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], extra: list[str], said: str
) -> None:
    out = tmp_path / "out"
    given = ["--data", str(tmp_path / "no"), "--out", str(out), *extra]
    assert build.main(given) == 1
    assert said in capsys.readouterr().err
    assert not list(tmp_path.glob("out/*"))


def test_a_folder_without_checkpoints_is_nothing_to_begin_from(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["--data", str(data), "--out", str(tmp_path / "out"), "--begin", str(tmp_path)]
    assert build.main(given) == 1
    assert "--begin holds no checkpoints" in capsys.readouterr().err
    assert not list((tmp_path / "out").iterdir())


def test_one_command_climbs_down_the_ladder_and_goes_on_where_it_stopped(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """From Ultra to a Nano bundle with its receipt, on a few examples and steps."""
    few = list(mixture.Mixture.read(data).examples(1, 0))[:300]
    monkeypatch.setattr(mixture.Mixture, "examples", lambda *_: iter(few))
    held = {task: rows[:3] for task, rows in mixture.development(data).items()}
    monkeypatch.setattr(mixture, "development", lambda _: held)
    given = ["--data", str(data), "--out", str(tmp_path), "--steps", "2", "--eager"]
    assert build.main([*given, "--tiers", "nano-1"]) == 0
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == [
        "nano-1", "nano-2", "pro", "ultra"]
    checkpoints = {
        tier: Checkpoint.open(tmp_path / "checkpoints" / tier) for tier in Tier
    }
    for above, below in itertools.pairwise(Tier):
        assert checkpoints[below].metadata.parent == checkpoints[above].identity
    assert checkpoints[Tier.NANO_1].tensor("embed.weight").dtype is torch.bfloat16
    bundle = Bundle.open(tmp_path / "family" / "nano-1.cloister")
    bundle.verify()
    assert bundle.manifest.recipe == "8da4w-g32"
    assert bundle.manifest.eos == (0,)
    assert set(bundle.receipt()["evaluations"]) == {
        f"{task}, development"
        for task in ("call", "intent", "redact", mixture.OTHER_SENTENCES, "story", "order", "read")}
    record = json.loads((tmp_path / "nano-1.json").read_text())
    assert set(record) == {"tier", "training", "quantization_aware_training", "evaluation",
                           "post_training_quantization"}
    assert record["training"]["checkpoint"] == checkpoints[Tier.NANO_1].identity
    assert "evaluation" not in json.loads((tmp_path / "ultra.json").read_text())
    for path in tmp_path.glob("*.json"):
        assert str(tmp_path) not in path.read_text()
    text = (tmp_path / "MODEL_CARD.md").read_text()
    assert "nano-1, post-training" in text
    assert "CC BY 3.0" in text

    (tmp_path / "further").mkdir()
    further = build._Builder(data, tmp_path / "further", steps=1, compiled=False, begin=tmp_path)
    longer = further.checkpoint(Tier.PRO)
    assert longer.metadata.parent == further.checkpoint(Tier.ULTRA).identity
    for tier in (Tier.ULTRA, Tier.PRO):
        assert further.checkpoint(tier).identity != checkpoints[tier].identity
        training = json.loads((tmp_path / "further" / f"{tier}.json").read_text())["training"]
        assert training["begun_from"]["checkpoint"] == checkpoints[tier].identity
    (tmp_path / "mean").mkdir()
    between = build._Builder(
        data, tmp_path / "mean", steps=1, compiled=False, begin=tmp_path, mean=True)
    start, end, middle = (
        held.tensor("layers.0.mlp.down.weight").float() for held in (
            checkpoints[Tier.ULTRA], further.checkpoint(Tier.ULTRA),
            between.checkpoint(Tier.ULTRA)))
    assert torch.allclose(middle, (start + end) / 2, rtol=0.02, atol=1e-5)
    assert not torch.allclose(middle, start, rtol=0.02, atol=1e-5)

    monkeypatch.delattr(build, "train")  # nothing is trained again
    before = (tmp_path / "nano-1.json").read_bytes()
    # A kill between the export and the end of the evaluation.
    unfinished = {name: held for name, held in record.items()
                  if name not in ("evaluation", "post_training_quantization")}
    (tmp_path / "nano-1.json").write_text(json.dumps(unfinished))
    assert build.main([*given, "--tiers", "nano-1"]) == 0
    assert (tmp_path / "nano-1.json").read_bytes() == before
    assert build.main([*given, "--tiers", "nano-1"]) == 0
    assert (tmp_path / "nano-1.json").read_bytes() == before
    assert "nano-1.cloister is ready" in capsys.readouterr().err
