"""What 4 bits cost a model that nobody trains again, by each way of rounding, on the same texts.

    python tests/bench/fourbit.py MODEL --data DIR [--steps N] [--tokens 1024] [--micro 1024]
        [--rate R [R ...]] [--out DIR]

MODEL is a GGUF file or a Hugging Face directory. Measured on the packaged
conversations of the export check, and on the first 384 tokens of 8 validation tales of FairytaleQA:
KL divergence from the unquantized model a token, and the share of tokens with the same most likely
next one. `Q4_0` is llama.cpp's rounding of the same matrices (by the gguf package; without its
rounding of activations, embedding and head in 8 bits as ours). With `--steps` the calibrated
weights are trained on the model's own samples, at each rate. `OUT/fourbit.json` has every figure;
the checkpoints stay in OUT, and are not made again.
"""

from __future__ import annotations

import argparse
import json
import platform
import shutil
import time
from pathlib import Path
from typing import TYPE_CHECKING

import gguf
import torch
from torch import nn
from torch.nn import functional

from cloister import Checkpoint, QatSettings, Schedule, display, import_model, quantize
from cloister.distill.examples import SELF
from cloister.distill.run import run_folder
from cloister.evaluate.divergence import compare
from cloister.export.check import conversations
from cloister.model.device import device
from cloister.model.recipe import DEFAULT_RECIPE, Recipe
from cloister.quantize.calibrate import Calibration, smooth
from cloister.quantize.texts import calibration_texts
from cloister.tokenizer import Tokenizer
from cloister_kernels.reference import fake_quantize_rows

if TYPE_CHECKING:
    from collections.abc import Callable

    from cloister.model.transformer import Decoder
    from cloister.progress import Progress

    Texts = list[list[int]]

TALES, TOKENS = 8, 384


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--data", type=Path, required=True, help="folder of the public data sets")
    parser.add_argument("--steps", type=int, default=0, help="of training, after calibration")
    parser.add_argument("--tokens", type=int, default=1024, help="a step")
    parser.add_argument("--micro", type=int, default=1024, help="tokens at a time")
    parser.add_argument("--rate", type=float, nargs="+", default=[2e-5])
    parser.add_argument("--out", type=Path, default=Path("fourbit"))
    given = parser.parse_args()
    given.out.mkdir(exist_ok=True)
    with display.quiet(debug=False) as console, display.progress(console, "4 bits") as progress:
        source = _made(given.out / "plain", lambda out: import_model(given.model, out))
        ways: dict[str, tuple[Checkpoint, Callable[[Decoder], None]]] = {
            "8-bit activations alone": (source, _activations),
            "8-bit activations alone, rotated and smoothed": (source, _turned(source, progress)),
            "Q4_0's weights": (source, _q4_0),
        }
        seconds = {}
        options_of = {
            "rounded by itself": {}, "calibrated": {"calibrate": "self"},
            "calibrated, down in 8 bits": {"calibrate": "self", "recipe": "8da4w-g32-d8"}}
        for rate in given.rate if given.steps else ():
            options_of[f"calibrated, trained {given.steps} steps at {rate:g}"] = {
                "calibrate": "self", "settings": QatSettings(schedule=Schedule(
                    steps=given.steps, tokens=given.tokens, micro=given.micro, peak=rate,
                    warmup=given.steps // 10))}
        for name, options in options_of.items():
            begun, out = time.perf_counter(), given.out / name.replace(" ", "-").replace(",", "")
            if "settings" in options and not out.exists():  # from there, not calibrated again
                shutil.copytree(given.out / "calibrated", run_folder(out) / "calibrated",
                                dirs_exist_ok=True)
            made = _made(out, lambda out: quantize(
                source, out, progress=progress, **options))  # noqa: B023
            ways[name], seconds[name] = (made, _as_it_is), time.perf_counter() - begun
        texts = read_texts(source, given.data)
        plain = source.load().to(device())
        exact = {kind: logits(plain, each) for kind, each in texts.items()}
        figures = {}
        for done, (name, (checkpoint, change)) in enumerate(ways.items()):
            progress("measure", done, len(ways), name)
            decoder = checkpoint.load()
            change(decoder)
            decoder.to(device())
            figures[name] = {kind: compare(zip(exact[kind], logits(decoder, each), strict=True))
                             for kind, each in texts.items()}
    (given.out / "fourbit.json").write_text(json.dumps({
        name: {**{kind: one.to_dict() for kind, one in each.items()}, "seconds": seconds.get(name)}
        for name, each in figures.items()}, indent=1) + "\n")
    display.table(f"{given.model.name}: KL divergence from the unquantized model, nats a token", (
        "", *(f"{kind}{what}" for kind in texts for what in ("", ": same token")), "made in"), [
        (name, *(text for kind in texts for text in (
            f"{each[kind].mean_kld:.4f} +- {each[kind].mean_kld_se:.4f}",
            f"{each[kind].top1:.1%}")),
         f"{seconds[name]:.0f} s" if seconds.get(name, 0) > 1 else "")
        for name, each in figures.items()])


def _made(out: Path, make: Callable[[Path], object]) -> Checkpoint:
    if not out.exists():
        make(out)
    return Checkpoint.open(out)


def read_texts(source: Checkpoint, data: Path) -> dict[str, Texts]:
    tokenizer = Tokenizer.from_files(
        source.tokenizer_path, source.template_path, source.metadata)
    lines = (data / "fairytaleqa" / "stories_val.jsonl").read_text("utf-8").splitlines()
    tales = [" ".join(json.loads(line)["sections"]) for line in lines[:TALES]]
    return {
        "chat": conversations(tokenizer, source.metadata.config.shape.context),
        "tales": [tokenizer.encode(tale)[:TOKENS] for tale in tales],
    }


@torch.no_grad()
def logits(decoder: Decoder, texts: Texts) -> list[torch.Tensor]:
    """Return the logits of each text, float32[T, V], on the processor."""
    return [decoder(torch.tensor([ids], device=decoder.cos.device))[0].cpu() for ids in texts]


def processor() -> str:
    """Return the name of the GPU or else the processor, which every figure goes with."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(": ")[2] for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def _as_it_is(_: Decoder) -> None:
    pass


def _activations(decoder: Decoder) -> None:
    """Round what every linear layer reads, and no weight."""
    for module in decoder.modules():
        if isinstance(module, nn.Linear):
            module.register_forward_pre_hook(lambda _, given: (fake_quantize_rows(given[0]),))


def _turned(source: Checkpoint, progress: Progress) -> Callable[[Decoder], None]:
    """Round activations alone as well, of the weights that calibration would round."""
    def change(decoder: Decoder) -> None:
        texts = calibration_texts(source, SELF, count=32, progress=progress)
        calibration = Calibration(source, Recipe.parse(DEFAULT_RECIPE), texts)
        decoder.head.weight = nn.Parameter(calibration.read("head.weight"))
        decoder.embed.weight = nn.Parameter(calibration.read("embed.weight"))
        decoder.norm.weight.data = calibration.read("norm.weight")
        x_BTD = functional.embedding(torch.tensor(texts, device=device()), decoder.embed.weight)
        for number, layer in enumerate(decoder.layers):
            block = calibration.block(number)
            x_BTD, inputs = calibration.exact(block, number, x_BTD)
            smooth(block, inputs)
            layer.load_state_dict(block.state_dict())
        _activations(decoder)

    return torch.no_grad()(change)


def _q4_0(decoder: Decoder) -> None:
    """Round the weights as llama.cpp's Q4_0 does, and nothing else."""
    recipe, kind = Recipe.parse(DEFAULT_RECIPE), gguf.GGMLQuantizationType.Q4_0
    for name, parameter in decoder.named_parameters():
        if recipe.scheme_of(name) == recipe.body:
            packed = gguf.quants.quantize(parameter.detach().numpy(), kind)
            parameter.data = torch.from_numpy(gguf.quants.dequantize(packed, kind).copy())


if __name__ == "__main__":
    main()
