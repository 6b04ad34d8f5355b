"""What a tokenizer cannot do on a phone is said when a bundle is made."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tests.unit.model.spoken import CHATML, byte_level, sentence_pieces, special

from cloister.commands.make import show_receipt
from cloister.export import phone
from cloister.tokenizer import Tokenizer


@pytest.mark.parametrize(("make", "said"), [
    (lambda: byte_level(special("<|im_start|>", "<|im_end|>")), None),
    (lambda: sentence_pieces(special("<|im_start|>", "<|im_end|>"), "first"),
     "no PreTokenizer Metaspace"),
    (lambda: byte_level(special("<|im_start|>", "<|im_end|>", rstrip=True)), "other ids"),
])
def test_what_a_tokenizer_cannot_do_on_a_phone_is_found_out(
    tmp_path: Path, make: Any, said: str | None
) -> None:
    backend = make()
    path = tmp_path / "tokenizer.json"
    backend.save(str(path))
    found = phone.complaint(path, Tokenizer(backend, CHATML), ["hello there", "who are you?"])
    assert found is None if said is None else said in str(found)


@pytest.mark.parametrize("reason", [None, "their tokenizer has no PreTokenizer Metaspace"])
def test_export_says_so_in_a_line(
    capsys: pytest.CaptureFixture[str], reason: str | None
) -> None:
    lost = {"n": 1, "mean_kld": 0.0, "p99_kld": 0.0, "top1": 1.0, "relative_error": 0.0}
    show_receipt({"bundle": "x", "size_bytes": 1, "program_against_checkpoint": lost,
                  "parts_against_checkpoint": {"parts": 9, "worst": {"part": "head", "size": 0.0}},
                  "against_parent": {"parent": None, "reason": "none"}, "further_programs": [],
                  "phone_tokenizer": {"reason": reason}})
    said = capsys.readouterr().out
    assert ("phones" in said) == (reason is not None)
    assert "unquantized" not in said
