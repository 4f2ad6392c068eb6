"""Strict reading of a pack's config.json: every field of the family, in type and range, and nothing else.

The converter writes it (`flashsparse.models.config`); the models use what is read here without checking it again.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from flashsparse.errors import PackError
from flashsparse.pack.checks import Node

if TYPE_CHECKING:
    from flashsparse.pack.manifest import Manifest

SOURCE_MODEL_TYPES = {"llama": ("bamboo", "llama", "minicpm", "mistral", "qwen2", "sparsellama"), "opt": ("opt",)}
LAYER_TYPES = ("full_attention", "sliding_attention")
SCALES = ("embedding_multiplier", "residual_multiplier", "logits_divisor")  # of the minicpm models, and no others
MAX_POSITIONS = 2**31
MAX_LAYERS = 10_000  # tensors and files are listed layer by layer before any size is checked


def check_config(node: Node, manifest: Manifest) -> dict[str, Any]:
    """The configuration of `node`, which must agree with the manifest.

    Raises PackError naming the field, what was found and what was expected.
    """
    family = manifest.family
    node.agree("model_type", family)
    node.agree("num_hidden_layers", manifest.layers)
    node.agree("hidden_size", manifest.hidden_size)
    node.agree("intermediate_size", manifest.intermediate_size)
    node.agree("vocab_size", manifest.vocab_size)
    node.agree("num_attention_heads", manifest.heads)
    node.agree("hidden_act", manifest.activation.name)
    node.agree("hidden_act_param", manifest.activation.param)
    node.choice("source_model_type", SOURCE_MODEL_TYPES[family])
    node.integer("max_position_embeddings", 1, MAX_POSITIONS)
    node.boolean("tie_word_embeddings")
    for name in ("bos_token_id", "eos_token_id"):
        node.token_ids(name)
    node.take("torch_dtype")  # what the source says of itself; nothing reads it
    (_opt if family == "opt" else _llama)(node, manifest)
    return node.finish(node.value)


def _llama(node: Node, manifest: Manifest) -> None:
    node.agree("head_dim", manifest.head_dim)
    node.agree("num_key_value_heads", manifest.kv_heads)
    if manifest.head_dim % 2:
        node.fail("head_dim", manifest.head_dim, "an even number (rotary embeddings rotate pairs)")
    node.real("rms_norm_eps", zero=True)
    node.equal("rope_traditional", False)
    theta = node.real("rope_theta")
    kind = None if node.null("rope_scaling") else _rope_scaling(node.child("rope_scaling"))
    if kind == "yarn" and theta == 1:
        node.fail("rope_theta", theta, "a number other than 1 (yarn divides by its logarithm)")
    if node.value["source_model_type"] == "minicpm":
        for name in SCALES:
            node.real(name)
    _biases(node)
    _windows(node, manifest.layers)


def _rope_scaling(node: Node) -> str:
    kind = node.choice("rope_type", ("linear", "llama3", "yarn"))
    node.real("factor")
    if kind != "linear":
        node.integer("original_max_position_embeddings", 1)
    if kind == "llama3":
        low, high = node.real("low_freq_factor"), node.real("high_freq_factor")
        if high <= low:
            node.fail("high_freq_factor", high, f"more than low_freq_factor ({low})")
    if kind == "yarn":
        node.real("beta_fast")
        node.real("beta_slow")
        node.real("mscale", negative=True)
        node.real("mscale_all_dim", zero=True)
    return node.finish(kind)


def _biases(node: Node) -> None:
    """Which biases a model may have depends on the architecture it came from."""
    attention, mlp = node.boolean("attention_bias"), node.boolean("mlp_bias")
    source = node.value["source_model_type"]
    if source in ("bamboo", "mistral", "qwen2") and attention != (source == "qwen2"):
        node.fail("attention_bias", attention, f"{source == 'qwen2'} in a {source} model")
    if mlp and source in ("bamboo", "minicpm", "mistral", "qwen2"):
        node.fail("mlp_bias", mlp, f"False in a {source} model")


def _windows(node: Node, layers: int) -> None:
    types = node.take("layer_types")
    if not isinstance(types, list) or len(types) != layers:
        node.fail("layer_types", types, f"a list of {layers} layer types")
    for kind in types:
        if kind not in LAYER_TYPES:
            node.fail("layer_types", kind, f"only {' and '.join(LAYER_TYPES)}")
    if "sliding_attention" in types:
        node.integer("sliding_window", 1)
    elif not node.null("sliding_window"):
        node.fail("sliding_window", node.value["sliding_window"], "null, since no layer slides")


def _opt(node: Node, manifest: Manifest) -> None:
    if (manifest.kv_heads, manifest.head_dim * manifest.heads) != (manifest.heads, manifest.hidden_size):
        raise PackError(
            f"{manifest.path / 'pack.json'}: found kv_heads {manifest.kv_heads} and head_dim {manifest.head_dim}, "
            f"expected {manifest.heads} heads that share hidden_size {manifest.hidden_size} in an OPT model"
        )
    node.integer("word_embed_proj_dim", 1)
    node.equal("layer_norm_elementwise_affine", True)
    for name in ("do_layer_norm_before", "enable_bias", "_remove_final_layer_norm"):
        node.boolean(name)
