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
from typing import TYPE_CHECKING, NamedTuple

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
from cloister_jupyter.request import LIMIT_BYTES
from cloister_jupyter.turn import TURN, start, take_turn

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
    from pathlib import Path

    from cloister.progress import Progress
    from cloister.runtime.chat import Chat
    from cloister_jupyter.checks import Judge
    from cloister_jupyter.kept import Kept
    from cloister_jupyter.rates import Verdict

__all__ = ["MOST_ANSWERS", "Flips", "Grid", "Plan", "Row", "fold"]

MOST_ANSWERS = 200_000  # of a tier
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

    def passed(self, name: str) -> bool | None:
        """Tell whether every answer of a tier passes; None where one is not judged."""
        outcomes = [each.outcome for each in self.answers.get(name, ())]
        if not outcomes or None in outcomes:
            return None
        return all(each is not None and each.passed for each in outcomes)

    @property
    def fails(self) -> bool:
        """Whether a tier's answer does not pass."""
        return any(self.passed(name) is False for name in self.answers)


class Flips(NamedTuple):
    """Rows that one tier passes and another does not, of `n` that both were judged on."""

    broken: list[Row]
    mended: list[Row]
    n: int


def fold(answers: Sequence[Answer]) -> list[tuple[str, int]]:
    """Return the distinct answers with their counts, the commonest first, then as they came."""
    return Counter(each.text.strip() for each in answers if not each.error).most_common()


class Grid:
    """A plan, asked of tiers. `stop` may be called from any thread, the rest from one at a time.

    Each tier has its own process, and only while it is asked. From the first answer of a run to its
    end nobody else of this Python process is asked (see `runs.TURN`). `judge` judges the answers,
    `kept` keeps them, and `record` is given all texts before it goes anywhere (see
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
        self._stopped, self._over = threading.Event(), False
        self._chat: Chat | None = None
        self._sizes: dict[str, int] = {}  # of bundles, in bytes
        if judge is not None:
            judge.prepare(plan.cases)

    def stop(self) -> None:
        """End the run within a token; the answer that is not whole is dropped.

        Before the first run: it ends at once.
        """
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
        if self._over:
            self._stopped.clear()
        self._over = True
        self.reasons.clear()
        self._record([self.plan.system or "", *map(self.plan.prompt, self.plan.places())])
        if TURN.locked():
            progress(next(iter(self.tiers)), 0, len(self.plan), "waits")
        if not take_turn(self._stopped):
            return
        try:
            for name, bundle in self.tiers.items():
                if self._stopped.is_set():
                    return
                try:
                    yield from self._tier(name, bundle, progress)
                except _GivenUp as error:
                    self.reasons[name] = str(error)
        finally:
            TURN.release()

    def row(self, prompt: int, case: int) -> Row:
        """Return what was answered at a place so far: of each tier every seed's answer, or none."""
        seeds, answers = self.plan.seeds, {}
        for name, said in self.answers.items():
            found = [said[prompt, case, seed] for seed in seeds if (prompt, case, seed) in said]
            if len(found) == len(seeds):
                answers[name] = found
        return Row(prompt=prompt, case=case, answers=answers)

    def rows(
        self, *, prompt: int | None = None, differing: bool = False, failing: bool = False,
    ) -> list[Row]:
        """Return what was answered so far, of one prompt or of all.

        Or of that only where tiers differ, or one fails.
        """
        prompts = range(len(self.plan.prompts)) if prompt is None else (prompt,)
        found = (self.row(each, case) for each in prompts for case in range(len(self.plan.cases)))
        return [row for row in found if row.answers and (row.differs or not differing)
                and (row.fails or not failing)]

    def rates(self, prompt: int = 0) -> dict[str, Rate]:
        """Return each tier's pass rate, the smallest bundle first.

        A case passes where every seed's answer does, and is counted when all are there. An answer
        that failed by the tier's fault, a context too short, does not pass.
        """
        rates, rows = {}, self.rows(prompt=prompt)
        if not self._sizes:
            self._sizes = {name: _size_bytes(bundle) for name, bundle in self.tiers.items()}
        for name in sorted(self.tiers, key=self._sizes.__getitem__):
            passed = [row.passed(name) for row in rows]
            rates[name] = Rate(passed=passed.count(True), n=len(passed) - passed.count(None))
        return rates

    def flips(self, before: str, after: str, prompt: int | None = None) -> Flips:
        """Return the rows that only `before` passes, and those that only `after` does."""
        broken, mended, n = [], [], 0
        for row in self.rows(prompt=prompt):
            one, other = row.passed(before), row.passed(after)
            n += one is not None and other is not None
            if (one, other) == (True, False):
                broken.append(row)
            elif (one, other) == (False, True):
                mended.append(row)
        return Flips(broken=broken, mended=mended, n=n)

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
            said.copy().items(), key=lambda item: (item[0][:2], item[0][2] or 0))]

    def verdict(self, wanted: float, prompt: int = 0) -> Verdict:
        """Say which tier is the smallest that passes a share of the cases; see `rates.verdict`."""
        return verdict(self.rates(prompt), wanted)

    def _tier(self, name: str, bundle: str | Path, progress: Progress) -> Iterator[Answer]:
        worker = self._worker(bundle)
        progress(name, 0, len(self.plan), "loading")
        try:
            loading = start(worker, self._stopped)
        except CloisterError as error:
            raise _GivenUp(str(error)) from None
        try:
            if loading is None:
                yield from self._asked(worker, name, progress)
        finally:
            if self._stopped.is_set():  # to load goes on behind, and a process takes time to end
                threading.Thread(target=_end, args=(worker, loading), daemon=True).start()
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
            if found is None:
                left.append(place)
                continue
            heard = self._heard(found)
            if heard is None:
                return
            yield heard
        deaths = 0
        for done, place in enumerate(left, start=total - len(left)):
            progress(name, done, total)
            answer = self._ask(worker, name, place)
            if answer is None:
                return
            if self._kept is not None and not answer.error:
                self._kept.put(self.plan.key(place, model), answer)
            heard = self._heard(answer)
            if heard is None:
                return
            yield heard
            deaths = deaths + 1 if answer.error == WorkerError.__name__ else 0
            if deaths == _DEATHS:
                raise _GivenUp("Its process died twice in a row; run the grid again.")
        progress(name, total, total)

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

    def _heard(self, answer: Answer) -> Answer | None:
        """Judge an answer, and note it; None where the run was stopped meanwhile."""
        if self._judge is not None:
            outcome = self._judge.judge(
                self.plan.cases[answer.place[1]], answer.text, self._stopped)
            if self._stopped.is_set():
                return None
            if answer.error and outcome is not None:  # what a dead process would say is not known
                outcome = None if answer.error == WorkerError.__name__ else (
                    Outcome(False, answer.error))
            answer = replace(answer, outcome=outcome)
        self.answers[answer.tier][answer.place] = answer
        return answer


def _end(worker: Worker, loading: threading.Thread | None) -> None:
    if loading is not None:
        loading.join()
    worker.close()


class _GivenUp(Exception):
    """A tier that is not asked any more; its words are for the user."""


def _size_bytes(bundle: str | Path) -> int:
    """Return the size of a bundle's files; of one that cannot be read, more than any other's."""
    try:
        return Bundle.open(bundle).manifest.size_bytes
    except CloisterError:
        return sys.maxsize
