"""The model card says what the records say."""

from __future__ import annotations

import json
from pathlib import Path

from cloister.reference.card import card


def losses(kld: float, ratio: float) -> dict[str, object]:
    return {"metrics": {"mean_kld": kld, "ppl_ratio": ratio}, "errors": {}}


def test_scores_are_divided_by_pros_and_recovery_is_of_what_was_lost(tmp_path: Path) -> None:
    for tier, exact, bits in (("pro", 0.8, 1.5), ("nano-1", 0.78, 2.0)):
        (tmp_path / f"{tier}.json").write_text(json.dumps({
            "evaluation": {
                "call": {"metrics": {"frame_exact": exact, "mean_kld": 0.01, "ppl_ratio": 1.001},
                         "errors": {"frame_exact": 0.01}},
                "story": {"metrics": {"bits_per_byte": bits}, "errors": {"bits_per_byte": 0.02}},
            },
            **({"post_training_quantization": {"call": losses(0.04, 1.005)}}
               if tier == "nano-1" else {}),
        }))
    text = card(tmp_path)
    assert "| `call` | exact frame | 80.0% ± 1.0% | 78.0% ± 1.0% |" in text
    assert "| `call` | exact frame | 1.000 | 0.975 |" in text
    assert "| `story` | bits a byte | 1.000 | 0.750 |" in text
    rows = [line.split(" | ") for line in text.splitlines() if line.startswith("| nano-1")]
    after, trained = rows[:2]
    assert after[0] == "| nano-1, post-training" and after[-1] == "- |"
    assert trained[2] == "0.01" and trained[-1] == "75%, 80% |"
    assert "distillation brings" not in text


def test_what_the_bench_of_distillation_found_is_told(tmp_path: Path) -> None:
    (tmp_path / "distillation.json").write_text(json.dumps({
        "command": "python tests/bench/distillation.py --seeds 0,1", "tier": "nano-1",
        "steps": 5, "teacher_name": "pro", "teacher": 0.25, "seeds": [0, 1],
        "bytes_a_token": 51.2, "variants": [
            {"variant": "pruned, taught", "cross_entropy": [0.5, 0.25], "gap_closed": 0.62}],
    }))
    text = card(tmp_path)
    assert "| pruned, taught | 0.5000, 0.2500 | 62% |" in text
    assert "Draws on disk take 51 bytes a token." in text
    assert "`python tests/bench/distillation.py --seeds 0,1`" in text


def test_what_a_tier_hears_stands_beside_what_it_reads(tmp_path: Path) -> None:
    def report(**metrics: float) -> dict[str, object]:
        return {"metrics": metrics, "errors": dict.fromkeys(metrics, 0.01)}

    (tmp_path / "pro.json").write_text(json.dumps({"senses": {"evaluation": {
        "orders by people": report(frame_exact=0.8, slot_f1=0.9),
        "lines, clean": report(cer=0.02)}}}))
    (tmp_path / "nano-1.json").write_text(json.dumps({}))
    text = card(tmp_path)
    assert "| what | score | pro |" in text
    assert "| orders by people | exact frame | 80.0% ± 1.0% |" in text
    assert "| lines, clean | character errors | 2.0% ± 1.0% |" in text
    assert "| redact by camera, printed | exact text | - |" in text
