"""One command makes the family from the public data sets."""

from pathlib import Path

import pytest
from pytorch_tokenizers import CppHFTokenizer

from cloister.errors import DataError
from cloister.reference import build, mixture, vocabulary
from cloister.settings import Settings
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
    (["--tiers", "femto"], "femto"), ([], "snips"),
])
def test_wrong_usage_of_the_builder_ends_in_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], extra: list[str], said: str
) -> None:
    out = tmp_path / "out"
    given = ["--data", str(tmp_path / "no"), "--out", str(out), *extra]
    assert build.main(given) == 1
    assert said in capsys.readouterr().err
    assert not list(tmp_path.glob("out/*"))
