"""`cloister vault`: what the vault has of the user, under which key, and how to delete it."""

from __future__ import annotations

import sys
import tempfile
from dataclasses import dataclass, fields, replace
from getpass import getpass
from pathlib import Path
from typing import TYPE_CHECKING, Self

from cloister import display, guard
from cloister.commands.options import Options, Record
from cloister.errors import SettingError, VaultError
from cloister.settings import Settings
from cloister.vault import local, store
from cloister.vault.keys import Provider
from cloister.vault.namespace import Kind

if TYPE_CHECKING:
    from argparse import Namespace
    from collections.abc import Callable, Sequence

    from cloister.audit.canary import Find

__all__ = ["FORGOTTEN", "Vault", "asking", "vault"]


@dataclass(frozen=True, kw_only=True)
class Vault(Options):
    """What to do with the vault; each action has some of these."""

    action: str
    provider: Provider | None = None
    beside: bool = False
    accept_rollback: bool = False
    conversation: str = ""
    namespace: str = "default"
    kind: Kind | None = None
    bundle: str = "nano-1"
    teacher: str | None = None

    @classmethod
    def of(cls, parsed: Namespace) -> Self:
        """Take the options out of parsed arguments, those that the action has."""
        names = {field.name for field in fields(cls)}
        given = {name: value for name, value in vars(parsed).items() if name in names}
        for name, read in (("provider", Provider), ("kind", lambda text: Kind[text.upper()])):
            if given.get(name) is not None:
                given[name] = read(given[name])
        return cls(**given)


_ROLLBACK = {
    Provider.KEYRING: "an older copy of the whole vault is refused",
}
_NO_ROLLBACK = "an older copy of the whole vault cannot be told from the newest"
_RESIDUE = (
    "The disk may hold the old blocks until they are reused, and a backup keeps what it copied, "
)
FORGOTTEN = _RESIDUE + (
    "which the vault's key still opens: `cloister vault shred` and `rotate` take that key away."
)
_SHREDDED = _RESIDUE + (
    "which the vault's key still opens until `cloister vault rotate`, and the old key after it."
)


def vault(args: Vault) -> Record:
    """Run one of the vault's commands."""
    commands: dict[str, Callable[[Vault], Record]] = {
        "init": _init, "status": _status, "rotate": _rotate, "forget": _forget, "shred": _shred,
        "scan": _scan,
    }
    return commands[args.action](args)


def asking(*, new: bool = False) -> Callable[[], str] | None:
    """Return what asks for the passphrase at the terminal, twice for a new one; None without one.
    """
    if not (sys.stdin.isatty() and sys.stderr.isatty()):
        return None

    def ask() -> str:
        text = getpass("Passphrase: ", stream=sys.stderr)
        if new and getpass("Again: ", stream=sys.stderr) != text:
            raise SettingError("The two passphrases differ; begin again.")
        return text

    return ask


def _open(args: Vault) -> store.Vault:
    return local.open_vault(asking(), accept_rollback=args.accept_rollback)


def _init(args: Vault) -> Record:
    settings, moved = Settings.from_environment(), None
    if args.beside and settings.vault.exists():
        try:
            moved = local.aside(settings)
        except OSError as error:
            raise VaultError(
                f"The vault cannot be moved aside ({error.strerror}); check its folder.") from None
    ask = asking(new=True)
    # A passphrase is not asked for where it was not asked for.
    holder = local.keyholder(settings, ask if args.provider is Provider.PASSPHRASE else None)
    try:
        made = store.Vault.create(settings.vault, holder, args.provider)
    except BaseException:
        if moved is not None:
            settings.vault.with_name(moved).rename(settings.vault)
        raise
    with made:
        record = _facts(made)
    if not args.json:
        if moved is not None:
            display.table("The vault that was there is as it was", ("",), [(f"now {moved}",)])
        _show("A new vault", record)
        display.show(made.notice)
    return {**record, "moved": moved, "notice": made.notice}


def _status(args: Vault) -> Record:
    with _open(args) as opened:
        record = _facts(opened)
    if not args.json:
        _show("The vault", record)
        display.table("What it holds", ("namespace", "kind", "objects", "on disk"), [
            (space["name"], kind, f"{each['objects']:,}", display.bytes_text(each["bytes"]))
            for space in record["namespaces"] for kind, each in space["kinds"].items()
        ], texts=2)
    return record


def _rotate(args: Vault) -> Record:
    with _open(args) as opened:
        if (args.provider or opened.header.provider) is Provider.PASSPHRASE:
            ask = asking(new=True)
            if ask is not None:
                opened.keys.keyholder = replace(opened.keys.keyholder, passphrase=ask)
            elif opened.header.provider is Provider.PASSPHRASE:
                raise SettingError("A new passphrase is asked for at a terminal; run this in one.")
        opened.rotate(args.provider)
        record = _facts(opened)
    if not args.json:
        _show("The vault has a new key", record)
    return record


def _forget(args: Vault) -> Record:
    from cloister.runtime.conversation import forget

    with _open(args) as opened:
        found = forget(opened.namespace(args.namespace), args.conversation)
    if not found:
        raise VaultError(
            "There is no conversation of that name in that namespace; see --namespace.")
    if not args.json:
        display.show(f"It is gone, and its key with it. {FORGOTTEN}")
    return {"forgotten": True, "residue": FORGOTTEN}


def _shred(args: Vault) -> Record:
    with _open(args) as opened:
        space = opened.namespace(args.namespace)
        if space.name not in [each.name for each in opened.namespaces()]:
            raise VaultError("There is no such namespace; see `cloister vault status`.")
        count = space.shred(args.kind)
    if not args.json:
        display.show(f"{count} objects are gone, and their keys with them. {_SHREDDED}")
    return {"objects": count, "residue": _SHREDDED}


def _scan(args: Vault) -> Record:
    """Plant canaries, look for them in all that was written, and in the same unsealed."""
    from cloister import reference
    from cloister.audit import canary
    from cloister.bundle import Bundle
    from cloister.pieces import Fit
    from cloister.tokenizer import Tokenizer

    bundle = reference.find(args.bundle)
    whole = Bundle.open(bundle)
    tokenizer = Tokenizer.from_files(
        whole.tokenizer_path, whole.template_path, whole.manifest)
    teacher = None if args.teacher is None else reference.find_checkpoint(args.teacher)
    with tempfile.TemporaryDirectory() as scratch, display.quiet(args.debug) as console:
        stage, apart = canary.Stage(Path(scratch) / "stage"), Path(scratch) / "apart"
        stage.root.mkdir()
        apart.mkdir()
        with console.status("planting") as status:
            planted = canary.plant(
                stage, bundle, teacher, apart, lambda way: status.update(f"planting: {way}"),
                whole.manifest.media)
            status.update("looking")
            finds = canary.search(stage.root, planted, tokenizer)
            control = Path(scratch) / "control"
            model = whole.model_id(whole.manifest.programs[0])
            _unsealed(stage.home, control, bytes.fromhex(model))
            found = canary.search(control, planted, tokenizer)
        files = sum(path.is_file() for path in stage.root.rglob("*"))
    ways, media = [each.way for each in planted], whole.manifest.media
    # These the vault keeps word for word: a search that misses them unsealed would miss all.
    kept = {"session name", "system prompt", "chat", "second turn", "resumed", "recording"}
    if media is not None and media.picture is not None and media.picture.fit in (
            Fit.STRETCH, Fit.PAD):
        kept.add("picture")  # its pixels are neither resized nor made even
    missed = kept.intersection(ways) - {find.way for find in found}
    record: Record = {
        "ok": not finds and not missed, "planted": ways, "files": files,
        "found": [{"way": find.way, "form": find.form, "file": str(find.file)} for find in finds],
        "control": sorted({f"{find.way}: {find.form}" for find in found}),
    }
    if not args.json:
        display.table(
            f"Canaries in {files} files", ("given as", "found", "found in the same, unsealed"), [(
                way, _forms(finds, way) or "nowhere", _forms(found, way) or "-",
            ) for way in ways], texts=3)
    if finds:
        raise VaultError(
            f"User text lies open in {len({find.file for find in finds})} files; report this with "
            "what --json prints."
        )
    if missed:
        raise VaultError("The positive control found too little; the scan proves nothing.")
    return record


def _forms(finds: Sequence[Find], way: str) -> str:
    return ", ".join(dict.fromkeys(find.form for find in finds if find.way == way))


def _unsealed(home: Path, out: Path, model: bytes) -> None:
    """Write what the vault in `home` holds as it would lie there without sealing."""
    out.mkdir()
    settings = replace(
        Settings.from_environment(), home=home, keyfile=None, passphrase=None, provider=None)
    with local.open_vault(settings=settings) as opened:
        for space in opened.namespaces():
            for number, content in enumerate(space.everything(model)):
                (out / f"{space.name}-{number}").write_bytes(content)


def _facts(opened: store.Vault) -> Record:
    provider = opened.header.provider
    return {
        "directory": str(opened.directory), "provider": str(provider),
        "protects": provider.protects, "rollback": _ROLLBACK.get(provider, _NO_ROLLBACK),
        "epoch": opened.header.epoch, "writes": opened.generation,
        "memory": guard.keep_out_of_dumps() | opened.keys.locked(),
        "namespaces": [
            {"name": space.name, "kinds": {
                kind.name.lower(): {"objects": count, "bytes": size}
                for kind, (count, size) in space.sizes().items()
            }} for space in opened.namespaces()
        ],
    }


def _show(title: str, record: Record) -> None:
    display.table(title, ("", ""), [
        ("directory", record["directory"]), ("key provider", record["provider"]),
        ("so", record["protects"]), ("rollback", record["rollback"]),
        ("key rotations", str(record["epoch"] - 1)), ("writes", f"{record['writes']:,}"),
        *((f"memory: {name}", how) for name, how in record["memory"].items()),
    ], texts=2)
