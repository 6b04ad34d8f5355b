"""Prompts x cases x seeds, asked of one tier after the other, unattended.

What a tier answered is kept as soon as it is whole, where there is a vault: a grid that was stopped
or killed goes on from there. An answer is taken up again for the same model, prompt, system prompt
and sampling alone. A tier that cannot be asked says why, and the others go on.
"""

from __future__ import annotations

import hashlib
import sys
import threading
from collections import Counter
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING

import msgspec

from cloister.bundle import Bundle
from cloister.errors import CloisterError, SettingError, WorkerError
from cloister.progress import silent
from cloister.runtime.chat import Sampling
from cloister.runtime.client import Worker
from cloister_jupyter.cases import Case, Template
from cloister_jupyter.checks import Outcome
from cloister_jupyter.kept import TOOK, Answer, Place
from cloister_jupyter.rates import Rate, verdict
from cloister_jupyter.runs import LIMIT_BYTES

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
    from pathlib import Path

    from cloister.progress import Progress
    from cloister.runtime.chat import Chat
    from cloister_jupyter.checks import Judge
    from cloister_jupyter.kept import Kept
    from cloister_jupyter.rates import Verdict

__all__ = ["MOST_ANSWERS", "Grid", "Plan", "Row", "fold"]

MOST_ANSWERS = 200_000  # of a tier
_LOOK_S = 0.02  # how often a wait looks whether it is to stop
_DEATHS = 2  # of a tier's process in a row, and the tier is given up


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What every tier is asked. Its repr shows no text.

    Raises:
        SettingError: there is no prompt or seed, or a seed twice; or several seeds where sampling
            is greedy, and gives one answer only; or more than MOST_ANSWERS a tier.
        DataError: a case has no value for a variable; both are named.
    """

    prompts: tuple[Template, ...] = field(repr=False)
    cases: tuple[Case, ...] = field(default=(Case(line=1, values={}),), repr=False)
    seeds: tuple[int | None, ...] = (None,)
    system: str | None = field(default=None, repr=False)
    sampling: Sampling = field(default_factory=Sampling)
    max_tokens: int = 256

    def __post_init__(self) -> None:
        if not (self.prompts and self.cases and self.seeds):
            raise SettingError("A grid needs a prompt, a case and a seed at least; give them.")
        if len(set(self.seeds)) < len(self.seeds):
            raise SettingError("A seed is there twice; each gives one answer.")
        if len(self.seeds) > 1 and not self.sampling.temperature:
            raise SettingError(
                "At temperature 0 every seed gives the same answer; raise it, or take one seed.")
        if len(self) > MOST_ANSWERS:
            raise SettingError(
                f"The grid has {len(self):,} answers a tier and at most {MOST_ANSWERS:,} are "
                "asked for; take fewer cases, prompts or seeds.")
        for seed in self.seeds:
            replace(self.sampling, seed=seed)
        for place in self.places():
            size = len(self.prompt(place).encode())
            if size > LIMIT_BYTES:
                raise SettingError(
                    f"The prompt of line {self.cases[place[1]].line} has {size:,} bytes and a "
                    f"tier is asked {LIMIT_BYTES:,} at most; shorten it.")

    def __len__(self) -> int:
        return len(self.prompts) * len(self.cases) * len(self.seeds)

    def places(self) -> Iterator[Place]:
        """Yield every place, the seeds of a case in a row, and its prompts after each other."""
        for prompt in range(len(self.prompts)):
            for case in range(len(self.cases)):
                for seed in self.seeds:
                    yield prompt, case, seed

    def prompt(self, place: Place) -> str:
        """Return what is asked at a place."""
        return self.prompts[place[0]].render(self.cases[place[1]])

    def key(self, place: Place, model_id: str) -> str:
        """Return the hash of all that decides the answer at a place: sealed, or never kept."""
        inputs = [model_id, self.system, self.prompt(place), self.max_tokens,
                  asdict(replace(self.sampling, seed=place[2]))]
        return hashlib.sha256(msgspec.json.encode(inputs)).hexdigest()


@dataclass(frozen=True, kw_only=True)
class Row:
    """What the tiers answered to a prompt filled with a case: of each, one answer a seed."""

    prompt: int
    case: int
    answers: Mapping[str, Sequence[Answer]]

    @property
    def differs(self) -> bool:
        """Whether two tiers gave other sets of answers, but for outer spaces."""
        sets = {frozenset(text for text, _ in fold(each)) for each in self.answers.values()}
        return len(sets) > 1


def fold(answers: Sequence[Answer]) -> list[tuple[str, int]]:
    """Return the distinct answers with their counts, the commonest first, then as they came."""
    return Counter(each.text.strip() for each in answers if not each.error).most_common()


class Grid:
    """A plan, asked of tiers. `stop` may be called from any thread, the rest from one at a time.

    Each tier has its own process, and only while it is asked. `judge` judges the answers, `kept`
    keeps them, and `record` is given all texts before it goes anywhere (see
    `cloister.audit.notebook`).
    """

    def __init__(
        self, plan: Plan, tiers: Mapping[str, str | Path], *, judge: Judge | None = None,
        kept: Kept | None = None, record: Callable[[Iterable[str]], object] = lambda texts: None,
        worker: Callable[[str | Path], Worker] | None = None,
    ) -> None:
        """Say what is asked of which bundles, by the names to show.

        Raises:
            SettingError: there is no tier; or see `Judge.prepare`.
        """
        if not tiers:
            raise SettingError("A grid needs a tier; choose one.")
        self.plan, self.tiers = plan, dict(tiers)
        self.reasons: dict[str, str] = {}  # of tiers that were given up, in words
        self.answers: dict[str, dict[Place, Answer]] = {name: {} for name in tiers}
        self._judge, self._kept, self._record = judge, kept, record
        self._worker = worker or (lambda bundle: Worker(bundle, vault=False))
        self._stopped = threading.Event()
        self._chat: Chat | None = None
        self._sizes: dict[str, int] = {}  # of bundles, in bytes
        if judge is not None:
            judge.prepare(plan.cases)

    def stop(self) -> None:
        """End the run within a token; the answer that is not whole is dropped."""
        self._stopped.set()
        if (chat := self._chat) is not None:
            chat.stop()

    @property
    def stopped(self) -> bool:
        """Whether the last run was stopped before its end."""
        return self._stopped.is_set()

    def run(self, progress: Progress = silent) -> Iterator[Answer]:
        """Ask the tiers, and yield each answer as it comes, those first that were kept before.

        Who drops the iterator ends the run as `stop` does. What failed is asked again.

        Raises:
            NotEnoughDisk, VaultError: an answer cannot be kept.
        """
        self._stopped.clear()
        self.reasons.clear()
        self._record([self.plan.system or "", *map(self.plan.prompt, self.plan.places())])
        for name, bundle in self.tiers.items():
            if self._stopped.is_set():
                return
            try:
                yield from self._tier(name, bundle, progress)
            except _GivenUp as error:
                self.reasons[name] = str(error)

    def rows(self, *, differing: bool = False) -> list[Row]:
        """Return what was answered so far, or only where tiers differ: whole rows only."""
        found, seeds = [], self.plan.seeds
        for prompt, case, seed in self.plan.places():
            if seed != seeds[0]:
                continue
            answers = {
                name: [said[prompt, case, each] for each in seeds if (prompt, case, each) in said]
                for name, said in self.answers.items()}
            row = Row(prompt=prompt, case=case, answers={
                name: each for name, each in answers.items() if len(each) == len(seeds)})
            if row.answers and (row.differs or not differing):
                found.append(row)
        return found

    def rates(self, prompt: int = 0) -> dict[str, Rate]:
        """Return each tier's pass rate, the smallest bundle first.

        A case passes where every seed's answer does, and is counted when all are there. An answer
        that failed by the tier's fault, a context too short, does not pass.
        """
        rates, rows = {}, [row for row in self.rows() if row.prompt == prompt]
        if not self._sizes:
            self._sizes = {name: _size_bytes(bundle) for name, bundle in self.tiers.items()}
        for name in sorted(self.tiers, key=self._sizes.__getitem__):
            passed = [_passed(row.answers.get(name, ())) for row in rows]
            rates[name] = Rate(passed=passed.count(True), n=len(passed) - passed.count(None))
        return rates

    def flips(self, before: str, after: str) -> tuple[list[Row], list[Row]]:
        """Return the rows that only `before` passes, and those that only `after` does."""
        broken, mended = [], []
        for row in self.rows():
            one, other = (_passed(row.answers.get(name, ())) for name in (before, after))
            if (one, other) == (True, False):
                broken.append(row)
            elif (one, other) == (False, True):
                mended.append(row)
        return broken, mended

    def table(self) -> list[dict[str, object]]:
        """Return a record for each answer, for a file: it holds the texts."""
        return [{
            "tier": name, "prompt": place[0] + 1, "line": self.plan.cases[place[1]].line,
            "seed": place[2], "asked": self.plan.prompt(place),
            "expected": self.plan.cases[place[1]].expected, "answer": each.text,
            "passed": each.outcome.passed if each.outcome else None,
            "why": each.outcome.why if each.outcome else "", "error": each.error,
            **{key: getattr(each, key) for key in TOOK},
        } for name, said in self.answers.items() for place, each in sorted(
            said.items(), key=lambda item: (item[0][:2], item[0][2] or 0))]

    def verdict(self, wanted: float, prompt: int = 0) -> Verdict:
        """Say which tier is the smallest that passes a share of the cases; see `rates.verdict`."""
        return verdict(self.rates(prompt), wanted)

    def _tier(self, name: str, bundle: str | Path, progress: Progress) -> Iterator[Answer]:
        worker = self._worker(bundle)
        progress(name, 0, len(self.plan), "loading")
        if not self._start(worker):
            return
        try:
            yield from self._asked(worker, name, progress)
        finally:
            if self._stopped.is_set():  # a process takes a second to end
                threading.Thread(target=worker.close, daemon=True).start()
            else:
                worker.close()

    def _asked(self, worker: Worker, name: str, progress: Progress) -> Iterator[Answer]:
        assert worker.loaded is not None
        model, left, total = worker.loaded.model_id, list[Place](), len(self.plan)
        for place in self.plan.places():
            known = self.answers[name].get(place)
            if known is not None and not known.error:
                continue
            found = self._kept_answer(name, place, model)
            if found is not None:
                yield self._heard(found)
            else:
                left.append(place)
        deaths = 0
        for done, place in enumerate(left, start=total - len(left)):
            progress(name, done, total)
            answer = self._ask(worker, name, place)
            if answer is None:
                return
            if self._kept is not None and not answer.error:
                self._kept.put(self.plan.key(place, model), answer)
            yield self._heard(answer)
            deaths = deaths + 1 if answer.error == WorkerError.__name__ else 0
            if deaths == _DEATHS:
                raise _GivenUp("Its process died twice in a row; run the grid again.")
        progress(name, total, total)

    def _start(self, worker: Worker) -> bool:
        """Load a tier; False where the run was stopped before that.

        Loading cannot be interrupted: it ends behind, and its process with it.
        """
        failures: list[BaseException] = []

        def start() -> None:
            try:
                worker.start()
            except BaseException as error:
                failures.append(error)

        def end() -> None:
            loading.join()
            worker.close()

        loading = threading.Thread(target=start, daemon=True)
        loading.start()
        while loading.is_alive():
            loading.join(_LOOK_S)
            if self._stopped.is_set():
                threading.Thread(target=end, daemon=True).start()
                return False
        if failures and isinstance(failures[0], CloisterError):
            raise _GivenUp(str(failures[0]))
        if failures:
            raise failures[0]
        return True

    def _kept_answer(self, name: str, place: Place, model: str) -> Answer | None:
        if self._kept is None:
            return None
        return self._kept.get(self.plan.key(place, model), name, place)

    def _ask(self, worker: Worker, name: str, place: Place) -> Answer | None:
        """Return the answer at a place, or which error it failed with; None where it is stopped."""
        text, error = "", ""
        chat = None
        try:
            chat = self._chat = worker.session(system=self.plan.system)
            if not self._stopped.is_set():  # else there was nothing yet that `stop` could stop
                for token in chat.stream(
                    self.plan.prompt(place), max_tokens=self.plan.max_tokens,
                    sampling=replace(self.plan.sampling, seed=place[2]),
                ):
                    text += token.text
                    if self._stopped.is_set():
                        break
        except CloisterError as failure:
            error = type(failure).__name__
        finally:
            self._chat = None
            if chat is not None:
                with suppress(CloisterError):
                    chat.close()
        self._record([text])
        if self._stopped.is_set():
            return None
        if chat is None or error:
            return Answer(tier=name, place=place, text=text, error=error)
        stats = chat.stats
        return Answer(
            tier=name, place=place, text=text, finish=stats.finish, tokens=stats.tokens,
            ttft_s=stats.ttft_s, decode_tokens_per_s=stats.decode_tokens_per_s,
            peak_rss_bytes=stats.peak_rss_bytes)

    def _heard(self, answer: Answer) -> Answer:
        """Judge an answer, and note it."""
        if self._judge is not None:
            outcome = self._judge.judge(self.plan.cases[answer.place[1]], answer.text)
            if answer.error and outcome is not None:  # what a dead process would say is not known
                outcome = None if answer.error == WorkerError.__name__ else (
                    Outcome(False, answer.error))
            answer = replace(answer, outcome=outcome)
        self.answers[answer.tier][answer.place] = answer
        return answer


def _passed(answers: Sequence[Answer]) -> bool | None:
    """Tell whether the answers of every seed pass; None where one is not judged."""
    outcomes = [each.outcome for each in answers]
    if not outcomes or None in outcomes:
        return None
    return all(each is not None and each.passed for each in outcomes)


class _GivenUp(Exception):
    """A tier that is not asked any more; its words are for the user."""


def _size_bytes(bundle: str | Path) -> int:
    """Return the size of a bundle's files; of one that cannot be read, more than any other's."""
    try:
        return Bundle.open(bundle).manifest.size_bytes
    except CloisterError:
        return sys.maxsize
