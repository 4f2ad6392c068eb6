"""Write a synthetic Llama checkpoint whose active sets are planted: `python -m bench.synthetic OUT --profile paper`.

An ordinary Hugging Face directory (ReGLU, random weights, no tokenizer), written tensor by tensor in bounded memory,
with the token sequence that benchmarks feed in `tokens.json`. How the sets are planted:

- A token's embedding is `a Q z + b c + e w`, of constant norm: z a latent of unit norm in a small space (Q, orthonormal
  columns), c a fixed direction, w a unit vector orthogonal to both. Each position of the sequence has a vocabulary
  entry of its own, so z follows a process of our choice along it: a slow and a fast part (see `activity.Profile`).
- The gate row of neuron i is `Q u_i / a - theta_i c / b + noise`, u_i standard normal: it is active iff u_i . z plus a
  little noise exceeds theta_i. Across neurons u_i . z is Gaussian whatever z is, so density and persistence do not
  drift; thresholds make the hot and the cold; neurons with similar u_i fire together. Q and c, of rank r + 1, are the
  low-rank part: the truncated SVD of the gate finds it.
- Attention and FFN write little (`_BRANCH` of the residual's norm per layer) into the residual stream, so that every
  layer's norm sees the embedding and a perturbation that grows slowly. Entries outside the sequence have random
  latents, so text that the model generates itself has other figures: feed the sequence.
"""

from __future__ import annotations

import json
import struct
import sys
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

import click
import numpy as np
import numpy.typing as npt

from bench.activity import PROFILES, Profile, check_profile, measure

Floats = npt.NDArray[np.float32]

_BRANCH = 0.02  # norm of what attention or FFN adds, relative to the residual stream
_LATENT, _CONSTANT = 0.6, 0.4  # a and b above; e completes the norm
_BLOCK = 1024  # rows made at a time
_POOL = 1 << 22  # random values that filler matrices are cut from; more for a hidden size above 4096
_CHECKED = 96  # tokens of the sequence on which the written gates are checked


@dataclass(frozen=True)
class Shape:
    """A Llama shape; `positions` is its context and `tokens` the length of the stored sequence."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    vocab: int
    positions: int = 4096
    tokens: int = 2048

    @property
    def latent(self) -> int:
        """Dimensions of the latent space, half slow and half fast."""
        return 2 * min(64, self.hidden // 8)


SHAPES = {
    "13b": Shape(5120, 13824, 40, 40, 40, 32000),
    "7b": Shape(4096, 11008, 32, 32, 32, 32000),
    "3b": Shape(3072, 8192, 28, 24, 8, 32000),
    "1b": Shape(2048, 5632, 22, 32, 4, 32000),
    "tiny": Shape(256, 1024, 4, 4, 2, 1024, positions=1024, tokens=512),
}


@dataclass(frozen=True)
class Fixture:
    """What is stored beside a synthetic checkpoint: the tokens to feed, the profile, each layer's hottest tenth."""

    tokens: list[int]
    profile: Profile
    hot: list[list[int]]
    rank: int  # of the gate's planted part


def load_fixture(directory: str | Path) -> Fixture:
    """Read `tokens.json` of a synthetic checkpoint."""
    raw = json.loads(Path(directory, "tokens.json").read_text())
    return Fixture(raw["tokens"], PROFILES[raw["profile"]], raw["hot"], raw["rank"])


def walk(steps: int, size: int, memory: float, rng: np.random.Generator) -> Floats:
    """Unit vectors [steps, size] whose cosine k steps apart is `memory**k`, exactly so for k up to 8 (and size / 2)."""
    back = min(8, size // 2)
    out = np.empty((steps, size), np.float64)
    out[0] = rng.standard_normal(size)
    out[0] /= np.linalg.norm(out[0])
    lags = np.abs(np.subtract.outer(np.arange(back), np.arange(back)))
    cosines = memory ** lags.astype(np.float64)
    for step in range(1, steps):
        past = out[max(0, step - back) : step]
        fresh = rng.standard_normal(size)
        fresh -= np.linalg.solve(cosines[: len(past), : len(past)], past @ fresh) @ past  # orthogonal to the past
        fresh /= np.linalg.norm(fresh)
        out[step] = memory * out[step - 1] + np.sqrt(1 - memory**2) * fresh
    return out.astype(np.float32)


def drive(steps: int, size: int, profile: Profile, rng: np.random.Generator) -> Floats:
    """Unit vectors [steps, size]: a slow half and a fast half, weighted as the profile says."""
    slow = walk(steps, size // 2, profile.memory, rng) * np.float32(np.sqrt(profile.slow))
    fast = walk(steps, size - size // 2, 0.0, rng) * np.float32(np.sqrt(1 - profile.slow))
    return np.concatenate([slow, fast], axis=1)


def thresholds(count: int, profile: Profile, rng: np.random.Generator) -> Floats:
    """One threshold per neuron: the profile's distribution in even quantiles, shuffled: no sample is unlucky."""
    hot = round(profile.hot * count)
    centre = np.repeat([profile.hot_threshold, profile.cold_threshold], [hot, count - hot])
    spread = np.concatenate([_normal_quantiles(hot), _normal_quantiles(count - hot)])
    return rng.permutation(centre + profile.spread * spread).astype(np.float32)


def _normal_quantiles(count: int) -> npt.NDArray[np.float64]:
    grid = np.linspace(-5, 5, 20001)
    density = np.exp(-grid * grid / 2)
    return np.interp((np.arange(count) + 0.5) / max(count, 1), np.cumsum(density) / density.sum(), grid)


class Codec:
    """Float32 to the stored type and back. bfloat16 is kept as its bits."""

    def __init__(self, dtype: str) -> None:
        self.name = {"float16": "F16", "bfloat16": "BF16", "float32": "F32"}[dtype]
        self.bits = np.dtype(np.uint32 if dtype == "float32" else np.uint16)
        self.sign = self.bits.type(1 << (8 * self.bits.itemsize - 1))

    def encode(self, values: Floats) -> npt.NDArray[Any]:
        if self.name == "F16":
            return values.astype(np.float16).view(np.uint16)
        bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
        if self.name == "F32":
            return bits
        return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)  # to nearest, ties to even

    def decode(self, bits: npt.NDArray[Any]) -> Floats:
        if self.name == "F16":
            return bits.view(np.float16).astype(np.float32)
        return (bits.astype(np.uint32) << (0 if self.name == "F32" else 16)).view(np.float32)


class Planter:
    """Makes the tensors of one checkpoint, block by block."""

    def __init__(self, shape: Shape, profile: Profile, dtype: str, seed: int) -> None:
        self.shape, self.profile, self.codec, self.seed = shape, profile, Codec(dtype), seed
        rng = self.rng("latent")
        basis = np.linalg.qr(rng.standard_normal((shape.hidden, shape.latent + 1)))[0].astype(np.float32)
        self.space = np.ascontiguousarray(basis.T)  # [latent + 1, d]: Q's columns, then c
        self.tokens = rng.permutation(shape.vocab)[: min(shape.tokens, shape.vocab, shape.positions)]
        self.latents = drive(len(self.tokens), shape.latent, profile, rng)
        self.others = drive(len(self.tokens), shape.hidden, profile, rng)  # w, before it is made orthogonal
        self.theta = [thresholds(shape.intermediate, profile, self.rng(f"theta {n}")) for n in range(shape.layers)]
        self.sets: list[list[npt.NDArray[np.integer]]] = []
        self._pool = rng.standard_normal(max(_POOL, _BLOCK * shape.hidden), np.float32)
        self._pools: dict[float, npt.NDArray[Any]] = {}
        checked = self.codec.decode(self.codec.encode(self.embed(self.latents[:_CHECKED], self.others[:_CHECKED])))
        self._inputs = checked / np.sqrt(np.mean(checked**2, axis=1, keepdims=True))

    def rng(self, name: str) -> np.random.Generator:
        return np.random.default_rng([self.seed, zlib.crc32(name.encode())])

    def embed(self, latent: Floats, other: Floats) -> Floats:
        """Embeddings [n, d] of mean square 1 for latents [n, r] and any vectors [n, d]."""
        other = other - np.matmul(np.matmul(other, self.space.T), self.space)
        other /= np.linalg.norm(other, axis=1, keepdims=True).astype(np.float32)
        rest = np.float32((1 - _LATENT**2 - _CONSTANT**2) ** 0.5)
        planted = np.float32(_LATENT) * (latent @ self.space[:-1]) + np.float32(_CONSTANT) * self.space[-1]
        return np.float32(np.sqrt(self.shape.hidden)) * (planted + rest * other)

    def hot(self) -> list[list[int]]:
        """Ids of the tenth of each layer's neurons with the lowest thresholds, ascending."""
        return [sorted(np.argsort(theta)[: len(theta) // 10].tolist()) for theta in self.theta]

    def embedding(self, name: str) -> Iterator[npt.NDArray[Any]]:
        rng, shape = self.rng(name), self.shape
        position = np.full(shape.vocab, -1)
        position[self.tokens] = np.arange(len(self.tokens))
        for start in range(0, shape.vocab, _BLOCK):
            where = position[start : start + _BLOCK]
            latent = rng.standard_normal((len(where), shape.latent), np.float32)
            latent /= np.linalg.norm(latent, axis=1, keepdims=True)
            other = rng.standard_normal((len(where), shape.hidden), np.float32)
            latent[where >= 0], other[where >= 0] = self.latents[where[where >= 0]], self.others[where[where >= 0]]
            yield self.codec.encode(self.embed(latent, other))

    def gate(self, name: str, layer: int) -> Iterator[npt.NDArray[Any]]:
        """Gate rows; the sets they give for the first tokens are noted in `sets`."""
        rng, d, theta = self.rng(name), self.shape.hidden, self.theta[layer]
        unseen = self.profile.unseen / (1 - _LATENT**2 - _CONSTANT**2)  # of which only w's share is out of sight
        active = []
        for start in range(0, len(theta), _BLOCK):
            some = theta[start : start + _BLOCK]
            u = rng.standard_normal((len(some), self.shape.latent), np.float32)
            u *= np.float32(np.sqrt(1 - unseen) / _LATENT)
            rows = np.concatenate([u, -some[:, None] / np.float32(_CONSTANT)], axis=1) @ self.space
            rows += np.float32(np.sqrt(unseen)) * self.cut(self._pool, len(some), d, rng)
            bits = self.codec.encode(rows * np.float32(d**-0.5))
            active.append(self._inputs @ self.codec.decode(bits).T > 0)
            yield bits
        self.sets.append([np.flatnonzero(row) for row in np.concatenate(active, axis=1)])

    def filler(self, name: str, rows: int, columns: int, deviation: float) -> Iterator[npt.NDArray[Any]]:
        """A random matrix: pieces of one pool at random places, with random signs by row."""
        if deviation not in self._pools:
            self._pools[deviation] = self.codec.encode(self._pool * np.float32(deviation))
        rng = self.rng(name)
        step = max(1, (_POOL // 4) // columns)
        for start in range(0, rows, step):
            count = min(step, rows - start)
            signs = rng.integers(0, 2, (count, 1), dtype=self.codec.bits) * self.codec.sign
            yield self.cut(self._pools[deviation], count, columns, rng) ^ signs

    def cut(self, pool: npt.NDArray[Any], rows: int, columns: int, rng: np.random.Generator) -> npt.NDArray[Any]:
        start = int(rng.integers(0, len(pool) - rows * columns + 1))
        return pool[start : start + rows * columns].reshape(rows, columns)

    def ones(self, size: int) -> Iterator[npt.NDArray[Any]]:
        yield self.codec.encode(np.ones(size, np.float32))


@dataclass(frozen=True)
class Tensor:
    name: str
    shape: tuple[int, ...]
    blocks: Callable[[], Iterator[npt.NDArray[Any]]]


def tensors(planter: Planter) -> Iterator[Tensor]:
    """Every tensor of the checkpoint, in the order in which it is written."""
    s = planter.shape
    head = s.hidden // s.heads
    plain, quiet = s.hidden**-0.5, _BRANCH * s.hidden**-0.5

    def random(name: str, rows: int, columns: int, deviation: float = plain) -> Tensor:
        return Tensor(name, (rows, columns), lambda: planter.filler(name, rows, columns, deviation))

    def ones(name: str) -> Tensor:
        return Tensor(name, (s.hidden,), lambda: planter.ones(s.hidden))

    yield Tensor("model.embed_tokens.weight", (s.vocab, s.hidden), lambda: planter.embedding("embedding"))
    for n in range(s.layers):
        at = f"model.layers.{n}"
        yield ones(f"{at}.input_layernorm.weight")
        yield random(f"{at}.self_attn.q_proj.weight", s.hidden, s.hidden)
        yield random(f"{at}.self_attn.k_proj.weight", s.kv_heads * head, s.hidden)
        yield random(f"{at}.self_attn.v_proj.weight", s.kv_heads * head, s.hidden)
        yield random(f"{at}.self_attn.o_proj.weight", s.hidden, s.hidden, quiet)
        yield ones(f"{at}.post_attention_layernorm.weight")
        gate = f"{at}.mlp.gate_proj.weight"
        yield Tensor(gate, (s.intermediate, s.hidden), lambda gate=gate, n=n: planter.gate(gate, n))  # type: ignore[misc]
        yield random(f"{at}.mlp.up_proj.weight", s.intermediate, s.hidden)
        # About a tenth of the neurons are active, each with a mean square of about 0.3.
        yield random(f"{at}.mlp.down_proj.weight", s.hidden, s.intermediate, _BRANCH / (0.03 * s.intermediate) ** 0.5)
    yield ones("model.norm.weight")
    yield random("lm_head.weight", s.vocab, s.hidden)


def write(
    out: str | Path,
    shape: Shape,
    profile: Profile,
    dtype: str = "float16",
    seed: int = 0,
    shard_bytes: int = 4_000_000_000,
) -> dict[str, float]:
    """Write the checkpoint into the new directory `out`; the figures of the written gates on the stored tokens.

    Raises FileExistsError when `out` exists and is not empty, ValueError when the written gates miss the profile.
    """
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    if any(out.iterdir()):
        raise FileExistsError(f"{out} is not empty")
    planter = Planter(shape, profile, dtype, seed)
    shards = _split(list(tensors(planter)), planter.codec, shard_bytes)
    names = [f"model-{n:05}-of-{len(shards):05}.safetensors" for n in range(1, len(shards) + 1)]
    for name, shard in zip(names, shards, strict=True):
        with open(out / name, "wb") as file:
            _write_shard(file, shard, planter.codec)
    index = {tensor.name: name for name, shard in zip(names, shards, strict=True) for tensor in shard}
    total = sum((out / name).stat().st_size for name in names)
    _write_json(out / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": index})
    _write_json(out / "config.json", _config(shape, dtype))
    measured = measure(planter.sets, shape.intermediate, planter.hot()) if len(planter.tokens) > 8 else {}
    _write_json(out / "tokens.json", _fixture(planter, measured))
    if problems := check_profile(measured, profile):
        raise ValueError(f"the planted gates miss profile {profile.name}: {'; '.join(problems)}")
    return measured


def _fixture(planter: Planter, measured: dict[str, float]) -> dict[str, Any]:
    return {
        "tokens": planter.tokens.tolist(), "profile": planter.profile.name, "seed": planter.seed,
        "rank": planter.shape.latent + 1, "recall": planter.profile.recall, "asked": planter.profile.asked,
        "measured": measured, "hot": planter.hot(),
    }  # fmt: skip


def _config(shape: Shape, dtype: str) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "relu",
        "hidden_size": shape.hidden, "intermediate_size": shape.intermediate, "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads, "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.hidden // shape.heads, "vocab_size": shape.vocab,
        "max_position_embeddings": shape.positions, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
        "attention_bias": False, "mlp_bias": False, "tie_word_embeddings": False, "torch_dtype": dtype,
    }  # fmt: skip


def _split(all_tensors: list[Tensor], codec: Codec, shard_bytes: int) -> list[list[Tensor]]:
    shards: list[list[Tensor]] = [[]]
    size = 0
    for tensor in all_tensors:
        size += int(np.prod(tensor.shape)) * codec.bits.itemsize
        if size > shard_bytes and shards[-1]:
            shards.append([])
            size = int(np.prod(tensor.shape)) * codec.bits.itemsize
        shards[-1].append(tensor)
    return shards


def _write_shard(file: BinaryIO, shard: list[Tensor], codec: Codec) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor in shard:
        begin, end = end, end + int(np.prod(tensor.shape)) * codec.bits.itemsize
        header[tensor.name] = {"dtype": codec.name, "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    file.write(struct.pack("<Q", len(text)) + text)
    for tensor in shard:
        for block in tensor.blocks():
            file.write(np.ascontiguousarray(block).data)


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=None if path.name == "tokens.json" else 1) + "\n")


@click.command(context_settings={"show_default": True})
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--shape", "shape_name", type=click.Choice(sorted(SHAPES)), default="tiny", help="Where to start from.")
@click.option("--hidden", type=int, help="Hidden size instead of the shape's; the next ones likewise.")
@click.option("--intermediate", type=int)
@click.option("--layers", type=int)
@click.option("--heads", type=int)
@click.option("--kv-heads", type=int)
@click.option("--vocab", type=int)
@click.option("--positions", type=int, help="Context length.")
@click.option("--tokens", type=int, help="Length of the stored sequence.")
@click.option("--profile", type=click.Choice(sorted(PROFILES)), default="paper")
@click.option("--dtype", type=click.Choice(["float16", "bfloat16", "float32"]), default="float16")
@click.option("--seed", type=int, default=0)
def main(out: Path, shape_name: str, profile: str, dtype: str, seed: int, **sizes: int | None) -> None:
    """Write a synthetic ReGLU Llama checkpoint with planted activity into the new directory OUT."""
    shape = replace(SHAPES[shape_name], **{key: value for key, value in sizes.items() if value is not None})
    try:
        measured = write(out, shape, PROFILES[profile], dtype, seed)
    except (FileExistsError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(1) from None
    for key, value in measured.items():
        asked = PROFILES[profile].asked.get(key)
        print(f"{key:<14} {value:.4f}" + ("" if asked is None else f"  asked {asked:.4f}"))


if __name__ == "__main__":
    main()
