"""The constants of a bundle for glue/react-native."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import msgspec

from cloister.bundle import Bundle
from cloister.tokenizer_config import tokenizer_config

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from cloister.embed.facts import Facts, ModelFile

__all__ = ["MODEL", "constants", "files"]

MODEL = "model"  # where the bundle's files go


def files(facts: Facts) -> Sequence[ModelFile]:
    """Return which files of the bundle the app has."""
    return (facts.program, facts.tokenizer)


def constants(facts: Facts) -> Mapping[str, str]:
    """Return what the glue must know of the bundle, as source files by their paths.

    With them the file that the package's own chat session reads, which older bundles lack.
    """
    told = {
        "name": facts.name, "executorch": facts.executorch,
        "program": _file(facts.program), "tokenizer": _file(facts.tokenizer),
        "context": facts.context, "memoryBytes": facts.memory_bytes,
        "format": msgspec.to_builtins(facts.format), "ends": facts.ends, "special": facts.special,
        "checks": [
            {"prompt": check.prompt, "answer": check.answer, "tokens": check.tokens}
            for check in facts.checks],
    }
    bundle = Bundle.open(facts.source)
    config = tokenizer_config(bundle.tokenizer_path, bundle.template_path, bundle.manifest)
    return {
        "src/bundle.ts": (
            f"// Written by `cloister embed` {facts.version}; do not edit.\n"
            "import type { Bundle } from './chat';\n\n"
            f"export const BUNDLE: Bundle = {json.dumps(told, indent=2)};\n"),
        f"{MODEL}/tokenizer_config.json": json.dumps(config, indent=1, ensure_ascii=False) + "\n",
    }


def _file(file: ModelFile) -> dict[str, object]:
    return {"name": file.name, "sha256": file.sha256, "sizeBytes": file.size_bytes}
