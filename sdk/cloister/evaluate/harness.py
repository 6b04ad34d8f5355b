"""Bundles under EleutherAI's lm-eval, for its hundreds of public tasks.

    import lm_eval
    from cloister.evaluate.harness import CloisterLM

    model = CloisterLM("nano-1.cloister")
    lm_eval.simple_evaluate(model=model, tasks=["arc_easy"])
    lm_eval.simple_evaluate(model=model, tasks=["gsm8k"], apply_chat_template=True)

`apply_chat_template=True` lays requests out as a session does, `system_instruction` setting the
system prompt. Scores come from the bundle's own program, one request at a time; `batch_size` and
`device` have no meaning here. Import this module only where lm-eval is installed, with the extra
`train`; nothing else in the package imports it.

Shapes: T tokens, V vocabulary.
"""

from __future__ import annotations

import logging
import math
from contextlib import closing
from dataclasses import fields
from typing import TYPE_CHECKING, Any, TypeVar

import tokenizers
import torch
from rich.console import Console
from rich.progress import track

from cloister.errors import (
    ContextExceeded,
    EmptyPrompt,
    IncompatibleProgram,
    InvalidText,
    SettingError,
    TokenizerError,
)
from cloister.message import Message
from cloister.runtime.chat import Sampling
from cloister.runtime.engine import Engine
from cloister.runtime.generate import Decoding, generate, score
from cloister.runtime.sampling import Sampler

try:
    from lm_eval.api.model import TemplateLM
    from lm_eval.models.utils import normalize_gen_kwargs
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        'lm-eval is not installed; run pip install "cloister[train]".', name=error.name
    ) from error

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path

    from lm_eval.api.instance import Instance

__all__ = ["CloisterLM"]

_T = TypeVar("_T")
_LOG = logging.getLogger(__name__)
_SAMPLING = {field.name for field in fields(Sampling)}


class CloisterLM(TemplateLM):  # type: ignore[misc]  # lm-eval ships no types
    """A bundle, as lm-eval's evaluator drives it.

    `bundle` is a directory or an engine that is loaded already. `add_bos` begins every text with
    the bundle's begin token, which models trained that way need (Gemma); chat templates write it
    themselves. As everywhere in lm-eval, a special token that a task spells out counts as one, and
    a context that is too long loses its beginning; how many did is logged.

    Raises:
        BundleError, TokenizerError, NotEnoughMemory: see `Engine`.
        SettingError: `add_bos` for a bundle without a begin token.
    """

    def __init__(self, bundle: str | Path | Engine, *, add_bos: bool = False) -> None:
        super().__init__()
        self.engine = bundle if isinstance(bundle, Engine) else Engine(bundle)
        manifest = self.engine.bundle.manifest
        if add_bos and manifest.bos is None:
            raise SettingError(
                f"Bundle {manifest.name} has no begin token to add; leave add_bos out."
            )
        self._add_bos = add_bos
        # The engine's own tokenizer keeps special tokens that are spelled in a text as text.
        self._encoder = tokenizers.Tokenizer.from_file(str(self.engine.bundle.tokenizer_path))
        self._encoder.no_padding()
        self._encoder.no_truncation()

    def __repr__(self) -> str:
        return f"CloisterLM({self.engine!r})"

    @property
    def eot_token_id(self) -> int:
        """The token that ends an answer: the chat template's, or else the model's."""
        end = self.engine.tokenizer.turn_end
        return self._special(self.engine.bundle.manifest.eos if end is None else (end,))

    @property
    def prefix_token_id(self) -> int:
        """The token before a text that has no context: begin, or else end."""
        manifest = self.engine.bundle.manifest
        return self._special((*([] if manifest.bos is None else [manifest.bos]), *manifest.eos))

    @property
    def max_length(self) -> int:
        """Most tokens, context and continuation together."""
        return self.engine.context

    @property
    def tokenizer_name(self) -> str:
        """The key of lm-eval's cache of laid-out requests."""
        return f"{self.engine.bundle.manifest.name}-{self.engine.model_id}"

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **_kwargs: Any
    ) -> list[int]:
        """Return the ids of `string`, with the begin token if asked for; never with two.

        Raises:
            InvalidText: `string` has a lone surrogate.
        """
        try:
            ids: list[int] = self._encoder.encode(string, add_special_tokens=False).ids
        except (TypeError, UnicodeEncodeError):
            raise InvalidText("A request is not valid Unicode text; correct the task.") from None
        bos = self.engine.bundle.manifest.bos
        add = self._add_bos if add_special_tokens is None else add_special_tokens
        return [bos, *ids] if add and bos is not None and ids[:1] != [bos] else ids

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """Render a conversation by the bundle's chat template.

        Raises:
            PromptError, TokenizerError: see `Tokenizer.encode_chat`; or the text cannot be read
                back as the tokens it stands for.
        """
        tokenizer = self.engine.tokenizer
        said = [Message(role=turn["role"], content=turn["content"]) for turn in chat_history]
        ids = tokenizer.encode_chat(said, add_generation_prompt=add_generation_prompt)
        text = tokenizer.render(said, add_generation_prompt=add_generation_prompt)
        if self._encoder.encode(text, add_special_tokens=False).ids != ids:
            raise TokenizerError(
                f"Bundle {self.engine.bundle.manifest.name} cannot lay out a request of this task "
                "in plain text; run the task without its chat template."
            )
        return text

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """Return the log-likelihood of each text in nats, in windows where it is too long.

        Raises:
            SettingError: the bundle has neither begin nor end token to start from.
        """
        scores = []
        for request in _track(requests, "Scoring", disable_tqdm):
            windows = get_rolling_token_windows(
                self.tok_encode(request.args[0], add_special_tokens=False),
                self.prefix_token_id, self.max_length, 1,
            )
            scores.append(math.fsum(
                self._score(*make_disjoint_window(window))[0] for window in windows
            ))
        return scores

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Return the answer to each context, up to a stop text, the end token, or the length asked.

        Raises:
            SettingError: a generation argument that is unknown or out of bounds.
        """
        asked = [
            (self.tok_encode(context) or [self.prefix_token_id], normalize_gen_kwargs(arguments))
            for context, arguments in (request.args for request in requests)
        ]
        self._log_cut(len(ids) + arguments["max_gen_toks"] for ids, arguments in asked)
        return [
            self._generate(ids, arguments)
            for ids, arguments in _track(asked, "Answering", disable_tqdm)
        ]

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]],
        disable_tqdm: bool = False, **_kwargs: Any
    ) -> list[tuple[float, bool]]:
        """Return each continuation's log-likelihood in nats, and whether it is the greedy one."""
        self._log_cut(len(before) + len(after) - 1 for _, before, after in requests)
        return [
            self._score(before, after)
            for _, before, after in _track(requests, "Scoring", disable_tqdm)
        ]

    def _score(self, before: Sequence[int], after: Sequence[int]) -> tuple[float, bool]:
        """Return the log-likelihood of `after` in nats, and whether it is the greedy answer."""
        if not after:
            raise EmptyPrompt("A continuation has no token of its own; correct the task's choices.")
        if len(after) > self.max_length:
            raise ContextExceeded(
                f"A continuation has {len(after)} tokens and the context holds "
                f"{self.max_length}; choose another task."
            )
        before = before or [self.prefix_token_id]  # a context may be nothing but spaces
        ids = [*before, *after][:-1][-self.max_length:]
        total, greedy, wanted = 0.0, True, torch.tensor(after)
        for logits_TV in score(self.engine, ids, len(ids) - len(after)):
            wanted_T, wanted = wanted[:len(logits_TV)], wanted[len(logits_TV):]
            logprobs_TV = logits_TV.log_softmax(-1)
            total += float(logprobs_TV.gather(1, wanted_T[:, None]).double().sum())
            greedy = greedy and bool((logits_TV.argmax(-1) == wanted_T).all())
        if not math.isfinite(total):
            raise IncompatibleProgram(
                "The program gave logits that are not finite numbers; export the bundle again."
            )
        return total, greedy

    def _generate(self, ids: list[int], arguments: dict[str, Any]) -> str:
        stops, limit = arguments.pop("until"), arguments.pop("max_gen_toks")
        if arguments.pop("do_sample"):
            arguments.setdefault("temperature", 1.0)  # as transformers takes it
        unknown = sorted(set(arguments) - _SAMPLING)
        if unknown:
            raise SettingError(
                f"A task asks for the generation argument {unknown[0]}; use only "
                f"{', '.join(sorted(_SAMPLING))}."
            )
        if not 1 <= limit < self.max_length:
            raise SettingError(
                f"max_gen_toks is {limit}; it must be from 1 to {self.max_length - 1}."
            )
        # lm-eval seeds torch: repeats differ, and a second run gives the same.
        sampler = Sampler(Sampling(**{"seed": int(torch.randint(2**62, ())), **arguments}))
        end = self.engine.bundle.manifest.eos
        decoding = Decoding(sampler=sampler, end=end, limit=limit)
        pieces, text = self.engine.tokenizer.stream(), ""
        prompt = ids[limit - self.max_length:]

        def cut() -> str | None:
            ends = [text.index(stop) for stop in stops if stop and stop in text]
            return text[:min(ends)] if ends else None

        with closing(generate(self.engine, prompt, decoding)) as choices:
            for choice in choices:
                text += "" if choice.id in end else pieces.push(choice.id)
                if (answer := cut()) is not None:
                    return answer
        text += pieces.end()
        return text if (answer := cut()) is None else answer

    def _log_cut(self, lengths: Iterable[int]) -> None:
        cut = sum(length > self.max_length for length in lengths)
        if cut:
            _LOG.warning(
                "%d contexts were cut at the front to the %d tokens that %s holds.",
                cut, self.max_length, self.engine.bundle.manifest.name,
            )

    def _special(self, ids: Sequence[int]) -> int:
        if not ids:
            raise SettingError(
                f"Bundle {self.engine.bundle.manifest.name} has no begin or end token to score a "
                "text without context; choose a task with contexts."
            )
        return ids[0]


def _track(items: list[_T], what: str, quiet: bool) -> Iterable[_T]:
    return track(items, what, console=Console(stderr=True), disable=quiet)
