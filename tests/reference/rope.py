"""Rotary frequencies as transformers computes them, for configurations in both of its forms.

`python tests/reference/rope.py [OUT]` (needs torch and transformers) writes tests/unit/golden/rope.json, which tests
compare with mlx-lm's rope given the normalized configuration.
"""

from __future__ import annotations

import copy
import json
import random
import sys
from pathlib import Path
from typing import Any

GOLDEN = Path(__file__).parents[1] / "unit" / "golden" / "rope.json"
SEED, CASES = 0, 40


def configurations() -> list[dict[str, Any]]:
    """Random llama configurations over rope types, their optional fields, and the two ways to write them."""
    rng = random.Random(SEED)
    return [_configuration(rng) for _ in range(CASES)]


def _configuration(rng: random.Random) -> dict[str, Any]:
    kind = rng.choice(["default", "linear", "llama3", "yarn", "yarn", "yarn"])
    rope: dict[str, Any] = {"rope_type": kind}
    if kind != "default":
        rope["factor"] = rng.choice([1.0, 2.0, 4.0, 8.0])
    if kind == "llama3":
        low = rng.choice([1.0, 2.0])
        rope |= {"low_freq_factor": low, "high_freq_factor": 4.0}
    if kind in ("llama3", "yarn"):
        rope["original_max_position_embeddings"] = rng.choice([64, 2048])
    if kind == "yarn":
        _optional(rng, rope)
    raw: dict[str, Any] = {"model_type": "llama", "hidden_size": 64, "num_attention_heads": 4}
    raw["max_position_embeddings"] = rng.choice([256, 32768])
    theta = rng.choice([1e4, 5e5])
    if rng.random() < 0.5:
        return raw | {"rope_parameters": {**rope, "rope_theta": theta}}
    if kind != "default":
        raw["rope_scaling"] = {rng.choice(["type", "rope_type"]): rope.pop("rope_type"), **rope}
    return raw | {"rope_theta": theta}


def _optional(rng: random.Random, rope: dict[str, Any]) -> None:
    choices: dict[str, list[Any]] = {
        "attention_factor": [0.8, 1.0, 1.3] if rope["factor"] > 1 else [1.0],
        "mscale": [0.7, 1.0, 0.0],
        "mscale_all_dim": [0.5, 1.0, 0.0],
        "beta_fast": [16.0, 32.0],
        "beta_slow": [1.0, 2.0],
        "truncate": [True],
    }
    for name, values in choices.items():
        if rng.random() < 0.4:
            rope[name] = rng.choice(values)


def reference(raw: dict[str, Any]) -> dict[str, Any]:
    """A configuration with transformers' inverse frequencies [head_dim / 2] and the factor on cos and sin."""
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    rope = LlamaRotaryEmbedding(LlamaConfig.from_dict(copy.deepcopy(raw)))
    return {"config": raw, "inv_freq": rope.inv_freq.tolist(), "attention_scaling": float(rope.attention_scaling)}


if __name__ == "__main__":
    import transformers

    result = {"transformers": transformers.__version__, "cases": [reference(raw) for raw in configurations()]}
    Path(sys.argv[1] if len(sys.argv) > 1 else GOLDEN).write_text(json.dumps(result, indent=1) + "\n")
