"""Typed reading of a checkpoint's config.json, and the fields in it that do not change the mathematics.

A field that nobody read, that is not listed here and that is not null is refused by name: it may change the result.
"""

from __future__ import annotations

import sys
from typing import Any, NoReturn

from flashsparse.errors import CheckpointError, UnsupportedModelError

_TRAINING = """activation_dropout attention_dropout attn_pdrop classifier_dropout dropout embd_pdrop
gradient_checkpointing hidden_dropout initializer_range init_std layerdrop pretraining_tp resid_pdrop resid_dropout"""
_BOOKKEEPING = """_attn_implementation _attn_implementation_autoset _commit_hash _experts_implementation
_flash_attn_2_enabled _name_or_path architectures attn_implementation chunk_size_feed_forward dtype finetuning_task
id2label label2id max_sequence_length model_max_length model_type name_or_path num_labels output_attentions
output_hidden_states output_scores pad_token_id problem_type return_dict sep_token_id seq_length task_specific_params
tf_legacy_loss tie_encoder_decoder tie_last_hidden_states tokenizer_class torch_dtype torchscript transformers.js_config
transformers_version unk_token_id unsloth_fixed unsloth_version use_bfloat16 use_cache use_flash_attention
use_flash_attn"""
_GENERATION = """bad_words_ids begin_suppress_tokens decoder_start_token_id diversity_penalty do_sample early_stopping
encoder_no_repeat_ngram_size exponential_decay_length_penalty forced_bos_token_id forced_eos_token_id length_penalty
max_length max_new_tokens min_length no_repeat_ngram_size num_beam_groups num_beams num_return_sequences prefix
remove_invalid_values repetition_penalty return_dict_in_generate suppress_tokens temperature top_k top_p typical_p"""

MAX_FLOAT = sys.float_info.max
IGNORED = frozenset(f"{_TRAINING} {_BOOKKEEPING} {_GENERATION}".split())

# Fields that are accepted at the one value that leaves the mathematics as it is.
NEUTRAL: dict[str, Any] = {
    "add_cross_attention": False,
    "attention_bias": False,
    "is_decoder": False,
    "is_encoder_decoder": False,
    "mlp_bias": False,
    "num_experts": 0,
    "partial_rotary_factor": 1.0,
    "pruned_heads": {},
    "rope_interleaved": False,
    "rope_traditional": False,
    "scale_embeddings": False,
    "use_mrope": False,
    "use_qk_norm": False,
    "use_sliding_window": False,
}


class Fields:
    """The fields of one configuration object. A missing or null field takes its default, as in transformers."""

    def __init__(self, raw: dict[str, Any], where: str = "") -> None:
        self.raw, self.where = raw, where
        self.used: set[str] = set()

    def name(self, field: str) -> str:
        return f"{self.where}.{field}" if self.where else field

    def malformed(self, field: str, found: Any, expected: str) -> NoReturn:
        raise CheckpointError(f"config.json: {self.name(field)}: found {found!r}, expected {expected}")

    def unsupported(self, field: str, found: Any, expected: str) -> NoReturn:
        raise UnsupportedModelError(f"config.json: {self.name(field)}: found {found!r}, supported: {expected}")

    def get(self, field: str, default: Any = None) -> Any:
        self.used.add(field)
        value = self.raw.get(field)
        return default if value is None else value

    def integer(self, field: str, default: int | None, least: int = 1, most: int = 2**63 - 1) -> int:
        value = self.get(field, default)
        if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
            self.malformed(field, value, f"an integer >= {least}" if most == 2**63 - 1 else f"{least} to {most}")
        return value

    def number(self, field: str, default: float | None, zero: bool = False) -> float:
        """A finite number > 0, or >= 0 with `zero`."""
        value = self.get(field, default)
        value = self._finite(field, value)
        if value < 0 or (value == 0 and not zero):
            self.malformed(field, value, "a number >= 0" if zero else "a number > 0")
        return value

    def _finite(self, field: str, value: Any) -> float:
        number = isinstance(value, int | float) and not isinstance(value, bool)
        # A large enough integer is no float at all.
        if not number or not -MAX_FLOAT <= value <= MAX_FLOAT:
            self.malformed(field, value, "a number")
        return float(value)

    def boolean(self, field: str, default: bool) -> bool:
        value = self.get(field, default)
        if not isinstance(value, bool):
            self.malformed(field, value, "true or false")
        return value

    def text(self, field: str, default: str | None) -> str:
        value = self.get(field, default)
        if not isinstance(value, str):
            self.malformed(field, value, "a string")
        return value

    def token_ids(self, field: str, default: int | None) -> int | list[int] | None:
        """A token id or a list of them. Null means that there is none, only a missing field takes the default."""
        value: int | list[int] | None = self.get(field, default if field not in self.raw else None)
        items = value if isinstance(value, list) else [] if value is None else [value]
        if not all(isinstance(one, int) and not isinstance(one, bool) and abs(one) < 2**63 for one in items):
            self.malformed(field, value, "a token id or a list of them")
        return value

    def finish(self, ignored: frozenset[str] = IGNORED) -> None:
        """Raises UnsupportedModelError for the first field left that may change the mathematics."""
        for field in sorted(set(self.raw) - self.used - ignored):
            value = self.raw[field]
            if value is None or (field in NEUTRAL and value == NEUTRAL[field]):
                continue
            expected = repr(NEUTRAL[field]) if field in NEUTRAL else "no such field (it may change the result)"
            self.unsupported(field, value, expected)
