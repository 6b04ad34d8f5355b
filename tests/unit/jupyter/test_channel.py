"""What an earlier run of a cell made does not go on behind the one that took its place."""

from __future__ import annotations

from pathlib import Path

from tests.unit.jupyter.test_magics import Kernel

MADE = """
from cloister_jupyter import ChatWidget, PromptLab
made = globals().get("made", [])
made.append(PromptLab(["nano-1"]))
made.append(ChatWidget("nano-1"))
"""


def run(kernel: Kernel, cell: str, code: str) -> None:
    """Run a cell that has an id, as JupyterLab says it."""
    client = kernel.client
    message = client.session.msg("execute_request", {
        "code": code, "silent": False, "store_history": True, "user_expressions": {},
        "allow_stdin": False, "stop_on_error": True}, metadata={"cellId": cell})
    client.shell_channel.send(message)
    while True:
        reply = client.get_shell_msg(timeout=60)
        if reply["parent_header"]["msg_id"] == message["header"]["msg_id"]:
            assert reply["content"]["status"] == "ok", reply["content"]
            return


def test_a_cell_that_runs_again_closes_what_it_made(tmp_path: Path) -> None:
    kernel = Kernel(tmp_path)
    try:
        run(kernel, "a", MADE)
        run(kernel, "b", MADE)
        shown = "print([each.comm is None for each in made])"
        assert "[False, False, False, False]" in kernel.run(shown)[1]
        run(kernel, "a", MADE)
        assert "[True, True, False, False, False, False]" in kernel.run(shown)[1]
        for _ in range(2):  # a front end that gives no ids: nothing is known, and nothing closed
            assert kernel.run(MADE)[0]["status"] == "ok"
        assert "[True, True" + ", False" * 8 + "]" in kernel.run(shown)[1]
    finally:
        kernel.client.stop_channels()
        kernel.manager.shutdown_kernel(now=True)
