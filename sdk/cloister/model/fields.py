"""The fields of a configuration that others made, each taken once, by name."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from typing import Any

from cloister.errors import CheckpointError, SettingError, UnsupportedFeature

__all__ = ["Fields"]

# Of training, bookkeeping or output format, or (the last line) read by some architectures, which
# take them first: where they are left over, none changes the logits of inference.
_HARMLESS = frozenset({
    "add_cross_attention", "attention_dropout", "auto_map", "axolotl_config", "bos_token",
    "chunk_size_feed_forward", "classifier_dropout", "cross_attention_hidden_size",
    "decoder_start_token_id", "dropout", "dtype", "embd_pdrop", "eos_token", "finetuning_task",
    "gradient_checkpointing", "hidden_dropout", "id2label", "initializer_factor",
    "initializer_range", "is_decoder", "is_encoder_decoder", "is_llama_config",
    "keys_to_ignore_at_inference", "label2id", "max_seq_len", "max_sequence_length",
    "model_max_length", "model_type", "name_or_path", "neftune_noise_alpha", "output_attentions",
    "output_hidden_states", "pad_token", "pad_token_id", "pretraining_tp", "problem_type",
    "resid_pdrop", "return_dict", "sep_token_id", "seq_length", "task_specific_params",
    "tf_legacy_loss", "tie_encoder_decoder", "tokenizer_class", "torch_dtype", "torchscript",
    "transformers.js_config", "transformers_version", "unk_token", "unk_token_id", "use_bfloat16",
    "use_cache",
    "hidden_act", "max_window_layers", "use_sliding_window",
})
# Settings of generation, which files of transformers 4 have in config.json: ours are the user's.
_GENERATION = frozenset({
    "assistant_confidence_threshold", "assistant_early_exit", "assistant_ensemble_weight",
    "assistant_lookbehind", "bad_words_ids", "begin_suppress_tokens", "cache_config",
    "cache_implementation", "compile_config", "constraints", "continuous_batching_config",
    "disable_compile", "diversity_penalty", "do_sample", "dola_layers", "early_stopping",
    "encoder_no_repeat_ngram_size", "encoder_repetition_penalty", "epsilon_cutoff",
    "eta_cutoff", "exponential_decay_length_penalty", "force_words_ids", "forced_bos_token_id",
    "forced_decoder_ids", "forced_eos_token_id", "guidance_scale", "is_assistant",
    "length_penalty", "low_memory", "max_cache_len", "max_length", "max_matching_ngram_size",
    "max_new_tokens", "max_time", "min_length", "min_new_tokens", "min_p",
    "no_repeat_ngram_size", "num_assistant_tokens", "num_assistant_tokens_schedule",
    "num_beam_groups", "num_beams", "num_return_sequences", "output_logits", "output_scores",
    "penalty_alpha", "prefill_chunk_size", "prefix", "prompt_lookup_num_tokens",
    "remove_invalid_values", "renormalize_logits", "repetition_penalty",
    "return_dict_in_generate", "return_legacy_cache", "sequence_bias", "speculation_type",
    "stop_strings", "suppress_tokens", "target_lookbehind", "temperature", "token_healing",
    "top_h", "top_k", "top_p", "typical_p", "use_model_defaults", "use_mtp",
    "watermarking_config",
})
_MARKS = ("_", "unsloth_")  # of fields that are private, or that a tool left its version in
_NEUTRAL: dict[str, object] = {"partial_rotary_factor": 1.0}  # asks for nothing with this value
_NULLABLE = frozenset({  # beside those whose default is None
    "attn_logit_softcapping", "final_logit_softcapping", "num_key_value_heads", "sliding_window",
})
_MUST_BE = {
    bool: "true or false", str: "a text", list: "a list", dict: "an object",
    int: "a whole number from {least} to 2**24", float: "a finite number above 0",
}


@dataclass
class Fields:
    """The fields of a configuration, each taken once; what is left over is refused."""

    values: dict[str, Any]
    defaults: dict[str, Any]
    source: str  # the name of the model's directory or file
    ignore: frozenset[str] = frozenset()
    taken: set[str] = field(default_factory=set)
    ignored: set[str] = field(default_factory=set)

    def take(self, name: str, kind: type, *, least: int = 1) -> Any:
        """Return the field `name`, else its default; null only where that is a value."""
        self.taken.add(name)
        if name not in self.values:
            if name in self.defaults:
                return self.defaults[name]
            raise CheckpointError(
                f"The configuration of {self.source} lacks {name}; copy it again."
            )
        value = self.values[name]
        if value is None and (self.defaults.get(name, ...) is None or name in _NULLABLE):
            return None
        good = type(value) is kind
        if kind is int:  # within what a tensor can have
            good = good and least <= value <= 2**24
        elif kind is float:  # JSON may hold NaN, and whole numbers that are too large for a float
            good = type(value) in (int, float) and 0 < value <= sys.float_info.max
        if not good:
            raise CheckpointError(
                f"Field {name} of the configuration of {self.source} must be "
                f"{_MUST_BE[kind].format(least=least)}; copy it again."
            )
        return float(value) if kind is float else value

    def part(self, name: str) -> Fields:
        """Return the fields of the object `name`, without defaults; none where it is absent."""
        values = self.take(name, dict) or {}
        return Fields(values, {}, self.source, self.ignore, ignored=self.ignored)

    def unsupported(self, what: str) -> UnsupportedFeature:
        """Return the error for a model that does `what`."""
        return UnsupportedFeature(f"{self.source} {what}, so it cannot be imported.")

    def done(self) -> None:
        """Raise UnsupportedFeature for a field that nobody took and that may ask for something."""
        for name in sorted(set(self.values) - self.taken - _HARMLESS - _GENERATION):
            asks = self.values[name] not in (None, False, "", [], {}, _NEUTRAL.get(name))
            if name in self.ignore:
                self.ignored.add(name)
            elif asks and not name.startswith(_MARKS):
                raise UnsupportedFeature(
                    f"{self.source} uses {name[:60]}, which Cloister does not implement; where it "
                    f"changes nothing that the model computes, pass --ignore {name[:60]}."
                )

    def check_ignored(self) -> None:
        """Raise SettingError for a field to be ignored that nobody would have refused."""
        for name in sorted(self.ignore - self.ignored):
            raise SettingError(
                f"{self.source} has no field {name[:60]} that is passed over; leave out --ignore "
                f"{name[:60]}."
            )
