"""FlashSparse as a model of EleutherAI's lm-evaluation-harness, under the name `flashsparse`.

    python -m flashsparse.lm_eval --model_args pack=DIR,dram=2GB --tasks arc_easy

takes every option of `lm_eval`. The harness knows only models that were imported, so that `lm_eval --model flashsparse`
itself does not; programs import this module and use it as any other. Needs the extra `eval`. Requests run one by one:
there is one KV cache. What is scored after what is likelihood.py's.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

try:
    from lm_eval.api.model import LM
    from lm_eval.api.registry import register_model
except ImportError as error:
    raise ImportError(f"lm-evaluation-harness is missing ({error}): pip install 'flashsparse[eval]'") from error
from tqdm import tqdm

import flashsparse
from flashsparse.errors import FlashSparseError, UsageError
from flashsparse.likelihood import cut, encode_pair, feed, rolling, score, truncated

MAX_TOKENS = 256  # the harness's default for generate_until
_LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
_NEUTRAL = {"num_beams": 1, "repetition_penalty": 1.0, "length_penalty": 1.0, "min_p": 0.0}


@register_model("flashsparse")
class FlashSparseLM(LM):
    """A pack behind the harness's three requests.

    `pack`, `dram`, `max_kv_size`, `threads`, `io_threads` and `read_mode` are those of `flashsparse.load`. Contexts
    longer than the KV cache lose their beginning, as in the harness's own models. `batch_size` other than 1 and "auto"
    is refused with a UsageError; `max_batch_size` and `device`, which the harness's command line passes whatever it was
    told, are not used.
    """

    def __init__(
        self,
        pack: str,
        dram: str | int | None = None,
        max_kv_size: int | None = None,
        threads: int | None = None,
        io_threads: int | None = None,
        read_mode: str = "auto",
        batch_size: int | str | None = None,
        max_batch_size: int | None = None,
        device: str | None = None,
    ) -> None:
        super().__init__()
        if str(batch_size) not in ("None", "1", "auto"):
            raise UsageError(f"batch_size is {batch_size}, expected 1 or auto: requests run one by one")
        self.engine = flashsparse.load(
            pack,
            dram=dram,
            max_kv_size=max_kv_size,
            threads=threads,
            io_threads=io_threads,
            read_mode=read_mode,
            on_plan=lambda plan: print(plan.describe(), file=sys.stderr),
        )
        if self.engine.tokenizer is None:
            self.engine.close()
            raise UsageError(f"{pack}: the pack has no tokenizer, and the harness speaks text")
        self.tokenizer: Any = self.engine.tokenizer
        self.max_length = min(self.engine.context_limit, self.engine.plan.max_kv_size)

    @property
    def prefix(self) -> int | None:
        """The token that an empty context is: BOS, or EOS where there is none."""
        found = (self.tokenizer.bos_token_id, self.tokenizer.eos_token_id)
        return next((int(token) for token in found if token is not None), None)

    def encode(self, text: str, special: bool) -> list[int]:
        """Token ids; `special` adds what begins a text, unless the text spells it out."""
        begin = self.tokenizer.bos_token
        special = special and not (begin and text.startswith(begin))
        return [int(token) for token in self.tokenizer.encode(text, add_special_tokens=special, verbose=False)]

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """(log-probability of the continuation, whether it is the greedy one) of each (context, continuation)."""
        results = []
        for request in tqdm(requests, desc="loglikelihood", disable=disable_tqdm):
            context, continuation = request.args
            results.append(self._score(*encode_pair(self.encode, context, continuation, self.prefix)))
            self.cache_hook.add_partial("loglikelihood", request.args, results[-1])
        return results

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-probability of each whole text, in windows of the KV cache's size."""
        results = []
        for request in tqdm(requests, desc="loglikelihood_rolling", disable=disable_tqdm):
            if self.prefix is None:
                raise UsageError("the tokenizer has neither a BOS nor an EOS token for a text to begin with")
            pairs = rolling(self.encode(request.args[0], True), self.prefix, self.max_length)
            results.append(sum(self._score(*pair)[0] for pair in pairs))
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, results[-1])
        return results

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """The continuation of each (context, options), up to a stop sequence, an end token or the longest length."""
        results = []
        for request in tqdm(requests, desc="generate_until", disable=disable_tqdm):
            context, given = request.args
            results.append(self._generate(context, *generation_options(given)))
            self.cache_hook.add_partial("generate_until", request.args, results[-1])
        return results

    def _score(self, context: list[int], continuation: list[int]) -> tuple[float, bool]:
        """Only the continuation's logits are kept, a step of them at a time."""
        inputs = truncated(context, continuation, self.max_length)
        first = len(inputs) - len(continuation)
        total, greedy = 0.0, True
        with self.engine.session() as session:
            for start, logits in feed(session, inputs, self.engine.manifest.prefill_chunk):
                skipped = max(0, first - start)
                end = start + len(logits) - first
                if end > 0:
                    likely, same = score(logits[skipped:], continuation[start + skipped - first : end])
                    total, greedy = total + likely, greedy and same
        return total, greedy

    def _generate(self, context: str, stops: list[str], length: int, sampling: dict[str, Any]) -> str:
        if length >= self.max_length:
            raise UsageError(f"{length} tokens to generate, but the KV cache holds {self.max_length}: give max_kv_size")
        ids = self.encode(context, True)[-(self.max_length - length) :]
        text = ""
        with self.engine.session() as session:
            for piece in session.generate(ids, max_tokens=length, **sampling):
                text, stopped = cut(text + piece.text, stops)
                if stopped:
                    break
        return text

    @property
    def tokenizer_name(self) -> str:
        """What names the tokenizer in the harness's caches: the pack's digest."""
        return self.engine.manifest.digest

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The tokenizer's template, for the harness's records; there is one at most."""
        return (self.tokenizer.chat_template or "") if chat_template else None

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The conversation as the tokenizer's template renders it."""
        rendered: str = self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )
        return rendered


def generation_options(given: dict[str, Any]) -> tuple[list[str], int, dict[str, Any]]:
    """(stop sequences, longest length, sampling arguments of Session.generate) of a task's generation options.

    Raises UsageError for an option that is not supported: without it the result would be another.
    """
    left = dict(given)
    until = left.pop("until", None) or []
    lengths = [value for name in _LENGTHS if (value := left.pop(name, None)) is not None]
    temp = float(left.pop("temperature", None) or 0.0)
    if not left.pop("do_sample", temp > 0):
        temp = 0.0
    sampling = {"temp": temp} | {name: left.pop(name) for name in ("top_p", "top_k", "seed") if name in left}
    unknown = {name: value for name, value in left.items() if value is not None and _NEUTRAL.get(name) != value}
    if unknown:
        raise UsageError(f"generation options {unknown} are not supported")
    return [until] if isinstance(until, str) else list(until), int(lengths[0] if lengths else MAX_TOKENS), sampling


def main() -> None:
    """The harness's own command line, with this model as the default one."""
    from lm_eval.__main__ import cli_evaluate

    if not any(word.partition("=")[0] in ("--model", "-M") for word in sys.argv):
        sys.argv += ["--model", "flashsparse"]
    try:
        cli_evaluate()
    except FlashSparseError as error:
        sys.exit(f"flashsparse: {' '.join(str(error).split())}")


if __name__ == "__main__":
    main()
