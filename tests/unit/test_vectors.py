"""The reference vectors themselves: an independent implementation agrees, and each feature shows in the logits."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from tests import numpy_llama
from tests.vector_files import NAMES, Vector, error, read


@pytest.mark.parametrize("name", NAMES)
def test_numpy_agrees_with_transformers(name: str) -> None:
    vector = read(name)
    assert error(vector.oracle(), vector.logits) < 1e-5


@pytest.mark.parametrize("name", NAMES)
def test_greedy_tokens_are_well_separated(name: str) -> None:
    assert read(name).record["margin"] > 1e-3


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("llama-theta-silu", {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}),
        ("llama-theta-v4-relu", {"rope_theta": 10000.0}),
        ("llama-llama3-relu", {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}),
        ("llama-llama3-v4-silu", {"rope_scaling": None}),
        ("llama-linear-relu", {"rope_scaling": None}),
        ("llama-yarn-relu", {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}),
        ("mistral-window-silu", {"sliding_window": None}),
        ("mistral-window-v4-relu", {"sliding_window": None}),
        ("bamboo-drelu", {"sliding_window": None}),
        ("qwen2-mixed-relu", {"use_sliding_window": False}),
        ("qwen2-mixed-v4-silu", {"max_window_layers": 0}),
    ],
)
def test_a_lost_field_would_be_noticed(name: str, changes: dict[str, Any]) -> None:
    vector = read(name)
    config, weights = numpy_llama.load(vector.folder)
    found = numpy_llama.logits(config | changes, weights, vector.tokens, vector.record["activation"])
    assert error(found, vector.logits) > 1e-2


@pytest.mark.parametrize("name", ["bamboo-drelu", "sparsellama-fatrelu", "llama-bias-relu2", "qwen2-drelu"])
def test_a_wrong_activation_would_be_noticed(name: str) -> None:
    vector = read(name)
    config, weights = numpy_llama.load(vector.folder)
    assert error(numpy_llama.logits(config, weights, vector.tokens, "relu"), vector.logits) > 1e-2


def test_relu_cases_leave_neurons_out() -> None:
    for vector in map(read, NAMES):
        active: list[np.ndarray] = []
        vector.oracle(active=active)
        density = float(np.mean(active))
        assert 0.3 < density < 0.6 if vector.sparse else density == 1.0, vector.name


def test_both_styles_of_configuration_are_there() -> None:
    configs = [_config(vector) for vector in map(read, NAMES) if vector.record["family"] != "opt"]
    assert any("rope_parameters" in config for config in configs)
    assert any("rope_theta" in config for config in configs)


def _config(vector: Vector) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((vector.folder / "config.json").read_text())
    return config
