"""Llama, Mistral, Qwen2, MiniCPM and the sparse Llamas: mlx-lm's Llama, its FFN, linear layers and attention replaced.

Leaves out configuration mapping (`models/config.py`) and everything about records. Sliding windows are applied by the
attention module, per layer, because mlx-lm's model refuses one in which every layer slides; MiniCPM's scales by the
modules whose outputs they scale, because mlx-lm's Llama has none.
"""

from __future__ import annotations

from typing import Any

from mlx_lm.models import llama

from flashsparse.ffn import StreamedFFN
from flashsparse.models.decoder import Decoder
from flashsparse.models.modules import Parts, norm
from flashsparse.weights import ResidentStore


def build(config: dict[str, Any], store: ResidentStore, parts: Parts, ffns: list[StreamedFFN]) -> Decoder:
    """Assemble the model from a normalized configuration and a pack's resident tensors, out of `parts`."""
    args = llama.ModelArgs.from_dict({**config, "layer_types": None, "sliding_window": None})
    model = llama.Model(args)
    scale = config.get("residual_multiplier", 1.0)
    for index, layer in enumerate(model.layers):
        base = f"model.layers.{index}"
        window = config["sliding_window"] if config["layer_types"][index] == "sliding_attention" else 0
        layer.self_attn = _attention(layer.self_attn, parts, store, f"{base}.self_attn", window or 0)
        layer.self_attn.scale = scale
        layer.mlp = parts.ffn(ffns[index], scale)
        norm(layer.input_layernorm, store, f"{base}.input_layernorm")
        layer.input_layernorm = parts.entrance(layer.input_layernorm, ffns[index])
        norm(layer.post_attention_layernorm, store, f"{base}.post_attention_layernorm")
        layer.post_attention_layernorm = parts.second_norm(layer.post_attention_layernorm, ffns[index])
    norm(model.model.norm, store, "model.norm")
    embedding = parts.rows or store.weight("model.embed_tokens")
    model.model.embed_tokens = parts.embedding(embedding, config.get("embedding_multiplier", 1.0))
    head = store.weight("model.embed_tokens" if config["tie_word_embeddings"] else "lm_head")
    decoder: Decoder = parts.decoder(model.model, parts.product(head), config.get("logits_divisor", 1.0))
    return decoder


def _attention(original: Any, parts: Parts, store: ResidentStore, base: str, window: int) -> Any:
    q, k, v, o = (parts.linear(store, f"{base}.{part}_proj") for part in "qkvo")
    made = parts.attention(q, k, v, o, original.n_heads, original.n_kv_heads, original.head_dim)
    made.rope, made.window = original.rope, window
    return made
