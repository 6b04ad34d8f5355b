"""The models that other programs keep on this machine: Hugging Face's cache, Ollama, LM Studio.

Only their folders are read. Layouts: huggingface_hub's `models--ORG--NAME/snapshots/REVISION`
(a folder), Ollama's `manifests/HOST/OWNER/NAME/TAG` (JSON that names `blobs/sha256-...`), and LM
Studio's `OWNER/NAME` (a folder).
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from cloister import records
from cloister.errors import CheckpointError, CloisterError, SettingError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

__all__ = ["Installed", "find", "named", "problem"]

_MODEL = "application/vnd.ollama.image.model"
_CHANGES = ("application/vnd.ollama.image.adapter",)  # what the model's own file does not hold
_LIMIT = 1 << 20
_HOST, _OWNER = "registry.ollama.ai", "library"  # that Ollama leaves out of a name
_LATER_PART = re.compile(r".+-(?!00001)\d{5}-of-\d{5}\.gguf")


@dataclass(frozen=True, kw_only=True)
class Installed:
    """One model in another program's folder."""

    name: str  # as that program calls it
    program: str
    format: str  # safetensors or gguf
    path: Path  # the directory or file to import
    size_bytes: int
    damage: str | None = None  # what is wrong with its entry

    @property
    def title(self) -> str:
        """A name for its checkpoint."""
        return self.name.rpartition("/")[2].removesuffix(".gguf")


def find(folders: Mapping[str, Path]) -> list[Installed]:
    """List the models in the `folders` of the programs, by name; a folder may be missing."""
    readers = {"Hugging Face": _hugging_face, "Ollama": _ollama, "LM Studio": _lm_studio}
    found: dict[tuple[str, Path], Installed] = {}
    for label, folder in folders.items():
        reader = next(each for program, each in readers.items() if label.startswith(program))
        try:
            there = folder.is_dir() and any(folder.iterdir())  # which says where it may not look
            for model in reader(folder) if there else ():
                found.setdefault((model.name, model.path), model)
        except OSError as error:
            raise SettingError(
                f"Folder {folder} cannot be read ({error.strerror}); check its permissions."
            ) from None
    return sorted(found.values(), key=lambda model: (model.name.lower(), str(model.path)))


def named(name: str, folders: Mapping[str, Path]) -> Installed:
    """Return the one model called `name`.

    Raises:
        SettingError: there is none, there are several, or it is damaged.
    """
    found = [model for model in find(folders) if model.name == name]
    if not found:
        raise SettingError(
            f"There is no directory or file {name}, and no model of that name in the folders that "
            "are searched; cloister import --list shows what is there."
        )
    if len(found) > 1:
        raise SettingError(
            f"{len(found)} models are called {name}; name one by its path: "
            f"{', '.join(str(model.path) for model in found)}."
        )
    if found[0].damage is not None:
        raise SettingError(f"Model {name} of {found[0].program} cannot be imported. "
                           f"{found[0].damage}")
    return found[0]


def problem(model: Installed) -> str | None:
    """Return why a model cannot be imported, as far as its headers tell; None if it can."""
    if model.damage is not None:
        return model.damage
    from cloister.model import imports

    try:
        imports.check(model.path)
    except CloisterError as error:
        return str(error)
    return None


def _hugging_face(folder: Path) -> Iterator[Installed]:
    for repository in sorted(folder.glob("models--*")):
        name = repository.name.removeprefix("models--").replace("--", "/")
        yield from _readable(_repository(repository, name), Installed(
            name=name, program="Hugging Face", format="safetensors", path=repository,
            size_bytes=0))


def _repository(path: Path, name: str) -> Iterator[Installed]:
    snapshots = [each for each in (path / "snapshots").glob("*") if each.is_dir()]
    if snapshots:
        main = path / "refs" / "main"
        revision = main.read_text("utf-8", "replace").strip() if main.is_file() else ""
        chosen = next((each for each in snapshots if each.name == revision),
                      max(snapshots, key=lambda each: each.stat().st_mtime))
        yield from _folder(chosen, name, "Hugging Face")


def _lm_studio(folder: Path) -> Iterator[Installed]:
    for path in sorted(folder.glob("*/*")):
        if path.is_dir():
            name = path.relative_to(folder).as_posix()
            yield from _readable(_folder(path, name, "LM Studio"), Installed(
                name=name, program="LM Studio", format="gguf", path=path, size_bytes=0))


def _readable(models: Iterator[Installed], whole: Installed) -> Iterator[Installed]:
    """Yield `models`, or `whole` as damaged where they cannot be read: others of a folder can."""
    try:
        yield from models
    except OSError as error:
        yield replace(whole, damage=f"It cannot be read ({error.strerror}); check its permissions.")


def _folder(path: Path, name: str, program: str) -> Iterator[Installed]:
    """The directory itself where it is a model's, and each GGUF file in it."""
    if (path / "config.json").is_file() and any(path.glob("*.safetensors*")):
        size = sum(_size(file) for file in path.glob("*.safetensors"))
        yield Installed(name=name, program=program, format="safetensors", path=path,
                        size_bytes=size)
    for file in sorted(path.rglob("*.gguf")):
        if not file.is_file() or _LATER_PART.fullmatch(file.name):
            continue
        parts = file.name.replace("-00001-of-", "-?????-of-")
        yield Installed(
            name=f"{name}/{file.relative_to(path).as_posix()}", program=program, format="gguf",
            path=file, size_bytes=sum(_size(part) for part in file.parent.glob(parts)))


def _ollama(folder: Path) -> Iterator[Installed]:
    manifests = folder / "manifests"
    for path in sorted(manifests.glob("*/*/*/*")):
        if path.name.startswith(".") or not path.is_file():
            continue
        host, owner, model, tag = path.relative_to(manifests).parts
        prefix = [*([] if host == _HOST else [host]),
                  *([] if (host, owner) == (_HOST, _OWNER) else [owner])]
        name = "/".join((*prefix, f"{model}:{tag}"))
        try:
            layers = _layers(path)
            blob = _blob(folder, next(
                layer for layer in layers if layer.get("mediaType") == _MODEL))
            changed = any(layer.get("mediaType") in _CHANGES for layer in layers)
            damage = "An adapter of Ollama changes it, which is not applied." if changed else None
            if not blob.is_file():
                damage = "Its download is not whole; pull it again."
            yield Installed(name=name, program="Ollama", format="gguf", path=blob,
                            size_bytes=_size(blob), damage=damage)
        except (CheckpointError, StopIteration, TypeError, AttributeError):
            yield Installed(name=name, program="Ollama", format="gguf", path=path, size_bytes=0,
                            damage="Its manifest names no model; pull it again.")
        except OSError as error:
            yield Installed(name=name, program="Ollama", format="gguf", path=path, size_bytes=0,
                            damage=f"It cannot be read ({error.strerror}); check its permissions.")


def _layers(manifest: Path) -> list[dict[str, Any]]:
    with manifest.open("rb") as file:
        record = records.parse(file.read(_LIMIT + 1), limit_bytes=_LIMIT, foreign=True,
                               refuse=CheckpointError)
    layers = record["layers"] if isinstance(record.get("layers"), list) else []
    return layers  # type: ignore[return-value]  # what they are is seen where they are used


def _blob(folder: Path, layer: dict[str, Any]) -> Path:
    digest = layer.get("digest")
    if not isinstance(digest, str) or re.fullmatch("sha256:[0-9a-f]{64}", digest) is None:
        raise CheckpointError("no digest")
    return folder / "blobs" / digest.replace(":", "-")


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0
