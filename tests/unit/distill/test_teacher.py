"""A teacher's draws are unbiased, small, and survive what befalls a disk."""

import os
import random
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from cloister.distill.data import batch
from cloister.distill.loop import train
from cloister.distill.losses import Objective, forward_kl, sampled_cross_entropy
from cloister.distill.schedule import OnPolicy, Schedule, TrainSettings
from cloister.distill.teacher import Draws, FileStore, Sampled, decode, draw, encode, record
from cloister.errors import LossNotFinite, NotEnoughDisk, SettingError, TrainingError
from cloister.model.config import ModelConfig
from cloister.model.transformer import Decoder
from cloister.pairs import Pair
from cloister.tiers import Shape

HERE = Path(__file__)
SHAPE = Shape(vocab_size=64, hidden_size=16, layers=1, heads=2, kv_heads=1, head_size=8,
              feed_forward=32, context=64, tied=True)
HEADER = {"teacher": "abc", "vocabulary": 64, "draws": 16, "seed": 0}


def teacher(seed: int = 0) -> Decoder:
    decoder = Decoder(ModelConfig(shape=SHAPE)).eval()
    generator = torch.Generator().manual_seed(seed)
    for parameter in decoder.parameters():
        torch.nn.init.normal_(parameter, std=0.4, generator=generator)
    return decoder


def some(count: int) -> list[Pair]:
    rng = random.Random(0)
    return [
        ([rng.randrange(1, 64) for _ in range(rng.randint(1, 12))],
         [rng.randrange(1, 64) for _ in range(rng.randint(1, 12))]) for _ in range(count)
    ]


DATA = some(60)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_the_mean_of_many_draws_is_the_teachers_distribution() -> None:
    """Within five standard errors at each of 64 tokens; the likeliest alone would be far off."""
    logits = torch.randn(3, 64, generator=generator(1)) * 2
    chances, rounds = logits.softmax(-1), 4000
    mean = torch.zeros_like(chances)
    for seed in range(rounds):
        made = draw(logits, 12, generator(seed))
        mean.scatter_add_(-1, made.ids, made.weights / rounds)
    error = (chances * (1 - chances) / (12 * rounds)).sqrt()
    assert ((mean - chances).abs() < 5 * error + 1e-7).all()
    top = torch.where(chances >= chances.topk(12).values[:, -1:], chances, 0)
    top /= top.sum(-1, keepdim=True)
    assert ((top - chances).abs() > 5 * error + 1e-7).any()


def test_the_mean_loss_on_draws_has_the_gradient_of_the_divergence() -> None:
    target, student = (torch.randn(4, 64, generator=generator(s)) for s in (1, 2))
    exact, drawn = student.clone().requires_grad_(), student.clone().requires_grad_()
    torch.autograd.backward(forward_kl(exact.log_softmax(-1), target.log_softmax(-1)))
    for seed in range(2000):
        torch.autograd.backward(
            sampled_cross_entropy(drawn.log_softmax(-1), draw(
                target, 16, generator(seed))) / 2000)
    assert exact.grad is not None
    assert drawn.grad is not None
    assert (exact.grad - drawn.grad).norm() < 0.05 * exact.grad.norm()


@pytest.mark.parametrize("vocabulary", [64, 65_536, 65_537, 150_000])
@pytest.mark.parametrize("draws", [1, 16, 255])
def test_draws_come_back_as_they_were_kept(vocabulary: int, draws: int) -> None:
    logits = torch.randn(5, vocabulary, generator=generator(2)) * 3
    logits[0] = 0
    logits[0, vocabulary - 1] = 100  # all draws alike
    made = draw(logits, draws, generator(3))
    assert made.ids[0, 0] == vocabulary - 1
    torch.testing.assert_close(made.weights.sum(-1), torch.ones(5))
    data = encode(made, draws, vocabulary)
    back = decode(data, 5, vocabulary)
    assert torch.equal(back.ids, made.ids * (made.weights > 0))
    torch.testing.assert_close(back.weights, made.weights)
    assert len(data) <= 5 * (1 + draws * (3 if vocabulary <= 65_536 else 5))


def test_sixteen_draws_of_4096_tokens_take_at_most_60_bytes_a_token() -> None:
    made = draw(torch.zeros(100, 4096), 16, generator(0))  # nothing is likelier than anything
    assert len(encode(made, 16, 4096)) <= 100 * 60


def recorded(path: Path, data: list[Pair] = DATA) -> FileStore:
    store = FileStore(path, header=HEADER)
    record(teacher(), data, store, draws=16, tokens=64)
    return store


def test_draws_are_the_teachers_at_the_answers(tmp_path: Path) -> None:
    """With many draws, the shares are the probabilities that the teacher alone gives."""
    store = FileStore(tmp_path / "logits", header=HEADER)
    record(teacher(), DATA[:8], store, draws=255, tokens=64)
    sampled = Sampled(store, DATA, 64)
    for key in range(8):
        prompt, answer = DATA[key]
        with torch.no_grad():
            chances = teacher()(torch.tensor([prompt + answer]))[0].softmax(-1)
        wanted = chances[len(prompt) - 1:-1]
        got = sampled.targets([key])
        dense = torch.zeros_like(wanted).scatter_add_(-1, got.ids, got.weights)
        error = (wanted * (1 - wanted) / 255).sqrt()
        assert ((dense - wanted).abs() < 6 * error + 0.01).all()
    both = sampled.targets([5, 2])
    assert len(both.ids) == len(DATA[5][1]) + len(DATA[2][1])
    one = sampled.targets([2])
    assert torch.equal(both.ids[len(DATA[5][1]):, :one.ids.shape[1]], one.ids)


def test_a_recording_cut_at_any_byte_goes_on_to_the_same_file(tmp_path: Path) -> None:
    recorded(tmp_path / "whole")
    whole = (tmp_path / "whole").read_bytes()
    rng = random.Random(1)
    last = range(len(whole) - 80, len(whole))
    for size in [*last, *(rng.randrange(len(whole)) for _ in range(12))]:
        (tmp_path / "cut").write_bytes(whole[:size])
        recorded(tmp_path / "cut")
        assert (tmp_path / "cut").read_bytes() == whole, size


@pytest.mark.parametrize("place", [0.3, 0.6, 0.95])
def test_a_damaged_record_and_what_follows_it_are_made_again(
    tmp_path: Path, place: float
) -> None:
    recorded(tmp_path / "logits")
    whole = bytearray((tmp_path / "logits").read_bytes())
    damaged = bytearray(whole)
    damaged[int(len(whole) * place)] ^= 0x10
    (tmp_path / "logits").write_bytes(damaged)
    recorded(tmp_path / "logits")
    assert (tmp_path / "logits").read_bytes() == whole


@pytest.mark.slow
def test_a_process_killed_while_recording_goes_on_to_the_same_file(tmp_path: Path) -> None:
    recorded(tmp_path / "whole", some(400))
    whole = (tmp_path / "whole").read_bytes()
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    command, cut = [sys.executable, str(HERE), str(tmp_path / "cut")], tmp_path / "cut"
    for share in (0.0, 0.2, 0.4):
        process = subprocess.Popen([*command, "slowly"], env=environment)
        while not cut.exists() or cut.stat().st_size <= share * len(whole):
            assert process.poll() is None
            time.sleep(0.001)
        process.kill()
        process.wait()
        assert 0 < cut.stat().st_size < len(whole)
    subprocess.run(command, env=environment, check=True)
    assert cut.read_bytes() == whole


def test_a_full_disk_is_named_and_what_was_whole_stays(tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # the write fails instead
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4000, hard))
        with pytest.raises(NotEnoughDisk, match="logits"):
            recorded(tmp_path / "logits")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)
    kept = FileStore(tmp_path / "logits", header=HEADER)
    assert 3 < sum(key in kept for key in range(60)) < 60
    recorded(tmp_path / "logits")
    recorded(tmp_path / "again")
    assert (tmp_path / "logits").read_bytes() == (tmp_path / "again").read_bytes()


@pytest.mark.parametrize(("header", "said"), [
    ({**HEADER, "teacher": "other"}, "another teacher"),
    ({**HEADER, "draws": 12, "seed": 1}, "another draws and seed"),
])
def test_another_runs_records_are_refused_by_what_differs(
    tmp_path: Path, header: dict[str, str | int], said: str
) -> None:
    recorded(tmp_path / "logits")
    before = (tmp_path / "logits").read_bytes()
    with pytest.raises(SettingError, match=said):
        FileStore(tmp_path / "logits", header=header)
    assert (tmp_path / "logits").read_bytes() == before


def test_a_file_of_something_else_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "logits").write_bytes(b"my thesis" * 100)
    with pytest.raises(SettingError, match="something else"):
        FileStore(tmp_path / "logits", header=HEADER)
    assert (tmp_path / "logits").read_bytes() == b"my thesis" * 100


def test_what_is_not_recorded_is_named_by_number(tmp_path: Path) -> None:
    store = recorded(tmp_path / "logits", DATA[:3])
    with pytest.raises(TrainingError, match="Example 10"):
        Sampled(store, DATA, 64).targets([9])
    with pytest.raises(TrainingError, match="does not fit"):
        decode(store.get(0), len(DATA[0][1]) + 1, 64)


@pytest.mark.parametrize("draws", [0, 256, -1])
def test_draws_out_of_bounds_are_refused(tmp_path: Path, draws: int) -> None:
    with pytest.raises(SettingError, match="draws is"):
        record(teacher(), DATA, FileStore(tmp_path / "x", header=HEADER), draws=draws)


def test_a_teacher_that_gives_nan_is_refused(tmp_path: Path) -> None:
    broken = teacher()
    with torch.no_grad():
        broken.norm.weight[0] = float("nan")
    with pytest.raises(LossNotFinite, match="teacher"):
        record(broken, DATA, FileStore(tmp_path / "x", header=HEADER))


@pytest.mark.slow
def test_a_student_learns_from_draws_what_it_learns_from_the_teacher(tmp_path: Path) -> None:
    data, held = some(900)[:800], some(900)[800:]
    schedule = Schedule(steps=120, tokens=512, micro=256, warmup=5, peak=1e-2)
    sampled = Sampled(recorded(tmp_path / "logits", data), data, 64)
    apart = {}
    for name, guide in (("none", None), ("online", teacher()), ("draws", sampled)):
        student = Decoder(ModelConfig(shape=SHAPE))
        student.initialize(1)
        (tmp_path / name).mkdir()
        objective = Objective(hard=0.0 if guide else 1.0)
        train(student, data, TrainSettings(schedule=schedule, objective=objective),
              tmp_path / name, teacher=guide)
        made = batch(held, 64, [[key] for key in range(100)])
        learnt = made.labels_BT != -100
        with torch.no_grad():
            p, q = (m(made.tokens_BT)[learnt].log_softmax(-1) for m in (teacher(), student))
        apart[name] = float(forward_kl(q, p)) / len(p)
    assert apart["draws"] - apart["online"] < 0.15 * (apart["none"] - apart["online"])


def test_draws_serve_no_other_objective_and_no_own_answers(tmp_path: Path) -> None:
    sampled = Sampled(recorded(tmp_path / "logits"), DATA, 64)
    student = Decoder(ModelConfig(shape=SHAPE))
    schedule = Schedule(steps=2, tokens=128, micro=64)
    with pytest.raises(SettingError, match="forward KL"):
        train(student, DATA, TrainSettings(
            schedule=schedule, objective=Objective(hard=0.5, temperature=2.0)),
            tmp_path, teacher=sampled)
    with pytest.raises(SettingError, match="need a teacher that reads them"):
        train(student, DATA, TrainSettings(schedule=schedule, on_policy=OnPolicy()),
              tmp_path, teacher=sampled)


def test_draws_can_be_sliced_and_moved() -> None:
    made = Draws(torch.arange(6).view(3, 2), torch.ones(3, 2) / 2)
    assert made[1:].ids.tolist() == [[2, 3], [4, 5]]
    assert torch.equal(made.to(torch.device("cpu")).weights, made.weights)


if __name__ == "__main__":
    if sys.argv[2:]:
        put = FileStore.put
        FileStore.put = lambda *given: (time.sleep(0.005), put(*given))[1]  # so that it can be cut
    recorded(Path(sys.argv[1]), some(400))
