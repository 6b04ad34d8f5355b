"""Two senses for the reference family: each tier hears, and reads lines.

    python -m cloister.reference.senses --cache RECORDINGS --fonts FONTS --family OUT

OUT is what `reference.build` works in, with the checkpoints of the tiers and the quantized ones;
`--ears` and `--eyes` name other encoders than the family's. To OUT are added:

    OUT/senses/TIER/                 the encoders as they are, for the tier's embeddings
    OUT/multimodal/TIER/             the quantized checkpoint, and both senses quantized
    OUT/multimodal/TIER.cloister/    its bundle, exported, checked and measured
    OUT/TIER.json                    the sizes and the scores, as "senses"

A stage whose result and record stand, made of the same, is not repeated. With `--compare` it is
only measured what a correction gives that is learnt by ear, of labels or of the text teacher.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cloister import pipeline
from cloister.bundle import Bundle, rewrite_receipt
from cloister.distill.sense import SenseSettings
from cloister.errors import SettingError, VocabularyMismatch
from cloister.evaluate.report import evaluate
from cloister.evaluate.subject import BundleSubject
from cloister.files import disk_errors
from cloister.model import checkpoint as checkpoints
from cloister.model import sense_file
from cloister.model.checkpoint import Checkpoint
from cloister.model.device import device
from cloister.model.projector import TokenProjector
from cloister.model.sense_file import SenseFile, SenseKind
from cloister.model.writer import CheckpointWriter
from cloister.progress import silent
from cloister.quantize.encoders import SENSE_RECIPE, SenseReport, quantize_sense
from cloister.reference import (
    clips,
    comparison,
    console,
    ctc,
    encoder_path,
    fonts,
    requests_path,
)
from cloister.reference.build import add_record, read_records
from cloister.reference.mixture import Mixture
from cloister.settings import Settings
from cloister.tiers import Tier, ladder
from cloister.tokenizer import Tokenizer

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from rich.console import Console

    from cloister.distill.sense import Clip
    from cloister.example import Example
    from cloister.model.transformer import Decoder
    from cloister.pieces import MediaFormats
    from cloister.progress import Progress

__all__ = ["Sources", "main"]

_CALIBRATED = 16  # recordings, or pictures, that a sense is rounded for
_DIVIDED = {  # by the score of the same texts, written
    "requests by voices never heard": ("frame_exact", "frame_said"),
    **{f"{task} by camera, {name}": (score,) for task, score in (
        ("redact", "exact"), ("call", "frame_exact")) for name in clips.CAMERA}}


@dataclass(frozen=True, kw_only=True)
class Sources:
    """The folders that the command reads, and how much is taken of them."""

    data: Path
    ears: Path
    eyes: Path
    cache: Path
    fonts: Path
    count: int = 6000  # recordings, and pictures: to round for, and to compare by
    seed: int = 0


class _Builder:
    """The stages, each of which leaves its result in `out`."""

    def __init__(
        self, sources: Sources, out: Path, settings: SenseSettings, progress: Progress = silent
    ) -> None:
        self.sources, self.out, self.settings = sources, out, settings
        self.progress = progress
        self.models = {
            SenseKind.AUDIO: ctc.load(sources.ears), SenseKind.VISION: ctc.load(sources.eyes)}
        self.tokenizer = Tokenizer.from_files(out / "tokenizer.json", out / "chat_template.jinja")
        for kind, model in self.models.items():
            if (model.sense.config.mel is None) != (kind is SenseKind.VISION):
                raise SettingError("EARS or EYES is an encoder of the other; see which is which.")
            if model.vocabulary != self.tokenizer.vocab_size:
                raise VocabularyMismatch(
                    f"The {kind} encoder finds {model.vocabulary} tokens and the family has "
                    f"{self.tokenizer.vocab_size}; train it on the family's.")

    @cached_property
    def mixture(self) -> Mixture:
        """The texts."""
        return Mixture.read(self.sources.data)

    @cached_property
    def formats(self) -> MediaFormats:
        """What every tier takes."""
        return clips.formats(*(
            self.models[kind].sense.config for kind in (SenseKind.VISION, SenseKind.AUDIO)))

    def batches(self, kind: SenseKind) -> Iterator[clips.Batch]:
        """Yield what a sense is rounded for."""
        count, seed = self.sources.count, self.sources.seed
        if kind is SenseKind.VISION:
            faces = fonts.faces(self.sources.fonts, held_out=False)
            return clips.seen(self.mixture, faces, count, seed)
        assert self.formats.recording is not None
        return clips.heard(self.sources.cache, count, self.formats.recording, seed)

    @cached_property
    def clips(self) -> list[Clip]:
        """What is compared by, as the encoder gives it, once for all tiers."""
        return clips.encoded(
            self.batches(SenseKind.AUDIO), self.models[SenseKind.AUDIO].sense, self.tokenizer,
            self.progress, self.sources.count)

    @cached_property
    def spoken(self) -> dict[str, list[Example]]:
        """The recordings that are measured with."""
        people = self.sources.data / "spoken_orders"
        assert self.formats.recording is not None
        return {
            "orders by people": clips.people(people, self.formats, trim=False),
            "orders by people, trimmed": clips.people(people, self.formats, trim=True),
            "requests by voices never heard": clips.spoken(
                self.sources.cache, self.formats.recording)}

    @cached_property
    def measured(self) -> dict[str, list[Example]]:
        """All that is measured with."""
        faces = fonts.faces(self.sources.fonts, held_out=True)
        return self.spoken | clips.shown(self.mixture, faces)

    def decoder(self, tier: Tier) -> Decoder:
        """Return the tier's decoder in full precision, to learn with."""
        decoder = Checkpoint.open(self.out / "checkpoints" / tier).load()
        return decoder.requires_grad_(False).to(device())

    def projector(self, decoder: Decoder) -> TokenProjector:
        """Return the projector of sound, whose correction is 0."""
        made = ctc.token_sense(
            self.models[SenseKind.AUDIO], decoder.config.shape.hidden_size).projector
        assert isinstance(made, TokenProjector)
        made.requires_grad_(False).to(device()).read_with(decoder.embed_tokens)
        return made

    def senses(self, tier: Tier) -> dict[SenseKind, SenseFile]:
        """Return the tier's senses: what is seen or heard, as the tier's own embeddings.

        The correction stays 0. Learnt of what the tier says to the words, it brought answers nearer
        to those, and made fewer of them right.
        """
        folder = self.out / "senses" / tier
        folder.mkdir(parents=True, exist_ok=True)
        size = Checkpoint.open(self.out / "checkpoints" / tier).metadata.config.shape.hidden_size
        for kind, model in self.models.items():
            sense_file.save(folder / kind.file, ctc.token_sense(model, size))
        return {kind: SenseFile.open(folder / kind.file) for kind in self.models}

    def checkpoint(self, tier: Tier) -> Checkpoint:
        """Return the quantized checkpoint with both senses, quantized as well."""
        path, senses = self.out / "multimodal" / tier, self.senses(tier)
        source = Checkpoint.open(self.out / "quantized" / tier)
        assert source.metadata.recipe is not None
        # In 4 bits the encoder of lines reads three times as many characters wrong, that of sound
        # as few as in 8.
        recipes = {
            SenseKind.VISION: SENSE_RECIPE, SenseKind.AUDIO: source.metadata.recipe}
        origin = [source.identity, *(file.identity for file in senses.values()), *recipes.values()]
        if not self._stands(tier, "rounding", origin, path):
            path.parent.mkdir(exist_ok=True)
            reports: list[SenseReport] = []

            def rounded(kind: SenseKind, file: Path) -> None:
                given = [x[:1] for _, x in islice(self.batches(kind), _CALIBRATED)]
                reports.append(quantize_sense(
                    senses[kind], file, recipes[kind], given=given, name=kind,
                    progress=self.progress))

            metadata = replace(source.metadata, parent=source.identity, media=self.formats)
            planned = checkpoints.plan(metadata.config, metadata.schemes)
            with CheckpointWriter(
                path, metadata=metadata, tensors=planned, tokenizer=source.tokenizer_path,
                template=source.template_path, replace=True,
            ).with_senses({kind: partial(rounded, kind) for kind in senses}) as writer:
                for name in planned:
                    writer.add(name, source.tensor(name))
            self._record(tier, "rounding", {"origin": origin, **{
                each.sense: {"recipe": each.recipe, "bytes": each.size_bytes, "error": each.error}
                for each in reports}})
        return Checkpoint.open(path)

    def bundle(self, tier: Tier) -> Path:
        """Return the bundle with both senses, with its scores in the receipt."""
        source, path = self.checkpoint(tier), self.out / "multimodal" / f"{tier}.cloister"
        anew = not path.exists() or Bundle.open(path).manifest.parent != source.identity
        if anew:
            rows = [json.loads(line) for line in requests_path().read_text("utf-8").splitlines()]
            pipeline.export(
                source, path, prompts=[(row["system"], row["prompt"]) for row in rows],
                replace=True, progress=self.progress)
        bundle = Bundle.open(path)
        if anew or not self._stands(tier, "evaluation", [source.identity]):
            subject = BundleSubject(path)
            reports: dict[str, dict[str, Any]] = {}
            for name, examples in self.measured.items():
                self.progress(f"{tier}: {name}")
                reports[name] = evaluate(subject, examples, progress=self.progress).to_dict()
                if name in _DIVIDED:
                    text = evaluate(subject, clips.written(examples), progress=self.progress)
                    reports[f"{name}, written"] = text.to_dict()
            scores = {name: {key: report[key] for key in ("n", "metrics", "errors")}
                      for name, report in reports.items()}
            bundle = rewrite_receipt(bundle, {
                **bundle.receipt(), "evaluations": self._written(tier, source) | scores})
            self._record(tier, "evaluation", {
                "origin": [source.identity], **reports, "divided": _divided(reports)})
        program, = bundle.manifest.programs
        self._record(tier, "bytes", {
            "bundle": bundle.manifest.size_bytes, "program": program.weight_bytes,
            **{each.method: each.weight_bytes for each in program.encoders}})
        return path

    def _written(self, tier: Tier, source: Checkpoint) -> dict[str, Any]:
        """Return the scores of the text bundle, where it was made of the same decoder."""
        path = self.out / "family" / f"{tier}.cloister"
        if not path.exists() or Bundle.open(path).manifest.parent != source.metadata.parent:
            return {}
        scores = Bundle.open(path).receipt().get("evaluations")
        return scores if isinstance(scores, dict) else {}

    def compare(self, tier: Tier) -> None:
        """Record what a correction gives that is learnt by ear."""
        decoder, ear = self.decoder(tier), self.models[SenseKind.AUDIO].sense
        tests = {name: (examples, clips.encoded(
            clips.single(examples, self.formats), ear, self.tokenizer))
            for name, examples in self.spoken.items()}
        self._record(tier, "comparison", comparison.compare(
            lambda: self.projector(decoder), decoder, self.clips, tests, self.settings,
            self.tokenizer, progress=self.progress))

    def _stands(self, tier: Tier, stage: str, origin: Sequence[object], *paths: Path) -> bool:
        """Whether a stage has been done, of the same."""
        done = read_records(self.out, tier).get("senses", {}).get(stage, {})
        return done.get("origin") == origin and all(path.exists() for path in paths)

    def _record(self, tier: Tier, stage: str, record: dict[str, object]) -> None:
        before = read_records(self.out, tier).get("senses", {})
        add_record(self.out, tier, "senses", {**before, stage: record})


def _divided(reports: dict[str, dict[str, Any]]) -> dict[str, dict[str, float | None]]:
    """Return scores divided by those of the same texts, written; None where these are 0."""
    found: dict[str, dict[str, float | None]] = {}
    for name, divided in _DIVIDED.items():
        here, text = (reports[each]["metrics"] for each in (name, f"{name}, written"))
        found[name] = {
            score: here[score] / text[score] if text[score] else None for score in divided}
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return 0, or 1 after one sentence."""
    parser = argparse.ArgumentParser(prog="python -m cloister.reference.senses",
                                     description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Settings.from_environment().data,
                        help="folder of the public data sets (default: CLOISTER_DATA)")
    parser.add_argument("--ears", type=Path, default=encoder_path("ears"),
                        help="of python -m cloister.reference.listener (default: the family's)")
    parser.add_argument("--eyes", type=Path, default=encoder_path("eyes"),
                        help="of python -m cloister.reference.reader (default: the family's)")
    parser.add_argument("--cache", type=Path, required=True,
                        help="recordings of python -m cloister.reference.utterances")
    parser.add_argument("--fonts", type=Path, required=True,
                        help="fonts of python -m cloister.reference.fonts")
    parser.add_argument("--family", type=Path, required=True, metavar="OUT",
                        help="folder of python -m cloister.reference.build")
    parser.add_argument("--tiers", default=",".join(Tier), help="comma-separated (%(default)s)")
    parser.add_argument("--compare", action="store_true",
                        help="only measure what a correction gives that is learnt by ear")
    parser.add_argument("--count", type=int, default=Sources.count,
                        help="recordings, and pictures, to round for and to compare by "
                        "(%(default)s)")
    parser.add_argument("--steps", type=int, default=SenseSettings.steps)
    parser.add_argument("--seed", type=int, default=0)
    return console.run(_senses, parser.parse_args(arguments))


def _senses(given: argparse.Namespace, screen: Console) -> None:
    tiers = [Tier(name) for name in given.tiers.split(",") if ladder()[name]]
    sources = Sources(
        data=console.data(given), ears=given.ears, eyes=given.eyes, cache=given.cache,
        fonts=given.fonts, count=given.count, seed=given.seed)
    builder = _Builder(
        sources, given.family,
        SenseSettings(steps=given.steps, seed=given.seed), console.lines(screen))
    with disk_errors(given.family.name):
        for tier in tiers:
            if given.compare:
                builder.compare(tier)
            else:
                screen.print(f"{tier}: {builder.bundle(tier).name} is ready")


if __name__ == "__main__":
    sys.exit(main())
