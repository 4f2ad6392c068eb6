"""Write a random Llama-shaped ReGLU checkpoint with outlier channels: `python -m bench.wide OUT`.

A second, wider model for `bench.predictors`: weights at initialisation scale, and what small trained models lack and
large ones have, a few channels of the residual stream that are many times larger than the rest. They hold most of the
power of every FFN input and, through the gate's columns for them, keep most neurons silent. Perplexity means nothing
here (nothing is trained): judge by KL to the dense model. Leaves out persistence and hot neurons (`bench.synthetic`).
"""

from __future__ import annotations

import json
import shutil
from importlib.resources import as_file, files
from pathlib import Path

import click
import numpy as np
from safetensors.numpy import save_file

OUTLIERS = 6  # channels
SIZE = 12.0  # of an outlier channel, in standard deviations of the others
SPREAD = 0.15  # of an outlier's size from token to token, relative


def tensors(hidden: int, width: int, layers: int, vocab: int, density: float, seed: int) -> dict[str, np.ndarray]:
    """Every weight, float16. About `density` of the neurons are active for a token."""
    rng = np.random.default_rng(seed)
    outliers = rng.choice(hidden, OUTLIERS, replace=False)
    signs = rng.choice([-1.0, 1.0], OUTLIERS)
    embedding = rng.standard_normal((vocab, hidden))
    embedding[:, outliers] = signs * SIZE * (1 + SPREAD * rng.standard_normal((vocab, OUTLIERS)))
    made = {"model.embed_tokens.weight": embedding, "model.norm.weight": np.ones(hidden)}
    made["lm_head.weight"] = rng.standard_normal((vocab, hidden)) * (3 / np.sqrt(hidden))
    made["lm_head.weight"][:, outliers] = 0
    for index in range(layers):
        base = f"model.layers.{index}."
        for norm in ("input_layernorm", "post_attention_layernorm"):
            made[f"{base}{norm}.weight"] = np.ones(hidden)
        for part in "qkvo":
            made[f"{base}self_attn.{part}_proj.weight"] = _matrix(rng, hidden, hidden)
        gate = _matrix(rng, width, hidden)
        gate[:, outliers] = _offsets(rng, gate, density) * signs
        made[f"{base}mlp.gate_proj.weight"] = gate
        made[f"{base}mlp.up_proj.weight"] = _matrix(rng, width, hidden)
        made[f"{base}mlp.down_proj.weight"] = _matrix(rng, hidden, width)
    return {name: values.astype(np.float16) for name, values in made.items()}


def _matrix(rng: np.random.Generator, rows: int, cols: int) -> np.ndarray:
    return rng.standard_normal((rows, cols)) / np.sqrt(cols)


def _offsets(rng: np.random.Generator, gate: np.ndarray, density: float) -> np.ndarray:
    """[rows, OUTLIERS]: the gate columns that hold back each neuron about as far as `density` asks."""
    noise = np.sqrt(1 + (SIZE * SPREAD) ** 2 * OUTLIERS / gate.shape[1])  # of a gate, in units of the other channels
    wanted = _quantile(density) * noise * rng.uniform(0.5, 1.5, len(gate))
    shares = rng.dirichlet(np.ones(OUTLIERS), len(gate))
    return -wanted[:, None] * shares / SIZE


def _quantile(density: float) -> float:
    """z with P(normal > z) = density, by bisection."""
    from math import erfc, sqrt

    low, high = -8.0, 8.0
    while high - low > 1e-9:
        middle = (low + high) / 2
        low, high = (middle, high) if erfc(middle / sqrt(2)) / 2 > density else (low, middle)
    return low


@click.command()
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--hidden", default=768, show_default=True, help="A multiple of 128.")
@click.option("--intermediate", default=3072, show_default=True, help="FFN neurons per layer.")
@click.option("--layers", default=4, show_default=True)
@click.option("--density", default=0.15, show_default=True, help="Share of the neurons that fire, about.")
@click.option("--seed", default=0, show_default=True)
def main(out: Path, hidden: int, intermediate: int, layers: int, density: float, seed: int) -> None:
    """Write the checkpoint into OUT, a new directory, with the demo model's tokenizer."""
    if hidden % 128 or not 0 < density < 0.5:
        raise click.UsageError("--hidden must be a multiple of 128 and --density between 0 and 0.5")
    out.mkdir(parents=True)
    with as_file(files("flashsparse") / "demo_model") as demo:
        config = json.loads((demo / "config.json").read_text())
        for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
            shutil.copyfile(demo / name, out / name)
    heads = hidden // 64
    config.update(
        hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=layers, head_dim=64,
        num_attention_heads=heads, num_key_value_heads=heads, tie_word_embeddings=False,
    )  # fmt: skip
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    save_file(tensors(hidden, intermediate, layers, config["vocab_size"], density, seed), out / "model.safetensors")


if __name__ == "__main__":
    main()
