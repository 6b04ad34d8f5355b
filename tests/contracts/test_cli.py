"""Bad input ends in exit 1 and one sentence, and leaves nothing half-written."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from cloister import display, reference
from cloister.cli import main
from cloister.errors import BundleError
from cloister.runtime.client import Worker

pytestmark = pytest.mark.slow

FAMILY = reference.bundle_path("nano-1")


def run(*arguments: str | bytes, **options: Any) -> subprocess.CompletedProcess[bytes]:
    environment = {**os.environ, "PYTHONPATH": ":".join(sys.path)}
    return subprocess.run(
        [sys.executable, "-m", "cloister.cli", *arguments], capture_output=True, check=False,
        env=environment, **options,
    )


def refused(result: subprocess.CompletedProcess[bytes], *words: str) -> str:
    """The one sentence of a refusal."""
    said = result.stderr.decode()
    assert result.returncode == 1, said
    *progress, last = said.splitlines()
    assert last.startswith("cloister: "), said
    assert last.endswith("."), said
    assert not [line for line in progress if line.startswith("cloister: ")], said
    assert "Traceback" not in said
    for word in words:
        assert word in said
    return said


@pytest.fixture
def broken(tmp_path: Path) -> Path:
    path = tmp_path / "nano.cloister"
    shutil.copytree(FAMILY, path)
    return path


def test_an_answer_as_json_has_the_keys_that_others_build_on() -> None:
    result = run("run", "nano-1", "-", "--system", "call", "--json", input=b"play some jazz")
    record = json.loads(result.stdout)
    assert {
        "text", "tokens", "finish", "ttft_s", "decode_tokens_per_s", "peak_rss_bytes",
        "guard_tier",
    } <= set(record)
    assert record["finish"] == "end"
    assert json.loads(record["text"])["name"] == "PlayMusic"
    assert result.stderr == b""


@pytest.mark.parametrize("draft", ["off", "lookup", "nano-1"])
def test_guessed_tokens_change_no_answer_and_are_counted(draft: str) -> None:
    asked = ("run", "pro", "-", "--system", "call", "--json", "--temperature", "1", "--seed", "3")
    prompt = b"add the song black and white by black and white to my black and white playlist"
    plain, guessed = (
        json.loads(run(*asked, *more, input=prompt).stdout) for more in ((), ("--draft", draft)))
    assert (guessed["text"], guessed["tokens"]) == (plain["text"], plain["tokens"])
    assert plain["drafted_tokens"] == 0
    assert (guessed["drafted_tokens"] > 0) == (draft != "off")
    assert guessed["accepted_tokens"] <= guessed["drafted_tokens"]


def test_what_cannot_guess_is_refused_by_name() -> None:
    refused(run("run", "nano-1", "x", "--draft", "femto-9"), "femto-9", "tiers are")


def test_a_prompt_longer_than_the_context_is_refused_with_both_numbers() -> None:
    result = run("run", "nano-1", "-", input=b"jazz and blues " * 1000)
    assert "jazz" not in refused(result, "1024", "shorten")
    assert result.stdout == b""


def test_an_empty_prompt_is_refused() -> None:
    refused(run("run", "nano-1", ""), "empty")
    refused(run("run", "nano-1", "-", input=b""), "empty")


def test_invalid_utf8_is_refused() -> None:
    refused(run("run", "nano-1", "-", input=b"caf\xe9 secret"), "UTF-8")
    refused(run("run", "nano-1", b"caf\xe9"), "UTF-8")


def test_a_bad_setting_is_refused_by_name() -> None:
    refused(run("run", "nano-1", "x", "--top-p", "0"), "top_p")
    refused(run("run", "nano-1", "x", "--max-tokens", "0"), "max_tokens")
    refused(run("run", "nano-1", "x", "--logprobs", "5000"), "top")


def test_an_unknown_bundle_or_a_missing_tier_is_refused(tmp_path: Path) -> None:
    refused(run("run", "femto-9", "x"), "tiers are")
    refused(run("run", "ultra", "x", "--family", str(tmp_path)), "no ultra")


@pytest.mark.parametrize("name", ["program.xnnpack.pte", "tokenizer.json", "manifest.json"])
def test_a_damaged_bundle_is_refused_by_run_and_by_verify(broken: Path, name: str) -> None:
    path = broken / name
    path.write_bytes(path.read_bytes()[:-7])
    refused(run("run", str(broken), "x"))
    refused(run("verify", str(broken)))


def test_a_refusal_as_json_is_an_object_too() -> None:
    result = run("run", "nano-1", "", "--json")
    assert json.loads(result.stdout)["error"] == "EmptyPrompt"


def test_whatever_ends_a_command_its_json_is_json(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def ending(result: object) -> Any:
        if isinstance(result, BaseException):
            raise result
        return result

    for result, status, printed in (
        ({"ratio": float("inf"), "error": float("nan")}, 0, {"ratio": None, "error": None}),
        (RuntimeError("secret"), 1, {"error": "RuntimeError"}),
        (OSError(5, "Input/output error"), 1, {"error": "OSError"}),
        (KeyboardInterrupt(), 130, {"error": "KeyboardInterrupt", "message": "stopped."}),
    ):
        monkeypatch.setattr("cloister.commands.run", lambda _, result=result: ending(result))
        monkeypatch.setattr("cloister.cli._drop_output", lambda: None)
        assert main(["tiers", "--json"]) == status
        record = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
        assert record.items() >= printed.items()
        assert "secret" not in str(record)


def test_wrong_usage_exits_with_two() -> None:
    assert run("run").returncode == 2
    assert run("dance").returncode == 2


def test_export_refuses_what_is_not_quantized_and_writes_nothing(tmp_path: Path) -> None:
    out = tmp_path / "out.cloister"
    refused(
        run("export", str(reference.checkpoint_path("nano-1")), "-o", str(out)), "quantize",
    )
    assert list(tmp_path.iterdir()) == []


def test_quantize_refuses_and_writes_nothing(tmp_path: Path) -> None:
    source = str(reference.checkpoint_path("nano-1"))
    refused(run("quantize", source, "-o", str(tmp_path / "q"), "--recipe", "3bit"), "8da4w-g32")
    refused(run("quantize", str(tmp_path), "-o", str(tmp_path / "q")), "config.json")
    refused(run("quantize", source, "-o", str(tmp_path / "no" / "q")), "does not exist")
    assert list(tmp_path.iterdir()) == []


def test_import_refuses_what_it_does_not_know(tmp_path: Path) -> None:
    source = tmp_path / "hub"
    source.mkdir()
    (source / "config.json").write_text('{"architectures": ["MambaForCausalLM"]}')
    refused(run("import", str(source), "-o", str(tmp_path / "out")), "MambaForCausalLM")
    assert not (tmp_path / "out").exists()


def test_quantize_export_and_run_give_a_bundle_that_answers(tmp_path: Path) -> None:
    quantized, out = tmp_path / "q", tmp_path / "out.cloister"
    source = str(reference.checkpoint_path("nano-1"))
    report = json.loads(
        run("quantize", source, "-o", str(quantized), "--recipe", "8da4w-g64", "--json").stdout
    )
    assert {row["bits"] for row in report["tensors"] if len(row["shape"]) == 2} == {4, 8}
    result = run("export", str(quantized), "-o", str(out), "--chunk", "32", "--json")
    record = json.loads(result.stdout)
    assert record["program_against_checkpoint"]["n"] >= 2048
    refused(run("export", str(quantized), "-o", str(out)), "--force")
    assert json.loads(run("verify", str(out), "--json").stdout)["ok"] is True
    answer = json.loads(run("run", str(out), "play some jazz", "--system", "call",
                            "--json").stdout)
    assert "PlayMusic" in answer["text"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.cloister", "q"]


def test_an_export_that_is_killed_leaves_no_bundle_under_its_name(tmp_path: Path) -> None:
    quantized, out = tmp_path / "q", tmp_path / "out.cloister"
    run("quantize", str(reference.checkpoint_path("nano-1")), "-o", str(quantized))
    process = subprocess.Popen(
        [sys.executable, "-m", "cloister.cli", "export", str(quantized), "-o", str(out)],
        env={**os.environ, "PYTHONPATH": ":".join(sys.path)}, stderr=subprocess.DEVNULL,
        # What runs in the background of a shell is deaf to it, and so are its children.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    while not list(tmp_path.glob(".out.cloister.*")) and process.poll() is None:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=60) == 130
    assert sorted(path.name for path in tmp_path.iterdir()) == ["q"]


def test_a_replay_file_proves_that_the_same_tokens_come(tmp_path: Path) -> None:
    path = tmp_path / "replay.json"
    first = run("run", "nano-1", "play a song", "--temperature", "1", "--seed", "3", "--replay",
                str(path), "--max-tokens", "20")
    assert b"plain text" in first.stderr
    assert json.loads(run("replay", "nano-1", str(path), "--json").stdout)["ok"] is True
    refused(run("replay", "pro", str(path)), "another bundle")
    refused(run("run", "nano-1", "play a song", "--replay", str(path)), "exists")


def test_compare_runs_each_tier_in_a_process_of_its_own() -> None:
    record = json.loads(run("compare", "play some jazz", "--system", "call", "--json").stdout)
    assert [row["tier"] for row in record["answers"]] == ["ultra", "pro", "nano-2", "nano-1"]
    assert all(row["peak_rss_bytes"] < 600e6 for row in record["answers"])


def test_a_chat_goes_on_after_a_refusal() -> None:
    lines = "play some jazz\n" + "jazz " * 2000 + "\nplay some blues\n"
    result = run("chat", "nano-1", "--system", "call", "--json", input=lines.encode())
    record = json.loads(result.stdout)
    assert record["turns"] == 2
    assert b"1024" in result.stderr
    assert b"jazz" not in result.stderr


def test_tiers_say_what_fits(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tiers", "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    sizes = {row["tier"]: row["parameters"] for row in record["tiers"]}
    assert round(sizes["nano-1"] / 1e9, 1) == 1.8
    assert round(sizes["nano-2"] / 1e9, 2) == 3.25
    assert main(["tiers"]) == 0
    assert "nano-2" in capsys.readouterr().out


def test_a_worker_ends_with_its_parent() -> None:
    code = (
        "from cloister.runtime.client import Worker; import os\n"
        "w = Worker().start(); print(w.ready().pid, flush=True); os._exit(1)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, check=False,
                            env={**os.environ, "PYTHONPATH": ":".join(sys.path)})
    pid = int(result.stdout)
    for _ in range(100):
        if not Path(f"/proc/{pid}/cmdline").exists() or not Path(
            f"/proc/{pid}/cmdline"
        ).read_bytes():
            return
        time.sleep(0.1)
    raise AssertionError("the worker outlived its parent")


def test_errors_cross_the_worker_by_their_own_class() -> None:
    with Worker() as worker, pytest.raises(BundleError, match="manifest"):
        worker.load("/")


def shell(command: str, **environment: str) -> subprocess.CompletedProcess[bytes]:
    """Run a pipeline; `cloister` in it is ours."""
    ours = f'cloister() {{ "{sys.executable}" -m cloister.cli "$@"; }}; '
    return subprocess.run(
        ["bash", "-c", ours + command], capture_output=True, check=False,
        env={**os.environ, "PYTHONPATH": ":".join(sys.path), **environment},
    )


@pytest.mark.parametrize("command", [
    "cloister run nano-1 'Tell me a story.' --system story | head -c 5",
    "cloister run nano-1 'play some jazz' --system call --json | head -c 0",
    "cloister tiers | head -n 1", "cloister tiers --json | true",
    "printf 'play some jazz\nand blues\n' | cloister chat nano-1 | head -c 1",
])
def test_a_reader_that_has_seen_enough_ends_a_command_quietly(command: str) -> None:
    done = shell(command)
    assert b"Traceback" not in done.stderr
    assert b"Error" not in done.stderr
    assert b"Exception" not in done.stderr


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="only Linux has a full device")
@pytest.mark.parametrize("command", [
    "run nano-1 'play some jazz' --system call", "tiers", "tiers --json", "vault init --json",
])
def test_a_full_disk_behind_the_output_is_one_sentence(command: str) -> None:
    done = shell(f"cloister {command} > /dev/full")
    assert done.returncode == 1
    (line,) = [line for line in done.stderr.decode().splitlines() if line.startswith("cloister: ")]
    assert "full" in line
    assert b"Traceback" not in done.stderr
    assert b"Exception" not in done.stderr


@pytest.mark.parametrize("environment", [
    {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
    {"PYTHONIOENCODING": "latin-1"}, {"PYTHONIOENCODING": "ascii"},
])
def test_a_locale_without_our_characters_is_no_error(environment: dict[str, str]) -> None:
    for command in (
        "cloister tiers", "cloister vault init",
        "printf 'play caf\\303\\251 \\344\\275\\240' | cloister run nano-1 - --system call",
        "cloister compare 'caf\303\251' --tiers nano-1 --max-tokens 8",
    ):
        done = shell(command, **environment)
        assert done.returncode == 0, done.stderr
        assert b"Traceback" not in done.stderr


def test_what_a_model_says_cannot_command_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    evil = "\x1b[2J\x1b]0;title\x07a\x9bm [/b] [red]x\r\u202eb\n\tc"
    display.show(evil, end="")
    display.table(evil, (evil,), [(evil,)])
    shown = capsys.readouterr().out
    assert not set(shown) & set("\x1b\x07\x9b\r\u202e")
    assert "[/b] [red]x" in shown
    assert shown.startswith("\N{REPLACEMENT CHARACTER}[2J")


def test_what_can_be_refused_is_refused_before_anything_heavy_is_imported(tmp_path: Path) -> None:
    heavy = "torch", "torchao", "executorch", "transformers"
    code = (
        "import sys; from cloister.cli import main\n"
        "status = main(sys.argv[1:])\n"
        f"print(status, [name for name in {heavy} if name in sys.modules])"
    )
    out = str(tmp_path / "out")
    (tmp_path / "taken").mkdir()
    for arguments in (
        ("quantize", "nothing", "-o", out), ("export", "nothing", "-o", out),
        ("import", "nothing", "-o", out), ("verify", "nothing"), ("run", "nothing", "x"),
        ("eval", "nothing", "--data", "nothing"), ("eval", "nano-1", "--data", "nothing"),
        ("distill", "--teacher", "nothing", "--tier", "nano-1", "--data", "x", "-o", out),
        ("quantize", str(reference.checkpoint_path("nano-1")), "-o", str(tmp_path / "taken")),
        ("run", "nano-1", "x", "--schema", "nothing.json"),
        ("bench", "--shape", "nano-1"), ("replay", "nano-1", "nothing"),
    ):
        done = subprocess.run(
            [sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True,
            env={**os.environ, "PYTHONPATH": ":".join(sys.path)}, cwd=tmp_path,
        )
        assert done.stdout.strip() == "1 []", (arguments, done.stdout, done.stderr)


def test_an_answer_follows_a_schema_and_tools_out_of_files(tmp_path: Path) -> None:
    schema, tools = tmp_path / "schema.json", tmp_path / "tools.json"
    schema.write_text(json.dumps({
        "type": "object", "properties": {"genre": {"enum": ["jazz", "rock"]}},
        "required": ["genre"], "additionalProperties": False}))
    tools.write_text(json.dumps(reference.tools()))
    asked = ("run", "nano-1", "play some jazz", "--system", "call", "--json")
    record = json.loads(run(*asked, "--schema", str(schema)).stdout)
    assert json.loads(record["text"]) == {"genre": "jazz"}
    record = json.loads(run(*asked, "--tools", str(tools)).stdout)
    assert json.loads(record["text"])["name"] == "PlayMusic"
    refused(run(*asked, "--tools", str(tools), "--max-tokens", "2"), "cut off")
    refused(run(*asked, "--tools", str(schema)), "list of tools")
    refused(run(*asked, "--tools", str(tools), "--schema", str(schema)), "one constraint")
    schema.write_text('{"$ref": "#"}')
    refused(run(*asked, "--schema", str(schema)), "without end")


@pytest.mark.parametrize("command", [
    "cloister tiers >&-", "cloister run nano-1 - <&-", "cloister chat nano-1 <&-",
    "printf 'play caf\\351\\n' | cloister chat nano-1",
    "printf 'play caf\\351' | cloister chat nano-1 --json",
])
def test_closed_streams_and_bytes_that_are_no_text_end_without_a_traceback(command: str) -> None:
    done = shell(command)
    assert b"Traceback" not in done.stderr, done.stderr
    assert b"caf" not in done.stderr
    if "printf" in command:
        assert done.returncode == 1
        assert b"UTF-8" in done.stderr


def test_a_piped_chat_begins_after_a_byte_order_mark_and_goes_on_after_an_empty_line() -> None:
    said = "\ufeffplay some jazz\r\n\r\nplay some rock\r\n".encode()
    record = json.loads(
        run("chat", "nano-1", "--system", "call", "--json", input=said).stdout)
    assert record["turns"] == 2
    assert json.loads(record["answers"][0])["arguments"]["genre"] == "jazz"


def test_a_prompt_with_the_line_ends_of_windows_is_answered_as_any_other() -> None:
    asked = ("run", "nano-1", "-", "--system", "call", "--json")
    texts = {
        json.loads(run(*asked, input=f"will it rain{end}in boston tomorrow{end}".encode()).stdout)[
            "text"] for end in ("\n", "\r\n")}
    assert len(texts) == 1


def test_what_cannot_be_replayed_is_refused_before_it_is_asked(tmp_path: Path) -> None:
    path, schema = tmp_path / "replay.json", tmp_path / "schema.json"
    schema.write_text("{}")
    asked = ("run", "nano-1", "play a song", "--replay", str(path))
    refused(run(*asked, "--temperature", "1"), "--seed")
    refused(run(*asked, "--schema", str(schema)), "no schema")
    assert not path.exists()
