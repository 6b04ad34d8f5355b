"""What the Jupyter server answers of ours, and to whom: a server as `cloister lab` starts it."""

from __future__ import annotations

import http.client
import json
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import quote

import psutil
import pytest
from tests.lab_server import TOKEN, LabServer, connected, keep, settings_of, started

from cloister.runtime import conversation
from cloister.runtime.protocol import Welcome
from cloister.vault import local
from cloister.vault.keys import Provider
from cloister.vault.namespace import Kind
from cloister.vault.store import Vault

pytest.importorskip("jupyterlab", reason="JupyterLab is not installed")

from cloister_jupyter.keeper import Keeper
from cloister_jupyter.surroundings import audit, closed_to_others

pytestmark = pytest.mark.slow

PASSPHRASE = "Tonquedec-Quiberon"
SAID, NAME = "a word in confidence about Rothéneuf", "plans for Pontrieux"
VERBS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS")
# The user's own extension, which notes the routes of ours that the server has.
ROUTES = """
import json, os
def _jupyter_server_extension_points():
    return [{"module": "routes"}]
def _load_jupyter_server_extension(app):
    def rules(router):
        for rule in router.rules:
            yield from rules(rule.target) if hasattr(rule.target, "rules") else [rule]
    def note():
        with open(os.environ["ROUTES"] + ".part", "w") as file:
            json.dump([rule.matcher.regex.pattern for rule in rules(app.web_app.default_router)
                       if rule.target.__module__.startswith("cloister_jupyter")], file)
        os.rename(os.environ["ROUTES"] + ".part", os.environ["ROUTES"])
    app.io_loop.add_callback(note)
"""


@dataclass
class Server:
    """A running server, and how to ask it."""

    running: LabServer
    routes: list[str] = field(default_factory=list)
    cookies: dict[str, str] = field(default_factory=dict)

    def ask(
        self, verb: str, path: str, body: Any = None, **headers: str
    ) -> tuple[int, dict[str, Any], http.client.HTTPResponse]:
        """Ask, and return status, answer and all of it; header names have _ in place of -."""
        line = http.client.HTTPConnection("127.0.0.1", self.running.port, timeout=60)
        line.sock = connected(self.running.port)
        data = body if isinstance(body, bytes) or body is None else json.dumps(body)
        line.request(verb, path, data, {
            "Content-Type": "application/json",
            **{name.replace("_", "-"): value for name, value in headers.items()}})
        response = line.getresponse()
        text = response.read()
        line.close()
        try:
            answer = json.loads(text)
        except ValueError:
            answer = {}
        return response.status, answer if isinstance(answer, dict) else {}, response

    def post(self, name: str, **body: Any) -> tuple[int, dict[str, Any]]:
        return self.ask("POST", f"/cloister/api/{name}", body, **self.token)[:2]

    @property
    def token(self) -> dict[str, str]:
        return {"Authorization": f"token {TOKEN}"}

    @property
    def cookie(self) -> dict[str, str]:
        return {"Cookie": "; ".join(f"{name}={value}" for name, value in self.cookies.items())}

    def log_in(self) -> None:
        """Take the cookies that a browser is given."""
        response = self.ask("GET", f"/lab?token={TOKEN}")[2]
        for line in response.headers.get_all("Set-Cookie") or ():
            name, value = line.split(";")[0].split("=", 1)
            self.cookies[name] = value


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    base = tmp_path_factory.mktemp("server")
    (base / "routes.py").write_text(ROUTES)
    (base / "config/jupyter_server_config.d").mkdir(parents=True)
    (base / "config/jupyter_server_config.d/routes.json").write_text(
        json.dumps({"ServerApp": {"jpserver_extensions": {"routes": True}}}))
    settings = settings_of(base, PASSPHRASE)
    with Vault.create(settings.vault, local.keyholder(settings)) as vault:
        keep(vault.namespace(), NAME, SAID)
    routes = base / "routes.json"
    with started(base, ROUTES=str(routes)) as running:
        deadline = time.monotonic() + 30
        while not routes.exists():
            assert time.monotonic() < deadline
            time.sleep(0.1)
        yield Server(running, [
            pattern.rstrip("$") for pattern in json.loads(routes.read_text())])


def answered(status: int) -> bool:
    return status < 400


def test_no_route_answers_without_the_token_or_to_another_page_or_by_a_verb_that_it_has_not(
    server: Server
) -> None:
    assert len(server.routes) >= 9
    server.log_in()
    xsrf = {"X_XSRFToken": server.cookies["_xsrf"]}
    other = {"Origin": "http://evil.example"}
    strangers: dict[str, tuple[str, dict[str, str]]] = {
        "no token": ("", {}),
        "wrong token": ("", {"Authorization": "token wrong"}),
        "wrong token in the address": ("?token=wrong", {}),
        "another origin with the token": ("", {**server.token, **other}),
        "another port with the token": (
            "", {**server.token, "Origin": f"http://127.0.0.1:{server.running.port + 1}"}),
        "another page with the cookie": ("", {**server.cookie, **xsrf, **other}),
        "another page's picture": ("", {**server.cookie, "Sec_Fetch_Site": "cross-site"}),
        "another name for this machine": ("", {**server.token, "Host": "evil.example"}),
        "cookie and another's XSRF token": ("", {**server.cookie, "X_XSRFToken": "2|a|b|1"}),
        "cookie alone": ("", server.cookie),
    }
    tried, heard = 0, []
    for route in server.routes:
        for verb in VERBS:
            for who, (query, headers) in strangers.items():
                if verb == "GET" and who in ("cookie alone", "cookie and another's XSRF token"):
                    continue  # what changes nothing needs no XSRF token; the page asks so
                body = {} if verb in ("POST", "PUT", "PATCH") else None
                status, answer, _ = server.ask(verb, route + query, body, **headers)
                tried += 1
                if answered(status) or set(answer) - {"message"}:
                    heard.append((route, verb, who, status))
    assert not heard and tried > 500
    # With the token each has one verb, and a changing one is never GET.
    allowed = {}
    for route in server.routes:
        for verb in VERBS:
            status, answer, _ = server.ask(
                verb, route, b"" if verb == "POST" else None, **server.token)
            if status == 400 or answered(status):
                allowed.setdefault(route, []).append(verb)
    reads = {"audit", "tiers", "vault"}
    for route in server.routes:
        name = route.removeprefix("/cloister/api/")
        assert allowed[route] == (["GET"] if name in reads else ["POST"]), route
    # The controls: the same questions of the page itself.
    for name in reads:
        assert answered(server.ask("GET", f"/cloister/api/{name}", **server.token)[0])
        assert answered(server.ask("GET", f"/cloister/api/{name}", **server.cookie)[0])
    assert answered(server.ask(
        "POST", "/cloister/api/vault/lock", {}, **server.cookie, **xsrf,
        Origin=f"http://127.0.0.1:{server.running.port}", Sec_Fetch_Site="same-origin")[0])


@pytest.mark.parametrize(("body", "kind", "status"), [
    (b"{", "application/json", 400), (b"\xff", "application/json", 400),
    (b"[]", "application/json", 400), (b"null", "application/json", 400),
    (b"[" * 20_000, "application/json", 400), (b'{"passphrase": 1}', "application/json", 400),
    (b'{"passphrase": ""}', "application/json", 400), (b"{}", "application/json", 400),
    (b'{"passphrase": "a", "more": 1}', "application/json", 400),
    (b'{"passphrase": "%s"}' % (b"a" * 5000), "application/json", 400),
    (b'{"passphrase": "%s"}' % (b"a" * 70_000), "application/json", 413),
    (b'{"passphrase": "a"}', "text/plain", 415),
    (b"passphrase=a", "application/x-www-form-urlencoded", 415),
])
def test_what_is_no_right_body_is_refused_in_a_sentence(
    server: Server, body: bytes, kind: str, status: int
) -> None:
    found, answer, response = server.ask(
        "POST", "/cloister/api/vault/unlock", body, Content_Type=kind, **server.token)
    assert found == status and answer["message"].endswith(".")
    assert response.headers["Cache-Control"] == "no-store"


def test_the_vault_is_opened_by_its_passphrase_listed_exported_forgotten_and_locked(
    server: Server
) -> None:
    state = server.ask("GET", "/cloister/api/vault", **server.token)[1]
    assert state["state"] == "locked" and state["asks"] and NAME not in json.dumps(state)
    for name, body in (("list", {}), ("forget", {"id": "a"}),
                       ("export", {"id": "a", "file": "a.json"})):
        status, answer = server.post(f"vault/{name}", **body)
        assert status == 400 and "locked" in answer["message"]
    status, answer = server.post("vault/unlock", passphrase="Tonquedec-Quimper")
    assert (status, answer["error"]) == (400, "WrongPassphrase")
    assert server.post("vault/unlock", passphrase=PASSPHRASE)[0] == 200
    [kept] = server.post("vault/list")[1]["conversations"]
    assert (kept["name"], kept["namespace"], kept["hours"]) == (NAME, "default", 0)
    for place in ("../out.json", "/../out.json", "a\0b", "none/../../out.json", "gone/out.json",
                  ".bashrc", ".ssh/out.json"):
        status, answer = server.post("vault/export", id=kept["id"], file=place)
        assert status == 400 and answer["message"].endswith("."), place
    assert not (server.running.base / "out.json").exists()
    assert server.post("vault/export", id=kept["id"], file="out.json")[0] == 200
    out = server.running.files / "out.json"
    assert json.loads(out.read_text())["messages"] == [{"role": "user", "content": SAID}]
    assert out.stat().st_mode & 0o077 == 0
    assert server.post("vault/export", id=kept["id"], file="out.json")[1]["error"] == "OutputExists"
    assert "residue" in server.post("vault/forget", id=kept["id"])[1]
    assert server.post("vault/forget", id=kept["id"])[0] == 400
    assert server.post("vault/list")[1]["conversations"] == []
    assert server.post("vault/lock")[0] == 200
    assert server.post("vault/list")[0] == 400
    log = server.running.log
    for secret in (PASSPHRASE, NAME, SAID, "Tonquedec-Quimper", kept["id"], "out.json"):
        assert secret not in log and quote(secret) not in log
    assert "/cloister/api/vault/unlock" in log  # the control: it does note what is asked


def test_a_notebook_is_searched_for_what_the_vault_has_fingerprints_of(server: Server) -> None:
    (server.running.files / "leak.ipynb").write_text(json.dumps({
        "nbformat": 4, "nbformat_minor": 5, "metadata": {}, "cells": [{
            "cell_type": "code", "id": "a", "metadata": {}, "outputs": [], "execution_count": None,
            "source": "mail = 'anne@pontrieux.bzh'"}]}))
    assert server.post("vault/unlock", passphrase=PASSPHRASE)[0] == 200
    status, found = server.post("check", path="leak.ipynb")
    assert (status, found["ok"], found["fingerprints"]) == (200, False, 0)
    assert [each["kind"] for each in found["findings"]] == ["email"]
    assert "pontrieux" not in json.dumps(found)
    assert server.post("check", path="none.ipynb")[1]["error"] == "DataError"
    server.post("vault/lock")


def test_the_audit_says_how_this_server_is_set_up(server: Server) -> None:
    found = server.ask("GET", "/cloister/api/audit", **server.token)[1]
    facts = {fact["name"]: fact for group in found["groups"] for fact in group["facts"]}
    for name in ("reachable", "token", "news", "updates", "extension manager"):
        assert facts[name]["good"] is True, name
    assert facts["other extensions"]["value"].startswith("routes:")
    assert "in memory" in facts["kernels"]["value"]
    assert facts["IPv4"]["value"] in ("refused", "open")


def test_tiers_are_those_that_the_command_prints(server: Server) -> None:
    ladders = server.ask("GET", "/cloister/api/tiers", **server.token)[1]["ladders"]
    assert [ladder["size"] for ladder in ladders] == ["reference", "full"]
    assert [tier["tier"] for tier in ladders[1]["tiers"]] == ["ultra", "pro", "nano-2", "nano-1"]


def test_a_kernel_has_no_port_and_no_history_file_and_ctrl_c_ends_it(tmp_path: Path) -> None:
    with started(tmp_path) as running:
        server = Server(running)
        status, kernel, _ = server.ask("POST", "/api/kernels", {}, **server.token)
        assert status == 201
        sockets = running.base / "runtime" / f"kernel-{kernel['id']}-ipc-5"
        assert json.loads((running.base / "runtime" / f"kernel-{kernel['id']}.json").read_text())[
            "transport"] == ("ipc" if len(str(sockets)) <= 103 else "tcp")
        [begun] = [child for child in psutil.Process(running.process.pid).children()
                   if any(kernel["id"] in word for word in child.cmdline())]
        assert begun.cmdline()[-1] == "--HistoryManager.hist_file=:memory:"
        assert begun.environ()["JUPYTER_WIDGETS_ECHO"] == "0"
        assert begun.rlimit(psutil.RLIMIT_CORE) == (0, 0)
        running.process.send_signal(signal.SIGINT)
        assert running.process.wait(60) == 0
        assert not begun.is_running()
        assert not list((running.base / "runtime").glob("kernel-*"))
        assert not list(running.base.rglob("history.sqlite"))
        assert not (running.base / "config" / "jupyter_server_config.json").exists()


def test_the_audit_names_what_is_not_as_it_should_be(monkeypatch: pytest.MonkeyPatch) -> None:
    lab = SimpleNamespace(
        news_url="https://news", check_for_updates_class=dict, extension_manager="pypi",
        extra_labextensions_path=[], labextensions_path=[])
    app: Any = SimpleNamespace(
        ip="0.0.0.0", sock="", certfile="", identity_provider=SimpleNamespace(auth_enabled=False),
        extension_manager=SimpleNamespace(extension_apps={"jupyterlab": {"lab": lab}.values()}),
        jpserver_extensions={"jupyterlab": True, "theirs": True, "off": False},
        kernel_manager=SimpleNamespace(
            kernel_manager_class="jupyter_client.ioloop.AsyncIOLoopKernelManager"))
    monkeypatch.setenv("CLOISTER_PASSPHRASE", PASSPHRASE)
    found = audit(app, Welcome(
        version=1, guard_tier=1, guard="no kernel of that kind", evidence={}, memory={}))
    assert not found.good and PASSPHRASE not in repr(found)
    facts = {fact.name: fact for group in found.groups for fact in group.facts}
    assert {name for name, fact in facts.items() if fact.good is False} == {
        "reachable", "token", "news", "updates", "extension manager", "passphrase", "guard tier"}
    assert facts["other extensions"].value.startswith("theirs:")
    assert "history.sqlite" in facts["kernels"].value and "7 things" in found.summary


@pytest.mark.parametrize(("ip", "certificate", "asks", "closed"), [
    ("127.0.0.1", "", True, True), ("localhost", "", True, True), ("::1", "", True, True),
    ("0.0.0.0", "", True, False), ("", "", True, False), ("::", "", True, False),
    ("0.0.0.0", "cert.pem", True, True), ("127.0.0.1", "", False, False),
])
def test_a_vault_is_opened_only_where_nobody_else_can_read_or_ask(
    ip: str, certificate: str, asks: bool, closed: bool
) -> None:
    app: Any = SimpleNamespace(ip=ip, sock="", certfile=certificate, identity_provider=(
        SimpleNamespace(auth_enabled=asks)))
    assert closed_to_others(app) is closed


def test_a_vault_locks_itself_when_nobody_asks_and_goes_on_by_itself_where_nobody_is_asked(
) -> None:
    with local.open_vault(create=True, notify=lambda notice: None) as vault:
        keep(vault.namespace(), NAME, SAID)
        keep(vault.namespace("other"), "x", SAID)
    keeper = Keeper(idle_s=0.3)
    try:
        assert {each["namespace"] for each in keeper.ask("list")["conversations"]} == {
            "default", "other"}
        child = keeper._child
        assert child is not None
        child.wait(30)
        assert len(keeper.ask("list")["conversations"]) == 2
        assert keeper.state() == {
            "state": "open", "asks": False, "provider": "keyfile",
            "protects": Provider.KEYFILE.protects}
    finally:
        keeper.close()


def test_a_list_shows_conversations_alone_and_uses_none() -> None:
    with local.open_vault(create=True, notify=lambda notice: None) as vault:
        space = vault.namespace()
        keep(space, "one", SAID)
        space.append(Kind.HISTORY, b"\xfflab fingerprints", [b"\0" * 8])
        space.append(Kind.HISTORY, b"\xfflab grid a", [b'{"key": "a"}'])
        writes = vault.generation
        [listed] = conversation.listed(space)
        assert listed.name == "one" and "one" not in repr(listed)
        assert not vault.used
    with local.open_vault() as vault:
        assert vault.generation == writes
        assert conversation.export(vault.namespace(), "one")["messages"][0]["content"] == SAID
