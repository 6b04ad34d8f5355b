"""The shipped family does what a user was told, on this machine."""

from __future__ import annotations

import base64
import hashlib
import json
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from cloister import pipeline, reference
from cloister.bundle import Bundle
from cloister.errors import BundleCorrupt, IncompatibleProgram
from cloister.export.golden import MIN_MARGIN
from cloister.message import Message
from cloister.model.checkpoint import Checkpoint
from cloister.runtime.chat import Sampling
from cloister.runtime.core import Rows
from cloister.runtime.engine import Engine
from cloister.runtime.prefix import BLOCK
from cloister.runtime.session import Session
from cloister.settings import Settings
from cloister.tiers import Tier
from cloister.vault.keys import Keyholder
from cloister.vault.store import Vault

pytestmark = pytest.mark.slow

TIERS = tuple(Tier)
CHECKPOINTS = ("pro", "nano-1")


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    settings = Settings(home=tmp_path_factory.mktemp("home"), data=None)
    return Engine(reference.bundle_path("nano-1"), settings=settings)


@pytest.mark.parametrize("tier", TIERS)
def test_a_shipped_bundle_proves_itself(tier: str) -> None:
    result = pipeline.verify(reference.bundle_path(tier), Settings.from_environment())
    assert result["checks"]["golden_prompts"] >= 10
    lost = result["receipt"]["program_against_checkpoint"]
    assert lost["n"] >= 2048
    assert lost["mean_kld"] <= 1e-3
    assert lost["top1"] >= 0.99
    rows = Bundle.open(reference.bundle_path(tier)).golden()
    assert min(row.margin for row in rows) >= MIN_MARGIN


@pytest.mark.parametrize("tier", TIERS)
def test_a_request_is_answered_by_a_tool_call(tier: str) -> None:
    session = Session(Engine(reference.bundle_path(tier)), system="call")
    text = "".join(token.text for token in session.stream("play some jazz on youtube"))
    call = json.loads(text)
    assert call["name"] == "PlayMusic"
    assert "youtube" in call["arguments"].values()
    assert session.stats.finish == "end"


def test_what_is_installed_stays_under_seventy_megabytes() -> None:
    root = Path(pipeline.__file__).parent
    apart = {"__pycache__", "encoders"}
    size = sum(path.stat().st_size for path in root.rglob("*") if not apart & set(path.parts))
    assert size < 70e6


@pytest.mark.parametrize("tier", CHECKPOINTS)
def test_the_shipped_checkpoints_can_be_opened(tier: str) -> None:
    assert Checkpoint.open(reference.checkpoint_path(tier)).metadata.name == tier


def test_score_and_forward_share_their_state_in_either_order(engine: Engine) -> None:
    ids = engine.tokenizer.encode_chat([Message(role="user", content="play some jazz")])
    engine.truncate(0)
    rows = engine.extend(ids, Rows.ALL)
    assert len(rows) == len(ids)
    assert torch.allclose(rows[-1:], engine.extend(ids), atol=1e-4)
    more = engine.extend([*ids, 5])  # continues what `score` or `forward` read
    again = Engine(reference.bundle_path("nano-1")).extend([*ids, 5])
    assert torch.allclose(more, again, atol=0.05)


def test_a_resumed_conversation_has_an_unbroken_ones_logits_to_the_bit(tmp_path: Path) -> None:
    def logprobs(session: Session, prompt: str) -> list[list[tuple[int, float]]]:
        return [list(token.top) for token in session.stream(prompt, max_tokens=24, top=8)]

    def engine() -> Engine:
        return Engine(reference.bundle_path("nano-1"))

    prompts = ("tell of the fox " * 30, "and of the wolf", "and of the end")
    unbroken = Session(engine(), system="story")
    expected = [logprobs(unbroken, prompt) for prompt in prompts]
    with Vault.create(tmp_path / "vault", Keyholder(keyfile=tmp_path / "key")) as vault:
        for prompt, expectation in zip(prompts, expected, strict=True):
            # As in a process that has read nothing.
            session = Session(engine(), name="work", system="story", vault=vault)
            assert (session.restored_tokens > BLOCK) == (prompt != prompts[0])
            assert logprobs(session, prompt) == expectation


CONTINUE = """
import base64, sys, torch
from cloister.runtime.core import Rows
from cloister.runtime.engine import Engine
engine = Engine(sys.argv[1])
engine.restore(base64.b64decode(sys.stdin.read()))
logits = engine.extend([int(x) for x in sys.argv[2].split(",")])
print(base64.b64encode(logits.numpy().tobytes()).decode())
"""


def test_a_snapshot_restored_in_a_new_process_gives_the_same_logits_to_the_bit(
    engine: Engine,
) -> None:
    ids = engine.tokenizer.encode_chat([Message(role="user", content="will it rain in Rome")])
    engine.extend(ids[:-1])
    snapshot = base64.b64encode(engine.snapshot())
    wanted = engine.extend(ids)
    run = subprocess.run(
        [sys.executable, "-c", CONTINUE, str(reference.bundle_path("nano-1")),
         ",".join(map(str, ids))],
        input=snapshot, capture_output=True, check=True, env={"PYTHONPATH": ":".join(sys.path)},
    )
    assert base64.b64decode(run.stdout.split()[-1]) == wanted.numpy().tobytes()


def test_a_seed_draws_the_same_tokens_in_two_processes() -> None:
    answers = [
        subprocess.run(
            [sys.executable, "-m", "cloister.cli", "run", "nano-1", "play a song", "--json",
             "--temperature", "1.5", "--seed", "7", "--max-tokens", "40"],
            capture_output=True, check=True, env={"PYTHONPATH": ":".join(sys.path)},
        ).stdout
        for _ in range(2)
    ]
    texts = {json.loads(answer)["text"] for answer in answers}
    assert len(texts) == 1
    assert len(texts.pop()) > 10


def test_log_probabilities_are_those_of_the_logits(engine: Engine) -> None:
    session = Session(engine, system="call")
    tokens = list(session.stream("rate this book 3 stars", max_tokens=8, top=3))
    ids = engine.tokenizer.encode_chat([
        Message(role="system", content="call"),
        Message(role="user", content="rate this book 3 stars"),
    ])
    expected = engine.extend(ids)[0].log_softmax(-1)
    assert tokens[0].logprob == pytest.approx(float(expected.max()), abs=0.01)
    assert tokens[0].top[0][0] == tokens[0].id
    assert len(tokens[0].top) == 3


def test_a_high_temperature_stays_inside_the_vocabulary(engine: Engine) -> None:
    session = Session(engine, system="call")
    sampling = Sampling(temperature=5.0, seed=3)
    ids = [token.id for token in session.stream("hi", max_tokens=50, sampling=sampling)]
    assert all(0 <= id_ < 4096 for id_ in ids)


STOCK = """
import sys
import executorch.kernels.quantized
from executorch.extension.llm.custom_ops import custom_ops
from executorch.extension.llm.runner import GenerationConfig, TextLLMRunner
runner = TextLLMRunner(sys.argv[1], sys.argv[2])
config = GenerationConfig(max_new_tokens=60, temperature=0.0, echo=False)
pieces = []
runner.generate(sys.argv[3], config, token_callback=pieces.append)
open(sys.argv[4], "w").write("".join(pieces))  # the runner itself writes to standard output
"""


def stock_answer(program: Path, tokenizer: Path, prompt: str, answer: Path) -> str:
    """Return what ExecuTorch's own runner answers, by way of the file `answer`."""
    subprocess.run(
        [sys.executable, "-c", STOCK, str(program), str(tokenizer), prompt, str(answer)],
        capture_output=True, check=True, env={"PYTHONPATH": ":".join(sys.path)},
    )
    return answer.read_text()


def test_executorchs_own_runner_gives_our_greedy_text(engine: Engine, tmp_path: Path) -> None:
    path = reference.bundle_path("nano-1")
    for request in ("play some jazz on youtube", "what is the weather in Boston tomorrow"):
        prompt = f"<|system|>call<|end|><|user|>{request}<|end|><|assistant|>"
        session = Session(engine, system="call")
        ours = "".join(token.text for token in session.stream(request))
        theirs = stock_answer(
            path / "program.xnnpack.pte", path / "tokenizer.json", prompt, tmp_path / "answer.txt",
        ).removesuffix("<|end|>")
        assert theirs == ours
        assert ours.isascii()


def with_file(path: Path, name: str, data: bytes) -> Path:
    """A copy at `path` of the shipped Nano-1 with another file, whose hash is right."""
    if not path.exists():
        shutil.copytree(reference.bundle_path("nano-1"), path)
    (path / name).write_bytes(data)
    record = json.loads((path / "manifest.json").read_text())
    record["files"][name] = {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data)}
    (path / "manifest.json").write_text(json.dumps(record))
    return path


def test_a_program_that_is_no_program_is_refused(tmp_path: Path) -> None:
    with pytest.raises(IncompatibleProgram):
        Engine(with_file(tmp_path / "x.cloister", "program.xnnpack.pte", b"\0" * 1000))


LOAD = """
import sys
from pathlib import Path
from cloister.errors import IncompatibleProgram
from cloister.runtime import _executorch
for path in map(Path, sys.argv[1:]):
    try:
        _executorch.load(path, 6)
    except IncompatibleProgram as error:
        assert path.name in str(error)
        print("refused", flush=True)
    else:
        print("loaded", flush=True)
"""


def test_altered_programs_are_refused_by_name_and_never_end_the_process(tmp_path: Path) -> None:
    """These are of those that ended a process that did not check them first."""
    data = (reference.bundle_path("nano-1") / "program.xnnpack.pte").read_bytes()
    rng, paths = random.Random(3), []
    head = int.from_bytes(data[16:24], "little")  # of the flatbuffer, without the constants
    for number in range(40):
        altered = bytearray(data)
        for _ in range(rng.choice((1, 2, 4))):
            at = rng.randrange(8, head)
            altered[at] = rng.choice((0, 255, altered[at] ^ 1 << rng.randrange(8)))
        paths.append(tmp_path / f"{number}.pte")
        paths[-1].write_bytes(altered)
    run = subprocess.run(
        [sys.executable, "-c", LOAD, *map(str, paths)], capture_output=True, text=True,
        check=False, env={"PYTHONPATH": ":".join(sys.path)},
    )
    assert run.returncode == 0, run.stderr[-500:]
    assert len(run.stdout.split()) == len(paths)
    assert run.stdout.count("refused") > 5


def test_a_golden_answer_that_differs_is_found(tmp_path: Path) -> None:
    text = (reference.bundle_path("nano-1") / "golden.jsonl").read_text()
    rows = [json.loads(line) for line in text.splitlines()]
    rows[2]["tokens"][5] += 1
    data = "".join(json.dumps(row) + "\n" for row in rows).encode()
    path = with_file(tmp_path / "x.cloister", "golden.jsonl", data)
    Bundle.open(path).verify()  # whole, but not true
    with pytest.raises(BundleCorrupt, match=r"prompt 3 .* position 5"):
        pipeline.verify(path, Settings.from_environment())


def test_a_prompt_format_that_is_not_the_templates_is_found(tmp_path: Path) -> None:
    template = "{% for m in messages %}<|{{ m.role }}|> {{ m.content }}<|end|>{% endfor %}"
    path = with_file(tmp_path / "x.cloister", "chat_template.jinja", template.encode())
    with pytest.raises(BundleCorrupt, match=r"prompt format .* is not its chat template's"):
        pipeline.verify(path, Settings.from_environment())
