"""OPT, in the style of mlx-lm's model files (mlx-lm has none): learned positions, biases, both norm orders.

`do_layer_norm_before` False with `word_embed_proj_dim` smaller than the hidden size is the 350m variant. Source: the
configuration and module names of transformers' OPT; the FFN (fc1, fc2) is always the streamed one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.base import BaseModelArgs

from flashsparse.ffn import StreamedFFN
from flashsparse.kvcache import KVCache
from flashsparse.models.decoder import Decoder
from flashsparse.models.modules import Parts, norm
from flashsparse.weights import ResidentStore

POSITION_OFFSET = 2  # rows 0 and 1 of the position table are padding


@dataclass
class ModelArgs(BaseModelArgs):
    model_type: str
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    word_embed_proj_dim: int
    do_layer_norm_before: bool = True
    remove_final_layer_norm: bool = False


class DecoderLayer(nn.Module):
    def __init__(self, args: ModelArgs, attention: Any, ffn: Any) -> None:
        super().__init__()
        self.norm_first = args.do_layer_norm_before
        self.self_attn = attention
        self.mlp = ffn
        self.self_attn_layer_norm: Any = nn.LayerNorm(args.hidden_size)
        self.final_layer_norm: Any = nn.LayerNorm(args.hidden_size)

    def __call__(self, x: mx.array, cache: KVCache) -> mx.array:
        if self.norm_first:
            x = x + self.self_attn(self.self_attn_layer_norm(x), cache=cache)
            return x + self.mlp(self.final_layer_norm(x))
        x = self.self_attn_layer_norm(x + self.self_attn(x, cache=cache))
        return self.final_layer_norm(x + self.mlp(x))


class OPTDecoder(nn.Module):
    def __init__(self, args: ModelArgs, layers: list[DecoderLayer]) -> None:
        super().__init__()
        self.layers = layers
        self.embed_tokens: Any = None
        self.embed_positions: Any = None
        self.project_in: Any = None
        self.project_out: Any = None
        has_norm = args.do_layer_norm_before and not args.remove_final_layer_norm
        self.final_layer_norm = nn.LayerNorm(args.hidden_size) if has_norm else None

    def __call__(self, inputs: mx.array, cache: list[KVCache]) -> mx.array:
        start = cache[0].offset + POSITION_OFFSET
        x = self.embed_tokens(inputs)
        if self.project_in is not None:
            x = self.project_in(x)
        x = x + self.embed_positions(mx.arange(start, start + inputs.shape[1])[None])
        for layer, kept in zip(self.layers, cache, strict=True):
            x = layer(x, kept)
        if self.final_layer_norm is not None:
            x = self.final_layer_norm(x)
        return x if self.project_out is None else self.project_out(x)


def build(config: dict[str, Any], store: ResidentStore, parts: Parts, ffns: list[StreamedFFN]) -> Decoder:
    """Assemble the model from a normalized configuration and a pack's resident tensors, out of `parts`."""
    args = ModelArgs.from_dict({**config, "remove_final_layer_norm": config.get("_remove_final_layer_norm", False)})
    layers = [_layer(args, store, parts, ffn, f"model.decoder.layers.{i}") for i, ffn in enumerate(ffns)]
    model = OPTDecoder(args, layers)
    model.embed_tokens = parts.embedding(parts.rows or store.weight("model.decoder.embed_tokens"))
    model.embed_positions = parts.embedding(store.weight("model.decoder.embed_positions"))
    if args.word_embed_proj_dim != args.hidden_size:
        model.project_in = parts.linear(store, "model.decoder.project_in")
        model.project_out = parts.linear(store, "model.decoder.project_out")
    if model.final_layer_norm is not None:
        norm(model.final_layer_norm, store, "model.decoder.final_layer_norm")
    head = store.weight("model.decoder.embed_tokens" if config["tie_word_embeddings"] else "lm_head")
    decoder: Decoder = parts.decoder(model, parts.product(head))
    return decoder


def _layer(args: ModelArgs, store: ResidentStore, parts: Parts, ffn: StreamedFFN, base: str) -> DecoderLayer:
    q, k, v, o = (parts.linear(store, f"{base}.self_attn.{part}_proj") for part in ("q", "k", "v", "out"))
    heads = args.num_attention_heads
    attention = parts.attention(q, k, v, o, heads, heads, args.hidden_size // heads)
    layer = DecoderLayer(args, attention, parts.ffn(ffn))
    norm(layer.self_attn_layer_norm, store, f"{base}.self_attn_layer_norm")
    norm(layer.final_layer_norm, store, f"{base}.final_layer_norm")
    if layer.norm_first:
        layer.self_attn_layer_norm = parts.entrance(layer.self_attn_layer_norm, ffn)
    else:
        layer.self_attn = parts.entrance(attention, ffn)
    layer.final_layer_norm = parts.second_norm(layer.final_layer_norm, ffn)
    return layer
