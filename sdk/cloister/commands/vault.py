"""`cloister vault`: what the vault has of the user, under which key, and how to delete it."""

from __future__ import annotations

import sys
import tempfile
from getpass import getpass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cloister import display
from cloister.errors import SettingError, VaultError
from cloister.settings import Settings
from cloister.vault import hygiene, local
from cloister.vault.keys import Provider
from cloister.vault.namespace import Kind

if TYPE_CHECKING:
    from argparse import Namespace
    from collections.abc import Callable, Sequence

    from cloister.audit.canary import Find
    from cloister.vault.store import Vault

__all__ = ["asking", "vault"]

Record = dict[str, Any]

_ROLLBACK = {
    Provider.KEYRING: "an older copy of the whole vault is refused",
}
_NO_ROLLBACK = "an older copy of the whole vault cannot be told from the newest"
_RESIDUE = (
    "The disk may hold the old blocks until they are reused, and a backup keeps what it copied, "
)
_FORGOTTEN = _RESIDUE + (
    "which the vault's key still opens: `cloister vault shred` and `rotate` take that key away."
)
_SHREDDED = _RESIDUE + (
    "which the vault's key still opens until `cloister vault rotate`, and the old key after it."
)


def vault(args: Namespace) -> Record:
    """Run one of the vault's commands."""
    provider = getattr(args, "provider", None)
    args.provider = None if provider is None else Provider(provider)
    commands: dict[str, Callable[[Namespace], Record]] = {
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


def _open(args: Namespace) -> Vault:
    return local.open_vault(
        Settings.from_environment(), asking(),
        accept_rollback=getattr(args, "accept_rollback", False))


def _init(args: Namespace) -> Record:
    settings, moved = Settings.from_environment(), None
    if args.beside and settings.vault.exists():
        try:
            moved = local.aside(settings)
        except OSError as error:
            raise VaultError(
                f"The vault cannot be moved aside ({error.strerror}); check its folder.") from None
    from cloister.vault.store import Vault

    ask = asking(new=True)
    # A passphrase is not asked for where it was not asked for.
    holder = local.keyholder(settings, ask if args.provider is Provider.PASSPHRASE else None)
    try:
        made = Vault.create(settings.vault, holder, args.provider)
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
        print(made.notice)  # noqa: T201
    return {**record, "moved": moved, "notice": made.notice}


def _status(args: Namespace) -> Record:
    with _open(args) as held:
        record = _facts(held)
    if not args.json:
        _show("The vault", record)
        display.table("What it holds", ("namespace", "kind", "objects", "on disk"), [
            (space["name"], kind, f"{each['objects']:,}", display.bytes_text(each["bytes"]))
            for space in record["namespaces"] for kind, each in space["kinds"].items()
        ], texts=2)
    return record


def _rotate(args: Namespace) -> Record:
    with _open(args) as held:
        if (args.provider or held.header.provider) is Provider.PASSPHRASE:
            ask = asking(new=True)
            if ask is not None:
                from dataclasses import replace

                held.keys.keyholder = replace(held.keys.keyholder, passphrase=ask)
            elif held.header.provider is Provider.PASSPHRASE:
                raise SettingError("A new passphrase is asked for at a terminal; run this in one.")
        held.rotate(args.provider)
        record = _facts(held)
    if not args.json:
        _show("The vault has a new key", record)
    return record


def _forget(args: Namespace) -> Record:
    from cloister.runtime.conversation import forget

    with _open(args) as held:
        found = forget(held.namespace(args.namespace), args.conversation)
    if not found:
        raise VaultError(
            "There is no conversation of that name in that namespace; see --namespace.")
    if not args.json:
        print(f"It is gone, and its key with it. {_FORGOTTEN}")  # noqa: T201
    return {"forgotten": True, "residue": _FORGOTTEN}


def _shred(args: Namespace) -> Record:
    kind = None if args.kind is None else Kind[args.kind.upper()]
    with _open(args) as held:
        space = held.namespace(args.namespace)
        if space.name not in [each.name for each in held.namespaces()]:
            raise VaultError("There is no such namespace; see `cloister vault status`.")
        count = space.shred(kind)
    if not args.json:
        print(f"{count} objects are gone, and their keys with them. {_SHREDDED}")  # noqa: T201
    return {"objects": count, "residue": _SHREDDED}


def _scan(args: Namespace) -> Record:
    """Plant canaries, look for them in all that was written, and in the same unsealed."""
    from cloister import reference
    from cloister.audit import canary
    from cloister.bundle import Bundle
    from cloister.tokenizer import Tokenizer

    bundle = reference.find(args.bundle)
    held = Bundle.open(bundle)
    tokenizer = Tokenizer.from_files(held.tokenizer_path, held.template_path)
    teacher = None if args.teacher is None else reference.find_checkpoint(args.teacher)
    with tempfile.TemporaryDirectory() as scratch, display.quiet(args.debug) as console:
        stage, apart = canary.Stage(Path(scratch) / "stage"), Path(scratch) / "apart"
        stage.root.mkdir()
        apart.mkdir()
        with console.status("planting") as status:
            planted = canary.plant(
                stage, bundle, teacher, apart, lambda way: status.update(f"planting: {way}"))
            status.update("looking")
            finds = canary.search(stage.root, planted, tokenizer)
            control = Path(scratch) / "control"
            model = held.model_id(held.manifest.programs[0])
            _unsealed(stage.home, control, bytes.fromhex(model))
            found = canary.search(control, planted, tokenizer)
        files = sum(path.is_file() for path in stage.root.rglob("*"))
    # These the vault keeps word for word: a search that misses them unsealed would miss all.
    missed = {"session name", "system prompt", "chat", "second turn", "resumed"} - {
        find.way for find in found}
    ways = [each.way for each in planted]
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
    from dataclasses import replace

    out.mkdir()
    settings = replace(
        Settings.from_environment(), home=home, keyfile=None, passphrase=None, provider=None)
    with local.open_vault(settings) as held:
        for space in held.namespaces():
            for number, content in enumerate(space.everything(model)):
                (out / f"{space.name}-{number}").write_bytes(content)


def _facts(held: Vault) -> Record:
    provider = held.header.provider
    return {
        "directory": str(held.directory), "provider": str(provider),
        "protects": provider.protects, "rollback": _ROLLBACK.get(provider, _NO_ROLLBACK),
        "epoch": held.header.epoch, "writes": held.generation,
        "memory": hygiene.keep_out_of_dumps() | held.keys.locked(),
        "namespaces": [
            {"name": space.name, "kinds": {
                kind.name.lower(): {"objects": count, "bytes": size}
                for kind, (count, size) in space.sizes().items()
            }} for space in held.namespaces()
        ],
    }


def _show(title: str, record: Record) -> None:
    display.table(title, ("", ""), [
        ("directory", record["directory"]), ("key provider", record["provider"]),
        ("so", record["protects"]), ("rollback", record["rollback"]),
        ("key rotations", str(record["epoch"] - 1)), ("writes", f"{record['writes']:,}"),
        *((f"memory: {name}", how) for name, how in record["memory"].items()),
    ], texts=2)
