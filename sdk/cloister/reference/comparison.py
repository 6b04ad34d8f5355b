"""What the text teacher gives a sense beyond labels, and beyond nothing: the same clips each time.
"""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from dataclasses import replace
from typing import TYPE_CHECKING

from cloister.distill import sense as distillation
from cloister.distill.losses import Objective
from cloister.evaluate.tasks import correct
from cloister.progress import silent
from cloister.reference import clips

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from cloister.distill.sense import Clip, SenseSettings
    from cloister.example import Example
    from cloister.model.projector import TokenProjector
    from cloister.model.transformer import Decoder
    from cloister.progress import Progress
    from cloister.tokenizer import Tokenizer

    Test = tuple[list[Example], list[Clip]]  # each example as a clip, too

__all__ = ["compare", "gain"]

_LIMIT = 128  # tokens of an answer
_FEW = 20  # one in so many clips has a label, where labels are few


def compare(
    begin: Callable[[], TokenProjector], decoder: Decoder, labelled: Sequence[Clip],
    tests: Mapping[str, Test], settings: SenseSettings, tokenizer: Tokenizer, *,
    seeds: Sequence[int] = (0, 1, 2), progress: Progress = silent
) -> dict[str, object]:
    """Return the `gain` on each of `tests` of learning what `decoder` says to the words.

    Over labels of the same clips, over labels of one in 20 of them, since a teacher needs none, and
    over no correction. `begin` makes the projector that each run begins with. Labels teach by
    cross-entropy on them; the teacher by `settings`. Clips to whose words the teacher says
    something without end are left out.
    """
    (end,) = {each.answer[-1] for each in labelled}
    told = clips.answered(labelled, decoder, end)
    kept = {id(each.x_ND) for each in told}
    known = [each for each in labelled if id(each.x_ND) in kept]
    alone = replace(settings, objective=Objective(hard=1.0))
    ways = {"labels": (known, alone), "few labels": (known[::_FEW], alone),
            "nothing learnt": ([], alone), "teacher": (told, settings)}
    right: dict[str, dict[str, list[list[bool]]]] = defaultdict(lambda: defaultdict(list))
    for seed in seeds:
        for way, (data, chosen) in ways.items():
            projector = begin()
            if data:
                distillation.learn(projector, decoder, data, replace(chosen, seed=seed),
                                   teacher=decoder, progress=progress)
            elif seed != seeds[0]:  # the same again
                for each in right.values():
                    each[way].append(each[way][0])
                continue
            for name, (examples, given) in tests.items():
                said = distillation.answers(
                    projector, decoder, given, end=(end,), limit=_LIMIT, progress=progress)
                right[name][way].append(
                    correct(examples, [tokenizer.decode(ids) for ids in said]))
    return {"clips": len(told), "few": len(known[::_FEW]), **{
        f"{name}, over {way}": gain(each[way], each["teacher"])
        for name, each in right.items() for way in ways if way != "teacher"}}


def gain(before: Sequence[Sequence[bool]], after: Sequence[Sequence[bool]]) -> dict[str, object]:
    """Return what is right before and after, a row a run, and the gain with standard errors.

    One over examples, of each the mean of the runs' differences; and one over runs.
    """
    def shares(rows: Sequence[Sequence[bool]]) -> list[float]:
        return [sum(row) / len(row) for row in rows]

    def error(values: Sequence[float]) -> float:
        return statistics.stdev(values) / math.sqrt(len(values))

    differences = [[int(two) - int(one) for one, two in zip(*rows, strict=True)]
                   for rows in zip(before, after, strict=True)]
    by_run = [statistics.mean(row) for row in differences]
    by_example = [statistics.mean(column) for column in zip(*differences, strict=True)]
    return {
        "n": len(by_example), "before": shares(before), "after": shares(after),
        "gain": statistics.mean(by_run), "error_of_examples": error(by_example),
        "error_of_runs": error(by_run)}
