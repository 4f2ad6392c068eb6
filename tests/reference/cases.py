"""The tiny random models behind the reference vectors: one entry per case, plain data.

Owns the list of configurations. Building the models and recording logits is make_vectors.py; nothing here needs torch.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

PROMPT_TOKENS = 64
DECODE_TOKENS = 64
GREEDY_TOKENS = 48


@dataclass(frozen=True)
class Case:
    """One model. `config` holds transformers' configuration fields; `activation` is what its FFN truly computes.

    `style` 4 writes config.json as transformers 4 did (rope_theta and rope_scaling at the top level), 5 as it does now.
    `published` overrides fields of the written config.json, as a published checkpoint of that family states them.
    `override` is the value of --activation that the conversion needs, for checkpoints that do not say the truth.
    """

    name: str
    family: str
    config: dict[str, Any] = field(default_factory=dict)
    activation: str = "relu"
    param: float | None = None
    style: int = 5
    published: dict[str, Any] = field(default_factory=dict)
    override: str | None = None


_ROPE_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
_ROPE_YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 64,
}
_SPARSELLAMA = {
    "model_type": "sparsellama",
    "architectures": ["SparseLlamaForCausalLM"],
    "auto_map": {
        "AutoConfig": "configuration_sparsellama.SparseLlamaConfig",
        "AutoModelForCausalLM": "modeling_sparsellama.SparseLlamaForCausalLM",
    },
    "hidden_act": "fatrelu",
    "hidden_act_param": 0.25,
}
_BAMBOO = {
    "model_type": "bamboo",
    "architectures": ["BambooForCausalLM"],
    "auto_map": {
        "AutoConfig": "configuration_bamboo.BambooConfig",
        "AutoModelForCausalLM": "modeling_bamboo.BambooForCausalLM",
    },
    "hidden_act": "relu",
}
_OPT_350M = {"do_layer_norm_before": False, "word_embed_proj_dim": 16}

CASES: tuple[Case, ...] = (
    Case("llama-mha-relu", "llama"),
    Case("llama-mha-silu", "llama", activation="silu"),
    Case("llama-gqa-tied-relu", "llama", {"num_key_value_heads": 2, "tie_word_embeddings": True}, style=4),
    Case("llama-theta-silu", "llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}, "silu"),
    Case("llama-theta-v4-relu", "llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}, style=4),
    Case("llama-llama3-relu", "llama", {"rope_parameters": _ROPE_LLAMA3, "num_key_value_heads": 2}),
    Case("llama-llama3-v4-silu", "llama", {"rope_parameters": _ROPE_LLAMA3}, "silu", style=4),
    Case(
        "llama-linear-relu",
        "llama",
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}},
        style=4,
    ),
    Case("llama-yarn-relu", "llama", {"rope_parameters": _ROPE_YARN}),
    Case("llama-bias-relu2", "llama", {"attention_bias": True, "mlp_bias": True}, "relu2"),
    Case("llama-bias-silu", "llama", {"attention_bias": True, "mlp_bias": True}, "silu"),
    Case("llama-headdim-relu", "llama", {"head_dim": 16, "num_key_value_heads": 1}),
    Case(
        "llama-wide-relu",
        "llama",
        {"hidden_size": 64, "intermediate_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2},
    ),
    Case("mistral-window-silu", "mistral", {"num_key_value_heads": 2, "sliding_window": 24}, "silu"),
    Case("mistral-window-v4-relu", "mistral", {"num_key_value_heads": 2, "sliding_window": 24}, style=4),
    Case("mistral-nowindow-drelu", "mistral", {"sliding_window": None}, "drelu", override="drelu"),
    Case("qwen2-silu", "qwen2", {"num_key_value_heads": 2}, "silu", style=4),
    Case("qwen2-drelu", "qwen2", {"num_key_value_heads": 2, "tie_word_embeddings": True}, "drelu", override="drelu"),
    Case(
        "qwen2-mixed-relu",
        "qwen2",
        {"num_hidden_layers": 3, "use_sliding_window": True, "sliding_window": 20, "max_window_layers": 1},
    ),
    Case(
        "qwen2-mixed-v4-silu",
        "qwen2",
        {"num_key_value_heads": 2, "use_sliding_window": True, "sliding_window": 20, "max_window_layers": 1},
        "silu",
        style=4,
    ),
    Case("sparsellama-fatrelu", "llama", activation="fatrelu", param=0.25, style=4, published=_SPARSELLAMA),
    Case("bamboo-drelu", "mistral", {"sliding_window": 32}, "drelu", style=4, published=_BAMBOO),
    Case("opt-pre-relu", "opt", {}),
    Case("opt-post-proj-relu", "opt", _OPT_350M),
    Case("opt-pre-silu", "opt", {"tie_word_embeddings": False}, "silu"),
)

TEXT_DEFAULTS: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 64,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": None,
}
OPT_RENAMES = {"intermediate_size": "ffn_dim", "hidden_act": "activation_function"}


def config_fields(case: Case) -> dict[str, Any]:
    """The keyword arguments of transformers' configuration class for this case (activation as far as it knows it)."""
    known = {"fatrelu": "relu", "drelu": "relu"}.get(case.activation, case.activation)
    fields = TEXT_DEFAULTS | {"hidden_act": known} | case.config
    if case.family == "opt":
        return {OPT_RENAMES.get(key, key): value for key, value in fields.items()}
    return {"num_key_value_heads": fields["num_attention_heads"]} | fields
