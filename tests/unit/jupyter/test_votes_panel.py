"""A vote is blind: until its end nothing that leaves the kernel tells which tier said what."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tests.unit.jupyter.test_grid import FakeWorker

from cloister.errors import BundleError, CloisterError, SettingError
from cloister.settings import Settings
from cloister.vault import local
from cloister.vault.namespace import Namespace
from cloister_jupyter import grid
from cloister_jupyter.ballot import Ballot, Mark
from cloister_jupyter.cases import Case, Template
from cloister_jupyter.column import Column
from cloister_jupyter.grid_panel import GridPanel
from cloister_jupyter.votes import Cast, Pair, Vote
from cloister_jupyter.votes_panel import VotesPanel

NAMES = ("tier-of-gold", "tier-of-silver", "tier-of-tin")
SAYS = {"tier-of-gold": "shining", "tier-of-silver": "shiny", "tier-of-tin": "shiny"}


class FakeLab:
    """A lab of tiers that there are not, whose messages are kept."""

    def __init__(self, space: Namespace | None, names: tuple[str, ...]) -> None:
        self.space, self.sent, self.recorded = space, list[Any](), set[str]()
        self.badges: list[str] = []
        self.bundles = tuple(Column(id=str(number), name=name, path=Path(name))
                             for number, name in enumerate(names))
        self.panel = VotesPanel(self)  # type: ignore[arg-type]

    def record(self, texts: Any) -> None:
        self.recorded.update(texts)

    def send(self, content: Any) -> None:
        self.sent.append(json.loads(json.dumps(content)))

    def receive(self, kind: str, **values: Any) -> None:
        try:
            self.panel.receive({"type": f"votes.{kind}", **values})
        except CloisterError as error:
            self.panel.send("invalid", message=str(error))

    def prompts(self) -> list[str]:
        return ["asked elsewhere"]

    def send_badge(self) -> None:
        self.badges.append(self.panel.kept)

    def wait(self, kind: str, state: str | None = None) -> Any:
        """The last message, once it is of a kind, and shows a state."""
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline:
            told = [each for each in self.sent if each["type"] != "votes.kept"] or [{"type": ""}]
            if told[-1]["type"] == f"votes.{kind}" and state in (None, told[-1].get("state")):
                return told[-1]
            time.sleep(0.01)
        raise AssertionError(f"there is no {kind} {state}; the last are {self.sent[-3:]}")

    def begin(self, count: int = 6, **changes: Any) -> None:
        self.receive("begin", **{
            "prompts": [f"say {number}" for number in range(count)], "system": "", "name": "",
            "columns": [each.id for each in self.bundles], "max_tokens": 9, **changes})


Make = Callable[..., FakeLab]


@pytest.fixture
def make(monkeypatch: pytest.MonkeyPatch) -> Iterator[Make]:
    """Makes labs, whose workers answer at once with SAYS."""
    made: list[FakeLab] = []

    def worker(bundle: Path, *, vault: bool) -> FakeWorker:
        assert not vault
        name = str(bundle)
        fails = BundleError(f"Bundle {name} is gone; copy it.") if name not in SAYS else None
        return FakeWorker(lambda prompt, sampling: iter((f"{prompt}: ", SAYS[name])),
                          model=hashlib.sha256(name.encode()).hexdigest(), fails=fails)

    monkeypatch.setattr(grid, "Worker", worker)

    def lab(*names: str, space: Namespace | None = None) -> FakeLab:
        made.append(FakeLab(space, names or NAMES[:2]))
        return made[-1]

    yield lab
    for each in made:
        each.panel.close()


@pytest.fixture
def space() -> Iterator[Namespace]:
    with local.open_vault(
        settings=Settings.from_environment(), create=True, notify=lambda notice: None,
    ) as vault:
        yield vault.namespace()


def test_nothing_names_the_tiers_before_the_end_and_then_all_does(make: Make) -> None:
    lab = make()
    lab.begin(12)
    while (state := lab.wait("state"))["state"] != "over":
        if state["state"] == "voting":
            better = "left" if "shining" in state["left"] else "right"
            lab.receive("vote", number=state["voted"], vote=better)
    before = json.dumps(lab.sent)
    for word in (*NAMES, "tier-of", "ttft", "tokens_per_s", "peak", "seed"):
        assert word not in before
    assert "100% of 12 votes prefer the same one" in before  # the names are not, all else is
    assert "enough to tell" in before
    assert lab.panel.results() == []
    assert not any(name in repr(lab.panel._shown.ballot.votes) for name in NAMES)  # type: ignore[union-attr]
    lab.receive("reveal")
    told = lab.wait("revealed")
    assert told["outcome"][0].startswith("tier-of-gold wins 100% of 12 votes against tier-of-sil")
    assert "tier-of-gold is better" in told["outcome"][0]
    assert set(told["took"]) == set(NAMES[:2])
    assert all((each["vote"] == "left") == (each["left"] == "tier-of-gold")
               for each in told["votes"])
    assert {"say 3", "say 3: shiny"} <= lab.recorded
    row = lab.panel.results()[0]
    side = "left" if row["left"] == "tier-of-gold" else "right"
    assert (row["vote"], str(row[f"{side} answer"])[-7:]) == (side, "shining")


def test_sides_and_order_are_drawn_anew_for_every_vote(make: Make) -> None:
    lab, seen = make(), set()
    for _ in range(3):
        lab.begin(20)
        lab.wait("state", "voting")
        sides = [each.left for each in lab.panel._shown.ballot.pairs]  # type: ignore[union-attr]
        assert sides.count("tier-of-gold") == 10
        seen.add(tuple(sides))
        lab.receive("leave")
    assert len(seen) == 3


def test_equal_answers_are_not_shown_and_counted_apart(make: Make) -> None:
    lab = make(*NAMES)
    lab.begin(4)
    state = lab.wait("state", "voting")
    assert (state["pairs"], state["same"], state["lacking"]) == (8, 4, 0)
    assert state["left"] != state["right"]
    lab.receive("reveal")
    outcome = lab.wait("revealed")["outcome"]
    assert sum("which were not shown: 4." in each for each in outcome) == 1
    assert sum("which were not shown: 0." in each for each in outcome) == 2


def test_prompts_are_taken_from_the_other_tabs(make: Make) -> None:
    lab = make()
    lab.receive("take")
    assert lab.wait("taken")["prompts"] == ["asked elsewhere"]
    panel = GridPanel(lab)  # type: ignore[arg-type]
    assert panel.prompts() == []
    cases = tuple(Case(line=n, values={"city": city}) for n, city in enumerate(("Rome", "Oslo")))
    plan = grid.Plan(prompts=(Template("weather in {city}"),), cases=cases)
    panel._run = SimpleNamespace(grid=grid.Grid(plan, {"x": "y"}))  # type: ignore[assignment]
    assert panel.prompts() == ["weather in Rome", "weather in Oslo"]
    panel._run = None
    panel.close()


def test_the_last_vote_is_taken_back_and_a_second_click_votes_on_nothing(make: Make) -> None:
    lab = make()
    lab.begin()
    first = lab.wait("state", "voting")
    lab.receive("vote", number=0, vote="tie")
    lab.receive("vote", number=0, vote="left")
    assert "not shown any more" in lab.wait("invalid")["message"]
    lab.receive("undo")
    again = lab.wait("state", "voting")
    assert {**again, "asked": 0} == {**first, "asked": 0}
    lab.receive("undo")
    assert "no vote to take back" in lab.wait("invalid")["message"]
    lab.receive("reveal")
    for kind in ("undo", "vote"):
        lab.receive(kind, number=0, vote="left")
        assert "names are shown" in lab.wait("invalid")["message"]


def test_a_vote_goes_on_from_the_vault_with_its_answers_and_its_order(
    make: Make, space: Namespace
) -> None:
    lab = make(space=space)
    lab.begin(name="which")
    for number, vote in enumerate(("left", "both bad", "tie")):
        lab.wait("state", "voting")
        lab.receive("vote", number=number, vote=vote)
    lab.receive("undo")
    state = lab.wait("state", "voting")
    lab.panel._thread.shutdown()
    other = make(space=space)
    other.panel.open()
    other.receive("resume", name="which")
    assert other.wait("state", "voting") == state
    assert [each["names"] for each in other.sent if each["type"] == "votes.kept"][-1] == ["which"]
    other.receive("reveal")
    shown = other.wait("revealed")["votes"]
    assert [each["vote"] for each in shown] == ["left", "both bad"]
    other.panel._thread.shutdown()
    third = make(space=space)
    third.receive("resume", name="which")  # who saw the names is not blind another day
    third.wait("revealed")
    third.begin(name="which")
    assert "go on with it" in third.wait("invalid")["message"]
    third.receive("forget", name="which")
    third.receive("resume", name="which")
    assert "no vote of that name" in third.wait("invalid")["message"]
    assert third.panel._kept is not None
    assert third.panel._kept.names() == []
    assert other.badges[0].startswith("1 named vote with")
    assert third.badges[-1] == ""  # the badge has it no more
    lost = make("tier-of-tin", space=space)
    third.begin(name="which")
    third.wait("state", "voting")
    lost.receive("resume", name="which")
    assert "a tier that the lab has not" in lost.wait("invalid")["message"]


def test_stop_ends_the_asking_and_what_is_answered_can_be_voted_on(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    def slow(prompt: str, sampling: Any) -> Iterator[str]:
        time.sleep(0.05)
        yield f"{prompt} {time.monotonic()}"

    monkeypatch.setattr(grid, "Worker", lambda bundle, *, vault: FakeWorker(slow))
    lab = make()
    lab.begin(50)
    deadline = time.monotonic() + 20
    while lab.panel._shown.asked < 53 and time.monotonic() < deadline:  # type: ignore[union-attr]
        time.sleep(0.01)
    lab.receive("vote", number=0, vote="tie")
    lab.wait("invalid")
    lab.receive("stop")
    state = lab.wait("state", "voting")
    assert 3 <= state["pairs"] < 50
    assert state["pairs"] + state["lacking"] == 50


def test_a_tier_that_cannot_be_asked_is_named_at_the_end_alone(make: Make) -> None:
    lab = make("tier-of-gold", "tier-of-lead")
    lab.begin(2)
    state = lab.wait("state", "over")
    assert (state["pairs"], state["lacking"]) == (0, 2)
    assert "tier-of" not in json.dumps(lab.sent)
    lab.receive("reveal")
    assert "is gone" in lab.wait("revealed")["reasons"]["tier-of-lead"]


@pytest.mark.parametrize(("changes", "words"), [
    ({"prompts": []}, "type one a line"), ({"columns": ["0"]}, "two tiers at least"),
    ({"columns": ["0", "9"]}, "choose another"), ({"columns": ["0", "0"]}, "there twice"),
    ({"max_tokens": 0}, "not of its kind"), ({"prompts": ["x" * 70_000]}, "70,000 bytes"),
    ({"prompts": ["x"] * 10_001}, "10,000 pairs at most"),
    ({"name": "kept"}, "give the lab one"), ({"more": 1}, "not of its kind"),
])
def test_what_cannot_be_asked_is_refused_in_a_sentence(
    make: Make, changes: dict[str, Any], words: str
) -> None:
    lab = make()
    lab.begin(**changes)
    assert words in lab.wait("invalid")["message"]
    for kind in ("vote", "surprise", "resume", "undo"):
        lab.receive(kind, name="x", number=0, vote="left")
        assert lab.wait("invalid")["message"].endswith(".")


def test_no_repr_names_a_tier_or_shows_a_text() -> None:
    ballot = Ballot(NAMES, 3, seed=1)
    mark = Mark(item=0, left=NAMES[0], right=NAMES[1], vote=Vote.LEFT)
    cast = Cast(pair=Pair(item=0, left=NAMES[0], right=NAMES[1]), vote=Vote.TIE)
    assert not any(name in repr((ballot, mark, cast)) for name in NAMES)
    with pytest.raises(SettingError):
        Ballot(NAMES[:1], 3, seed=1)
