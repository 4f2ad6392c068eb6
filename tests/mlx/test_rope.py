"""mlx-lm's rope, given the normalized configuration, turns vectors as transformers does given the original one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flashsparse.models.config import normalize_config

GOLDEN = Path(__file__).parents[1] / "unit" / "golden" / "rope.json"
CASES: list[dict[str, Any]] = json.loads(GOLDEN.read_text())["cases"]


def rotated(x: np.ndarray, inv_freq: np.ndarray, scaling: float, position: int) -> np.ndarray:
    """x [head_dim] turned as transformers' apply_rotary_pos_emb does, in float64."""
    first, second = np.split(x.astype(np.float64), 2)
    cos, sin = np.cos(position * inv_freq), np.sin(position * inv_freq)
    return scaling * np.concatenate([first * cos - second * sin, second * cos + first * sin])


@pytest.mark.parametrize("case", CASES, ids=range(len(CASES)))
def test_rope_equals_transformers(case: dict[str, Any]) -> None:
    import mlx.core as mx
    from mlx_lm.models.rope_utils import initialize_rope

    config = normalize_config(case["config"]).config
    rope = initialize_rope(
        config["head_dim"], config["rope_theta"], False, config["rope_scaling"], config["max_position_embeddings"]
    )
    x = np.random.default_rng(0).standard_normal(config["head_dim"]).astype(np.float32)
    for position in (0, 1, 37, 200):
        found = np.array(rope(mx.array(x)[None, None, None], offset=position))[0, 0, 0]
        expected = rotated(x, np.array(case["inv_freq"]), case["attention_scaling"], position)
        np.testing.assert_allclose(found, expected, atol=1e-4)
