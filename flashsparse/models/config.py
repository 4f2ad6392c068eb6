"""The normalized configuration: what a checkpoint's config.json means, in the one form that packs carry.

Fields keep mlx-lm's names. Missing fields take the defaults of transformers' classes; the activation comes from the
configuration and the known quirks of a family, or from the user's option. Reads no tensors.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

from flashsparse.errors import UnsupportedModelError, UsageError
from flashsparse.models.fields import Fields
from flashsparse.models.rope import normalize_rope
from flashsparse.pack.config import LAYER_TYPES, MAX_LAYERS, MAX_POSITIONS, SOURCE_MODEL_TYPES
from flashsparse.pack.manifest import ACTIVATIONS, Activation

SUPPORTED = tuple(sorted(name for names in SOURCE_MODEL_TYPES.values() for name in names))
CUSTOM_CODE = (
    "bamboo",
    "minicpm",
    "sparsellama",
)  # published with their own code, which is never run
_ALIASES = {"swish": "silu", "relu_2": "relu2", "relu-squared": "relu2", "relu_squared": "relu2"}

# transformers' defaults where they differ between the families that load as Llama
_DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {
        "vocab_size": 32000, "intermediate_size": 11008, "max_position_embeddings": 2048,
        "bos_token_id": 1, "eos_token_id": 2,
    },
    "mistral": {
        "vocab_size": 32000, "intermediate_size": 14336, "max_position_embeddings": 131072, "num_key_value_heads": 8,
        "bos_token_id": 1, "eos_token_id": 2,
    },
    "minicpm": {
        "vocab_size": 32000, "intermediate_size": 11008, "max_position_embeddings": 2048,
        "bos_token_id": 1, "eos_token_id": 2, "tie_word_embeddings": True,
    },
    "qwen2": {
        "vocab_size": 151936, "intermediate_size": 22016, "max_position_embeddings": 32768,
        "num_key_value_heads": 32, "bos_token_id": None, "eos_token_id": None,
    },
}  # fmt: skip
_BASE = {"sparsellama": "llama", "bamboo": "mistral"}


@dataclass(frozen=True)
class NormalizedModel:
    """A checkpoint's configuration, understood. `config` is what the pack's config.json holds."""

    family: str  # "llama" or "opt"
    source_model_type: str
    config: dict[str, Any]
    activation: Activation
    gated: bool
    layers: int
    hidden_size: int
    intermediate_size: int
    vocab_size: int
    heads: int
    kv_heads: int
    head_dim: int


def parse_activation(text: str) -> Activation:
    """An activation from an option's NAME[:PARAM], e.g. "relu" or "fatrelu:0.01".

    Raises UsageError for an unknown name (listing the supported ones) and for a missing, surplus or bad parameter.
    """
    name, _, param = text.strip().partition(":")
    name = _ALIASES.get(name, name)
    if name not in ACTIVATIONS:
        raise UsageError(f"--activation {text!r}: unknown activation {name!r}, supported: {', '.join(ACTIVATIONS)}")
    if name != "fatrelu":
        if param:
            raise UsageError(f"--activation {text!r}: {name} takes no parameter")
        return Activation(name, None, "option")
    try:
        threshold = float(param)
    except ValueError:
        raise UsageError(f"--activation {text!r}: expected fatrelu:THRESHOLD, for example fatrelu:0.01") from None
    if not math.isfinite(threshold) or threshold < 0:
        raise UsageError(f"--activation {text!r}: the threshold must be a number >= 0")
    return Activation(name, threshold, "option")


def normalize_config(raw: dict[str, Any], activation_override: str | None = None) -> NormalizedModel:
    """Normalizes a checkpoint's parsed config.json. `activation_override` is NAME[:PARAM] or None.

    Raises UnsupportedModelError naming the field for an unknown architecture or activation and for every field that
    may change the mathematics and is not mapped; CheckpointError for a field of a wrong type.
    """
    fields = Fields(raw)
    model_type = fields.get("model_type")
    if model_type not in SUPPORTED:
        fields.unsupported("model_type", model_type, ", ".join(SUPPORTED))
    _refuse_foreign_parts(fields, model_type)
    override = None if activation_override is None else parse_activation(activation_override)
    build = _opt if model_type == "opt" else _llama
    model = build(fields, model_type, override)
    fields.finish()
    return model


def _refuse_foreign_parts(fields: Fields, model_type: str) -> None:
    for name in ("quantization_config", "quantization", "compression_config"):
        if fields.get(name) is not None:
            fields.unsupported(name, "a quantized checkpoint", "unquantized weights; use the original checkpoint")
    if fields.get("auto_map") and model_type not in CUSTOM_CODE:
        fields.unsupported(
            "auto_map", fields.raw["auto_map"], "no custom code (it is never run, and may change results)"
        )


def _activation(fields: Fields, name_field: str, default: str, override: Activation | None) -> Activation:
    name = fields.text(name_field, default)
    param = fields.get("hidden_act_param")
    if override is not None:
        return override
    name = _ALIASES.get(name, name)
    if name not in ACTIVATIONS:
        fields.unsupported(name_field, name, f"{', '.join(ACTIVATIONS)} (--activation NAME[:PARAM] overrides)")
    if name != "fatrelu":
        if param:
            fields.unsupported("hidden_act_param", param, f"no parameter for {name}")
        return Activation(name)
    return Activation(name, fields.number("hidden_act_param", None, zero=True))


def _bamboo_activation(fields: Fields, override: Activation | None) -> Activation:
    """Bamboo applies its activation to gate and up: relu means dReLU."""
    activation = _activation(fields, "hidden_act", "relu", override)
    if override is not None:
        return activation
    if activation.name not in ("relu", "drelu"):
        fields.unsupported("hidden_act", activation.name, "relu in a bamboo model")
    return replace(activation, name="drelu")


def _attention(fields: Fields, defaults: dict[str, Any], hidden: int) -> tuple[int, int, int]:
    """(heads, kv_heads, head_dim), checked against each other."""
    heads = fields.integer("num_attention_heads", 32)
    # A missing field takes the family's default, null means as many as there are heads.
    missing = "num_key_value_heads" not in fields.raw
    kv_heads = fields.integer("num_key_value_heads", defaults.get("num_key_value_heads", heads) if missing else heads)
    if heads % kv_heads:
        fields.malformed("num_key_value_heads", kv_heads, f"a divisor of num_attention_heads ({heads})")
    if fields.get("head_dim") is None and hidden % heads:
        fields.malformed("hidden_size", hidden, f"a multiple of num_attention_heads ({heads})")
    head_dim = fields.integer("head_dim", hidden // heads)
    if head_dim % 2:
        fields.unsupported("head_dim", head_dim, "an even number (rotary embeddings rotate pairs)")
    return heads, kv_heads, head_dim


def _windows(fields: Fields, base: str, layers: int) -> tuple[list[str], int | None]:
    """(layer_types, sliding_window): which layers see only the last `sliding_window` tokens."""
    window = _window(fields, base)
    first = fields.integer("max_window_layers", 28, 0) if base == "qwen2" else 0
    types = ["sliding_attention" if window is not None and i >= first else "full_attention" for i in range(layers)]
    stated = fields.get("layer_types")
    if stated is not None:
        if not isinstance(stated, list) or len(stated) != layers or any(one not in LAYER_TYPES for one in stated):
            fields.unsupported("layer_types", stated, f"{layers} of {', '.join(LAYER_TYPES)}")
        # Only Qwen2 obeys layer_types in transformers; elsewhere a list that disagrees is ambiguous.
        if stated != types and (base != "qwen2" or (window is None and "sliding_attention" in stated)):
            fields.unsupported("layer_types", stated, f"what sliding_window says: {types}")
        types = list(stated)
    return types, window if "sliding_attention" in types else None


def _window(fields: Fields, base: str) -> int | None:
    if base == "mistral":
        # Null means no window here, a missing field means transformers' default.
        missing = "sliding_window" not in fields.raw
        return fields.integer("sliding_window", 4096) if missing or fields.get("sliding_window") is not None else None
    if base == "qwen2":
        missing = "sliding_window" not in fields.raw
        used = fields.boolean("use_sliding_window", False)
        if fields.get("sliding_window") is None and not missing:
            return None
        return fields.integer("sliding_window", 4096) if used else None
    if fields.get("sliding_window") is not None:
        fields.unsupported("sliding_window", fields.raw["sliding_window"], f"null in a {base} model")
    return None


def _biases(fields: Fields, base: str) -> tuple[bool, bool]:
    """(attention_bias, mlp_bias)"""
    if base == "qwen2":
        fields.get("attention_bias")  # not a field of Qwen2: q, k and v always have one
        return True, False
    attention, mlp = fields.boolean("attention_bias", False), fields.boolean("mlp_bias", False)
    if (base == "mistral" and attention) or (base in ("mistral", "minicpm") and mlp):
        name = "attention_bias" if base == "mistral" and attention else "mlp_bias"
        fields.unsupported(name, True, f"false in a {base} model")
    return attention, mlp


def _scales(fields: Fields, base: str, hidden: int, layers: int) -> dict[str, float]:
    """The factors of MiniCPM's muP: on embeddings, on what each attention and FFN adds, and under the logits.

    Source: MiniCPM's published modeling code. Its classes default all three to 1, which no checkpoint was trained
    with, so that a configuration without them is refused.
    """
    if base != "minicpm":
        return {}
    if not fields.boolean("use_mup", True):
        fields.unsupported("use_mup", False, "true")
    return {
        "embedding_multiplier": fields.number("scale_emb", None),
        "residual_multiplier": fields.number("scale_depth", None) / math.sqrt(layers),
        "logits_divisor": hidden / fields.integer("dim_model_base", None),
    }


def _llama(fields: Fields, model_type: str, override: Activation | None) -> NormalizedModel:
    base = _BASE.get(model_type, model_type)
    defaults = _DEFAULTS[base]
    hidden = fields.integer("hidden_size", 4096)
    intermediate = fields.integer("intermediate_size", defaults["intermediate_size"])
    layers = fields.integer("num_hidden_layers", 32, most=MAX_LAYERS)
    vocab = fields.integer("vocab_size", defaults["vocab_size"])
    heads, kv_heads, head_dim = _attention(fields, defaults, hidden)
    positions = fields.integer("max_position_embeddings", defaults["max_position_embeddings"], most=MAX_POSITIONS)
    theta, scaling = normalize_rope(fields, positions)
    attention_bias, mlp_bias = _biases(fields, base)
    layer_types, window = _windows(fields, base, layers)
    if model_type == "bamboo":
        activation = _bamboo_activation(fields, override)
    else:
        activation = _activation(fields, "hidden_act", "silu", override)
    config = {
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "max_position_embeddings": positions,
        "rms_norm_eps": fields.number("rms_norm_eps", 1e-6),
        "rope_theta": theta,
        "rope_scaling": scaling,
        "rope_traditional": False,
        "attention_bias": attention_bias,
        "mlp_bias": mlp_bias,
        "layer_types": layer_types,
        "sliding_window": window,
        **_scales(fields, base, hidden, layers),
        **_common(fields, model_type, activation, vocab, defaults, defaults.get("tie_word_embeddings", False)),
    }
    return NormalizedModel(
        "llama", model_type, config, activation, True, layers, hidden, intermediate, vocab, heads, kv_heads, head_dim
    )


def _opt(fields: Fields, model_type: str, override: Activation | None) -> NormalizedModel:
    hidden = fields.integer("hidden_size", 768)
    intermediate = fields.integer("ffn_dim", 3072)
    layers = fields.integer("num_hidden_layers", 12, most=MAX_LAYERS)
    vocab = fields.integer("vocab_size", 50272)
    heads = fields.integer("num_attention_heads", 12)
    if hidden % heads:
        fields.malformed("hidden_size", hidden, f"a multiple of num_attention_heads ({heads})")
    if not fields.boolean("layer_norm_elementwise_affine", True):
        fields.unsupported("layer_norm_elementwise_affine", False, "true")
    activation = _activation(fields, "activation_function", "relu", override)
    if activation.name == "drelu":
        raise UnsupportedModelError("drelu needs a gate and an up projection; opt has no gate")
    config = {
        "model_type": "opt",
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "max_position_embeddings": fields.integer("max_position_embeddings", 2048, most=MAX_POSITIONS),
        "word_embed_proj_dim": fields.integer("word_embed_proj_dim", hidden),
        "do_layer_norm_before": fields.boolean("do_layer_norm_before", True),
        "enable_bias": fields.boolean("enable_bias", True),
        "layer_norm_elementwise_affine": True,
        "_remove_final_layer_norm": fields.boolean("_remove_final_layer_norm", False),
        **_common(fields, model_type, activation, vocab, {"bos_token_id": 2, "eos_token_id": 2}, tied=True),
    }
    head_dim = hidden // heads
    return NormalizedModel(
        "opt", model_type, config, activation, False, layers, hidden, intermediate, vocab, heads, heads, head_dim
    )


def _common(
    fields: Fields, model_type: str, activation: Activation, vocab: int, defaults: dict[str, Any], tied: bool
) -> dict[str, Any]:
    return {
        "source_model_type": model_type,
        "vocab_size": vocab,
        "tie_word_embeddings": fields.boolean("tie_word_embeddings", tied),
        "hidden_act": activation.name,
        "hidden_act_param": activation.param,
        "bos_token_id": fields.token_ids("bos_token_id", defaults["bos_token_id"]),
        "eos_token_id": fields.token_ids("eos_token_id", defaults["eos_token_id"]),
        "torch_dtype": fields.get("dtype", fields.get("torch_dtype")),
    }
