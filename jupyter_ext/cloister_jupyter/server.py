"""The server extension: tiers, vault and audit for JupyterLab's panel, under `cloister/api/`.

Every verb asks for the server's token; another origin is refused, token or not. GET changes
nothing. What a user typed is in bodies alone, since addresses are logged, and in no log line.
"""

from __future__ import annotations

import asyncio
import atexit
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn
from urllib.parse import urlsplit

import msgspec
from jupyter_server.auth.decorator import authorized
from jupyter_server.base.handlers import APIHandler
from jupyter_server.utils import url_path_join
from tornado import web

from cloister.commands.measure import Tiers, tiers
from cloister.errors import CloisterError, SettingError, VaultUnsafe, named
from cloister.tiers import Scale
from cloister_jupyter.keeper import Keeper
from cloister_jupyter.surroundings import audit, closed_to_others

if TYPE_CHECKING:
    from collections.abc import Callable

    from jupyter_server.serverapp import ServerApp

__all__ = ["Actions"]

_LIMIT_BYTES = 64 << 10  # of a body
_Text = Annotated[str, msgspec.Meta(min_length=1, max_length=4096)]


class _Body(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What is sent with a POST. Its repr shows nothing."""

    def __repr__(self) -> str:
        return f"{type(self).__name__}()"


class _Nothing(_Body, frozen=True):
    pass


class _Passphrase(_Body, frozen=True):
    passphrase: _Text


class _Id(_Body, frozen=True):
    id: _Text


class _Export(_Id, frozen=True):
    file: _Text


class _Notebook(_Body, frozen=True):
    path: _Text


class Actions:
    """What the endpoints do; each blocks, and runs on a thread."""

    def __init__(self, app: ServerApp, keeper: Keeper) -> None:
        self._app, self._keeper = app, keeper
        self.reading: dict[str, Callable[[], Any]] = {
            "audit": lambda: audit(app, keeper.welcome), "tiers": _tiers, "vault": keeper.state}
        self.doing: dict[str, tuple[type[_Body], Callable[[Any], Any]]] = {
            "check": (_Notebook, self._check),
            "vault/export": (_Export, self._export),
            "vault/forget": (_Id, lambda body: self._vault().ask("forget", id=body.id)),
            "vault/list": (_Nothing, lambda _body: self._vault().ask("list")),
            "vault/lock": (_Nothing, lambda _body: keeper.close()),
            "vault/unlock": (
                _Passphrase, lambda body: self._vault().unlock(body.passphrase)),
        }

    def _vault(self) -> Keeper:
        """Return the vault's keeper, unless texts or a passphrase would pass where others read."""
        if not closed_to_others(self._app):
            raise VaultUnsafe(
                "This server asks for no token, or listens beyond this machine without TLS, so it "
                "does not open the vault; use `cloister lab`, or `cloister vault` in a terminal.")
        return self._keeper

    def _export(self, body: _Export) -> None:
        self._vault().ask("export", id=body.id, path=str(self._path(body.file)))

    def _check(self, body: _Notebook) -> Any:
        return self._vault().ask("check", path=str(self._path(body.path)))

    def _path(self, name: str) -> Path:
        """Return where a file lies that the page names as Jupyter's file browser does."""
        root = Path(getattr(self._app.contents_manager, "root_dir", "")).resolve()
        path = root / name.lstrip("/")
        hidden = any(part.startswith(".") for part in Path(name).parts)
        if hidden or "\0" in name or not path.parent.resolve().is_relative_to(root):
            raise SettingError(
                "That file is hidden, or not in the folder that this server shows; name another.")
        return path


class _Handler(APIHandler):
    auth_resource = "cloister"

    def check_origin(self, origin_to_satisfy_tornado: str = "") -> bool:
        """Refuse pages of other servers, also with a token, and whatever the server allows else."""
        del origin_to_satisfy_tornado
        headers = self.request.headers
        if headers.get("Sec-Fetch-Site", "none") not in ("same-origin", "none"):
            return False
        origin = headers.get("Origin")
        return origin is None or (
            urlsplit(origin).netloc.lower() == headers.get("Host", "").lower())

    def set_cors_headers(self) -> None:
        """Let no other page read the answer."""

    @web.authenticated
    def options(self, *_args: str, **_given: str) -> NoReturn:  # type: ignore[override]
        """Refuse: no other page may ask."""
        raise web.HTTPError(405)

    def write_error(self, status_code: int, **_error: Any) -> None:
        """Answer in a sentence, and log none."""
        self._reply({"message": {
            403: "The server refused that; load the page anew from its address.",
            404: "The server refused that: it came from another page.",
        }.get(status_code, f"The server refused that (status {status_code}).")})

    async def _run(self, action: Callable[[], Any]) -> None:
        try:
            answer = await asyncio.to_thread(action)
        except CloisterError as error:
            self.set_status(400)
            answer = {"error": type(error).__name__, "message": str(error)}
        except Exception as error:  # its words may quote what was typed
            self.set_status(500)
            answer = {"error": "CloisterError", "message": str(named(error, "The server"))}
        self._reply(answer)

    def _reply(self, answer: Any) -> None:
        self.set_header("Cache-Control", "no-store")
        self.set_header("Content-Type", "application/json")
        self.finish(json.dumps({} if answer is None else msgspec.to_builtins(answer)))


class _Reading(_Handler):
    def initialize(self, action: Callable[[], Any]) -> None:
        """Take what answers."""
        self._action = action

    @web.authenticated
    @authorized
    async def get(self) -> None:
        """Answer, and change nothing."""
        await self._run(self._action)


class _Doing(_Handler):
    def initialize(self, body: type[_Body], action: Callable[[Any], Any]) -> None:
        """Take what is sent, and what does it."""
        self._body, self._action = body, action

    @web.authenticated
    @authorized
    async def post(self) -> None:
        """Do it."""
        if self.request.headers.get("Content-Type", "").split(";")[0] != "application/json":
            raise web.HTTPError(415)
        if len(self.request.body) > _LIMIT_BYTES:
            raise web.HTTPError(413)
        try:
            body = msgspec.convert(json.loads(self.request.body), self._body)
        except (ValueError, RecursionError):  # its words quote the body
            raise web.HTTPError(400) from None
        await self._run(lambda: self._action(body))


def _tiers() -> dict[str, Any]:
    return {"ladders": [
        tiers(Tiers(json=True, size=size, context=None)) for size in (Scale.REFERENCE, Scale.FULL)]}


def _load_jupyter_server_extension(app: ServerApp) -> None:
    keeper = Keeper()
    atexit.register(keeper.close)
    web_app: Any = app.web_app
    actions = Actions(app, keeper)
    base = url_path_join(web_app.settings["base_url"], "cloister", "api")
    web_app.add_handlers(".*$", [
        *((url_path_join(base, name), _Reading, {"action": action})
          for name, action in actions.reading.items()),
        *((url_path_join(base, name), _Doing, {"body": body, "action": action})
          for name, (body, action) in actions.doing.items()),
    ])
