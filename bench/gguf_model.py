"""The synthetic model as a GGUF file for llama.cpp: `python -m bench.gguf_model OUT --shape 7b --profile paper`.

The same shape, bytes and values as the checkpoint of `bench.synthetic` with that seed, made tensor by tensor without
it. llama.cpp's Llama has no ReGLU: it computes SwiGLU, which costs it the same, since it computes every neuron either
way, but gives other outputs. `--quantize` has llama.cpp itself make a Q4_0 file of it. Needs the `peers` extra.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from bench.activity import PROFILES
from bench.synthetic import SHAPES, Planter, Shape, Tensor, tensors

_NAMES = {
    "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output",
    "input_layernorm": "attn_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output", "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--shape", choices=sorted(SHAPES), default="tiny")
    parser.add_argument("--profile", choices=sorted(PROFILES), default="paper")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quantize", type=Path, metavar="FILE", help="also write this Q4_0 file")
    args = parser.parse_args()
    if not args.out.exists():
        write_gguf(args.out, SHAPES[args.shape], args.profile, args.seed)
    if args.quantize is not None:
        quantize(args.out, args.quantize)
    return 0


def gguf_name(name: str) -> str:
    """The GGUF name of a checkpoint's tensor."""
    base = name.removesuffix(".weight")
    if base.startswith("model.layers."):
        layer, _, rest = base.removeprefix("model.layers.").partition(".")
        return f"blk.{layer}.{_NAMES[rest]}.weight"
    return f"{_NAMES[base]}.weight"


def write_gguf(out: Path, shape: Shape, profile: str, seed: int = 0) -> None:
    """Write the model with 16-bit matrices and 32-bit norms; one matrix is in memory at a time. Needs gguf."""
    import gguf

    planter = Planter(shape, PROFILES[profile], "float16", seed)
    writer = gguf.GGUFWriter(out.with_name(out.name + ".partial"), "llama")
    _describe(writer, shape)
    wanted = list(tensors(planter))
    for tensor in wanted:
        kind: Any = np.float16 if len(tensor.shape) == 2 else np.float32
        size = int(np.prod(tensor.shape)) * np.dtype(kind).itemsize
        writer.add_tensor_info(gguf_name(tensor.name), tensor.shape, np.dtype(kind), size)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for tensor in wanted:
        writer.write_tensor_data(values(tensor, shape))
    writer.close()
    out.with_name(out.name + ".partial").rename(out)


def values(tensor: Tensor, shape: Shape) -> np.ndarray:
    """A tensor as llama.cpp stores it: queries and keys with the two halves of each head interleaved."""
    whole = np.concatenate(list(_blocks(tensor))).reshape(tensor.shape)
    if len(tensor.shape) == 1:
        return whole.astype(np.float32)
    heads = {"q_proj": shape.heads, "k_proj": shape.kv_heads}.get(tensor.name.split(".")[-2])
    if heads is None:
        return whole
    rows, columns = whole.shape
    return np.ascontiguousarray(whole.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2)).reshape(
        whole.shape
    )


def _blocks(tensor: Tensor) -> Iterator[np.ndarray]:
    for block in tensor.blocks():
        yield block.view(np.float16)


def _describe(writer: Any, shape: Shape) -> None:
    import gguf

    head = shape.hidden // shape.heads
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
    writer.add_name("synthetic")
    writer.add_vocab_size(shape.vocab)
    writer.add_context_length(shape.positions)
    writer.add_embedding_length(shape.hidden)
    writer.add_block_count(shape.layers)
    writer.add_feed_forward_length(shape.intermediate)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.kv_heads)
    writer.add_rope_dimension_count(head)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("no_vocab")


def quantize(source: Path, out: Path) -> None:
    """llama.cpp's own Q4_0 of a GGUF file (the head in Q6_K, as it does by default). Needs llama-cpp-python."""
    from bench.llama import start

    llama = start()
    parameters = llama.llama_model_quantize_default_params()
    parameters.ftype = llama.LLAMA_FTYPE_MOSTLY_Q4_0
    failed = llama.llama_model_quantize(str(source).encode(), str(out).encode(), parameters)
    if failed:
        sys.exit(f"llama.cpp cannot quantize {source} (error {failed})")


if __name__ == "__main__":
    sys.exit(main())
