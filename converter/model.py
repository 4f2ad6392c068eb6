"""A dense model for offline work: its shapes, and its weights as float32, one layer at a time.

Opens a checkpoint or a pack; `walk` computes with it. Never holds more than a layer, and the head where it is small.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from converter.forward import layer_norm, linear, rms_norm
from converter.hub import find_source
from converter.source import Checkpoint, open_checkpoint
from converter.tensors import canonical, check_tensors
from converter.text import TextTokenizer, load_tokenizer
from converter.weights import CheckpointWeights, PackWeights, Weights, optional, whole
from flashsparse.errors import CheckpointError, PackError, UsageError
from flashsparse.models.config import normalize_config
from flashsparse.models.tensors import (
    HEAD,
    check_resident,
    embedding_name,
    expected_shapes,
    has_output_bias,
    record_tensors,
    resident_shapes,
)
from flashsparse.pack.manifest import MANIFEST, Activation, Manifest, canonical_json
from flashsparse.pack.safetensors import read_header

KEPT_BYTES = 640 << 20  # a head of at most this size stays in memory once it was used
HEAD_BYTES = 64 << 20  # of a larger head, what is in memory at once
SAMPLE_BYTES = 4096  # of each tensor, for the model's digest
POSITION_OFFSET = 2  # rows 0 and 1 of OPT's position table are padding


@dataclass(frozen=True)
class LayerWeights:
    """One layer in float32. Matrices are [rows, cols] (q, k, v, o, gate and up [I, d], down [d, I]), the rest vectors.

    `gate` is None without one (OPT, whose fc1 is `up` and fc2 `down`); norms without a bias are RMS norms. `window` is
    how many tokens attention sees, the token itself included; None: all.
    """

    attention_norm: np.ndarray
    attention_norm_bias: np.ndarray | None
    q: np.ndarray
    q_bias: np.ndarray | None
    k: np.ndarray
    k_bias: np.ndarray | None
    v: np.ndarray
    v_bias: np.ndarray | None
    o: np.ndarray
    o_bias: np.ndarray | None
    ffn_norm: np.ndarray
    ffn_norm_bias: np.ndarray | None
    gate: np.ndarray | None
    gate_bias: np.ndarray | None
    up: np.ndarray
    up_bias: np.ndarray | None
    down: np.ndarray
    down_bias: np.ndarray | None
    window: int | None

    @property
    def scoring(self) -> np.ndarray:
        """What the activation is applied to: the gate, or up without one; [I, d]."""
        return self.up if self.gate is None else self.gate

    @property
    def scoring_bias(self) -> np.ndarray | None:
        return self.up_bias if self.gate is None else self.gate_bias

    @cached_property
    def down_norms(self) -> np.ndarray:
        """c_i = ||down column i||_2, float32 [I]."""
        return np.sqrt(np.einsum("di,di->i", self.down, self.down))


class Model:
    """An open model. `config` is its normalized configuration, `digest` names its weights; use as a context manager.

    A checkpoint's digest covers its configuration, headers and the beginning of every tensor; a pack's is its own.
    """

    def __init__(
        self,
        directory: Path,
        config: dict[str, Any],
        activation: Activation,
        weights: Weights,
        digest: str,
        checkpoint: Checkpoint | None = None,
    ) -> None:
        self.directory, self.config, self.activation, self.digest = directory, config, activation, digest
        self._weights, self._checkpoint = weights, checkpoint
        self._head: np.ndarray | None = None
        opt = config["model_type"] == "opt"
        self.family: str = "opt" if opt else "llama"
        self.gated = not opt
        self.layers: int = config["num_hidden_layers"]
        self.hidden_size: int = config["hidden_size"]
        self.intermediate_size: int = config["intermediate_size"]
        self.vocab_size: int = config["vocab_size"]
        self.heads: int = config["num_attention_heads"]
        self.kv_heads: int = config.get("num_key_value_heads", self.heads)
        self.head_dim: int = config.get("head_dim", self.hidden_size // self.heads)
        self.context: int = config["max_position_embeddings"]

    def __enter__(self) -> Model:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        self._head = None
        if self._checkpoint is not None:
            self._checkpoint.__exit__()

    def tokenizer(self) -> TextTokenizer:
        """The tokenizer beside the weights. Raises CheckpointError when there is none or it cannot be loaded."""
        return load_tokenizer(self.directory)

    def embed(self, ids: Sequence[int] | np.ndarray) -> np.ndarray:
        """float32 [n, d]: what enters the first layer for a window of token ids; OPT's positions count from 0."""
        wanted = self._checked(ids)
        unique, places = np.unique(wanted, return_inverse=True)
        name = embedding_name(self.family)
        x = np.concatenate([self._weights.rows(name, int(i), int(i) + 1) for i in unique])[places]
        x *= np.float32(self.config.get("embedding_multiplier", 1.0))
        if self.family != "opt":
            return x
        if self._weights.shape("model.decoder.project_in.weight") is not None:
            x = linear(x, whole(self._weights, "model.decoder.project_in.weight"), None)
        positions = "model.decoder.embed_positions.weight"
        return x + self._weights.rows(positions, POSITION_OFFSET, POSITION_OFFSET + len(wanted))

    def _checked(self, ids: Sequence[int] | np.ndarray) -> np.ndarray:
        wanted = np.asarray(ids, np.int64)
        if not 1 <= len(wanted) <= self.context:
            raise UsageError(f"a window of {len(wanted)} tokens: expected 1 to {self.context}, the model's context")
        if wanted.min() < 0 or wanted.max() >= self.vocab_size:
            raise CheckpointError(
                f"{self.directory}: token {wanted.max() if wanted.min() >= 0 else wanted.min()}: expected ids below "
                f"{self.vocab_size}, the model's vocabulary; the tokenizer is another model's"
            )
        return wanted

    def layer(self, index: int) -> LayerWeights:
        """The weights of layer `index`, read now: let go of one layer before asking for the next."""
        opt, w = self.family == "opt", self._weights
        base = f"model.decoder.layers.{index}" if opt else f"model.layers.{index}"
        ffn = w.ffn(index, record_tensors(self.family, index))
        parts: dict[str, Any] = {field: ffn.get(field) for field in ("gate", "gate_bias", "up", "up_bias", "down")}
        parts["down_bias"] = optional(w, f"{base}.fc2.bias" if opt else f"{base}.mlp.down_proj.bias")
        for part, name in zip("qkvo", ("q", "k", "v", "out" if opt else "o"), strict=True):
            parts[part] = whole(w, f"{base}.self_attn.{name}_proj.weight")
            parts[f"{part}_bias"] = optional(w, f"{base}.self_attn.{name}_proj.bias")
        norms = ("self_attn_layer_norm", "final_layer_norm") if opt else ("input_layernorm", "post_attention_layernorm")
        for part, name in zip(("attention_norm", "ffn_norm"), norms, strict=True):
            parts[part] = whole(w, f"{base}.{name}.weight")
            parts[f"{part}_bias"] = optional(w, f"{base}.{name}.bias")
        return LayerWeights(**parts, window=self._window(index))

    def _window(self, index: int) -> int | None:
        types = self.config.get("layer_types")
        slides = types is not None and types[index] == "sliding_attention"
        return self.config["sliding_window"] if slides else None

    def norm(self, x: np.ndarray, weight: np.ndarray, bias: np.ndarray | None) -> np.ndarray:
        """The family's norm of rows x [n, d]."""
        return layer_norm(x, weight, bias) if bias is not None else rms_norm(x, weight, self.config["rms_norm_eps"])

    def final(self, states: np.ndarray) -> np.ndarray:
        """float32 [n, e], ready for the head: final norm, OPT's projection, the scale of the logits applied."""
        x, w = states, self._weights
        base = "model.decoder.final_layer_norm" if self.family == "opt" else "model.norm"
        weight = optional(w, f"{base}.weight")
        if weight is not None:
            x = self.norm(x, weight, optional(w, f"{base}.bias"))
        if w.shape("model.decoder.project_out.weight") is not None:
            x = linear(x, whole(w, "model.decoder.project_out.weight"), None)
        return x / np.float32(self.config.get("logits_divisor", 1.0))

    def head(self) -> Iterator[tuple[int, np.ndarray]]:
        """(first token id, float32 rows [n, e]) of the head, in order. A small head is one block and stays."""
        name = embedding_name(self.family) if self.config["tie_word_embeddings"] else HEAD
        shape = self._weights.shape(name)
        assert shape is not None
        if self._head is None and 4 * shape[0] * shape[1] <= KEPT_BYTES:
            self._head = whole(self._weights, name)
        if self._head is not None:
            yield 0, self._head
            return
        step = max(1, HEAD_BYTES // (4 * shape[1]))
        for begin in range(0, shape[0], step):
            yield begin, self._weights.rows(name, begin, min(shape[0], begin + step))

    def logits(self, states: np.ndarray) -> np.ndarray:
        """float32 [n, V] of what leaves the last layer, [n, d]. Give a few hundred tokens at a time."""
        x = self.final(states)
        out = np.empty((len(x), self.vocab_size), np.float32)
        for begin, rows in self.head():
            out[:, begin : begin + len(rows)] = x @ rows.T
        return out


def open_model(path: str | os.PathLike[str], activation: str | None = None) -> Model:
    """Opens a checkpoint directory, a repository id or a pack. `activation` (NAME[:PARAM]) overrides a checkpoint's.

    Raises UsageError, SourceUnavailableError, CheckpointError, UnsupportedModelError, or PackError for a pack.
    """
    directory = find_source(path)
    if (directory / MANIFEST).is_file():
        if activation is not None:
            raise UsageError(f"{directory}: is a pack, whose activation is fixed; --activation is for checkpoints")
        return _from_pack(directory)
    checkpoint = open_checkpoint(directory)
    try:
        return _from_checkpoint(checkpoint, activation)
    except BaseException:
        checkpoint.__exit__()
        raise


def _from_checkpoint(checkpoint: Checkpoint, activation: str | None) -> Model:
    model = normalize_config(checkpoint.config, activation)
    sources = canonical(model.family, checkpoint.tensors)
    shapes = expected_shapes(model.family, model.config, has_output_bias(model.source_model_type))
    check_tensors(sources, shapes, bool(model.config["tie_word_embeddings"]), str(checkpoint.directory))
    weights = CheckpointWeights(checkpoint, {name: sources[name] for name in shapes})
    return Model(checkpoint.directory, model.config, model.activation, weights, _digest(checkpoint), checkpoint)


def _digest(checkpoint: Checkpoint) -> str:
    """SHA-256 over config.json, names, types, shapes and the first bytes of every tensor."""
    digest = hashlib.sha256(canonical_json(checkpoint.config).encode())
    for name, tensor in sorted(checkpoint.tensors.items()):
        sample = bytearray(min(SAMPLE_BYTES, tensor.info.nbytes))
        checkpoint.read_bytes(tensor, 0, memoryview(sample))
        digest.update(f"{name} {tensor.dtype} {tensor.shape} ".encode() + sample)
    return digest.hexdigest()


def _from_pack(directory: Path) -> Model:
    manifest = Manifest.load(directory)
    header = read_header(manifest.resident_path, PackError)
    check_resident(manifest, header)
    weights = PackWeights(manifest, header, resident_shapes(manifest))
    return Model(directory, manifest.config, manifest.activation, weights, manifest.digest)
