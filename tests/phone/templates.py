"""Chat templates that others made: out of TRL's wheel on PyPI (Apache-2.0), whose code is not run.

They are those of the models that TRL trains, character for character.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import zipfile
from functools import cache
from pathlib import Path

import platformdirs
import pytest

_WHEEL = "trl-1.16.0-py3-none-any.whl"
_SHA256 = "c4726e139dd40e1a41661511c639c8a68416782b2e3e8c0befebd77bb7ba0396"
# By name: the tokens that the template is given.
THEIRS = {
    "llama3": {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"},
    "gemma": {"bos_token": "<bos>", "eos_token": "<eos>"},
    "gemma3": {"bos_token": "<bos>", "eos_token": "<eos>"},
    "phi3": {"bos_token": "<s>", "eos_token": "<|endoftext|>"},
    "phi3_5": {"bos_token": "<s>", "eos_token": "<|endoftext|>"},
    "qwen2_5": {"eos_token": "<|im_end|>"},
    "qwen3": {"eos_token": "<|im_end|>"},
    "cohere": {"bos_token": "<BOS_TOKEN>", "eos_token": "<|END_OF_TURN_TOKEN|>"},
    "lfm2": {"bos_token": "<|startoftext|>", "eos_token": "<|im_end|>"},
    "glm4moe": {"eos_token": "<|user|>"},
}


@cache
def theirs() -> dict[str, str]:
    """Return the templates by name, fetched once into the tests' cache."""
    given = os.environ.get("CLOISTER_TEST_CACHE")
    folder = Path(given) if given else platformdirs.user_cache_path("cloister-tests", False)
    if not (folder / _WHEEL).is_file():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as work:
            wanted = Path(work, "requirements.txt")
            wanted.write_text(f"trl==1.16.0 --hash=sha256:{_SHA256}\n")
            done = subprocess.run(
                [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:",
                 "--disable-pip-version-check", "--dest", work, "--requirement", str(wanted)],
                capture_output=True, text=True, timeout=540)
            if done.returncode:
                pytest.fail(f"pip could not fetch {_WHEEL}: {done.stderr.strip()[-300:]}")
            Path(work, _WHEEL).replace(folder / _WHEEL)
    with zipfile.ZipFile(folder / _WHEEL) as wheel:
        return {name: wheel.read(f"trl/chat_templates/{name}.jinja").decode() for name in THEIRS}
