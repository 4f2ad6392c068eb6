"""The embedded demo model against transformers: greedy text at three budgets, bits per byte.

The vectors were made in float32 (tests/reference/make_demo_vectors.py). The engine's KV cache is in the checkpoint's 16
bits, so tokens may differ where the two best logits are closer than that rounding, MARGIN of the largest logit.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import flashsparse

ROOT = Path(__file__).resolve().parents[2]
MODEL = ROOT / "flashsparse" / "demo_model"
MARGIN = 2e-3
CONTEXT = 512
BUDGETS = ("floor", "middle", "everything")


@pytest.fixture(scope="module")
def vectors() -> dict[str, Any]:
    record: dict[str, Any] = json.loads((ROOT / "tests" / "vectors" / "demo.json").read_text())
    return record


@pytest.fixture(scope="module")
def pack(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from converter.convert import convert

    return convert(MODEL, tmp_path_factory.mktemp("packs") / "demo")


@pytest.fixture(scope="module")
def budgets(pack: Path) -> dict[str, int]:
    """Bytes of the smallest budget, of one that holds everything, and of the one between."""
    with pytest.raises(flashsparse.BudgetError) as refused:
        flashsparse.load(pack, dram=1, max_kv_size=CONTEXT)
    with flashsparse.load(pack, max_kv_size=CONTEXT) as engine:
        most = engine.plan.needs_all
    return {"floor": refused.value.smallest, "middle": (refused.value.smallest + most) // 2, "everything": most}


def test_the_vectors_are_those_of_this_model(vectors: dict[str, Any]) -> None:
    digest = hashlib.sha256((MODEL / "model.safetensors").read_bytes()).hexdigest()
    assert digest == vectors["weights_sha256"], "run tests/reference/make_demo_vectors.py"


@pytest.mark.parametrize("budget", BUDGETS)
def test_greedy_text_is_transformers(budget: str, vectors: dict[str, Any], pack: Path, budgets: dict[str, int]) -> None:
    with flashsparse.load(pack, dram=budgets[budget], max_kv_size=CONTEXT) as engine:
        for case in vectors["cases"]:
            assert engine.tokenizer.encode(case["prompt"], add_special_tokens=False) == case["prompt_tokens"]
            assert_greedy(feed_greedily(engine, case), case)


def test_without_a_budget_everything_has_a_slot(pack: Path) -> None:
    with flashsparse.load(pack) as engine:
        assert set(engine.plan.slots) == {engine.manifest.intermediate_size}
        assert engine.plan.budget == engine.plan.needs_all


def feed_greedily(engine: Any, case: dict[str, Any]) -> list[int]:
    """The engine's best token after each token of the reference, so that an end token does not end the comparison."""
    with engine.session() as session:
        best = [session.logits(case["prompt_tokens"])[-1]]
        best += [session.logits([token])[0] for token in case["greedy"][:-1]]
    return [int(np.argmax(row)) for row in best]


def assert_greedy(found: list[int], case: dict[str, Any]) -> None:
    differing = [i for i, (a, b) in enumerate(zip(found, case["greedy"], strict=True)) if a != b]
    assert len(found) == 200
    assert all(case["margins"][i] < MARGIN for i in differing), (case["prompt"], differing)


def test_generate_says_the_same(vectors: dict[str, Any], pack: Path) -> None:
    case = vectors["cases"][0]
    with flashsparse.load(pack, max_kv_size=CONTEXT) as engine, engine.session() as session:
        found = [piece.token for piece in session.generate(case["prompt"], max_tokens=200, temp=0.0)]
    first_close = next((i for i, margin in enumerate(case["margins"]) if margin < MARGIN), 200)
    assert found[:first_close] == case["greedy"][: min(first_close, len(found))]


def test_bits_per_byte(vectors: dict[str, Any], pack: Path, budgets: dict[str, int]) -> None:
    tokens = vectors["text_tokens"]
    with flashsparse.load(pack, dram=budgets["floor"], max_kv_size=CONTEXT) as engine, engine.session() as session:
        logits = session.logits(tokens)[:-1].astype(np.float64)
    largest = logits.max(axis=1)
    log_sums = largest + np.log(np.exp(logits - largest[:, None]).sum(axis=1))
    nats = float((log_sums - logits[np.arange(len(logits)), tokens[1:]]).sum())
    assert nats / math.log(2) / vectors["text_bytes"] == pytest.approx(vectors["bits_per_byte"], abs=5e-5)


@pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="needs Linux's per-process I/O counters")
@pytest.mark.parametrize("mode,counter", [("direct", "read_bytes"), ("buffered", "rchar")])
def test_the_demo_counts_what_the_system_counts(pack: Path, budgets: dict[str, int], mode: str, counter: str) -> None:
    with flashsparse.load(pack, dram=budgets["floor"], max_kv_size=CONTEXT, read_mode=mode) as engine:
        if engine.read_mode != mode:
            pytest.skip(f"this filesystem refuses {mode} reads")
        assert max(engine.plan.slots) < engine.manifest.intermediate_size
        with engine.session() as session:
            session.logits([5, 6, 7])
            counted, system = engine.counters.flash_bytes, _system(counter)
            for token in range(20, 40):
                session.logits([token])
            counted, system = engine.counters.flash_bytes - counted, _system(counter) - system
    # rchar also counts the reads of /proc/self/io itself.
    assert counted > 0 and system > 0
    assert counted <= system <= counted + 8192


def _system(counter: str) -> int:
    lines = Path("/proc/self/io").read_text().splitlines()
    return int(dict(line.split(": ") for line in lines)[counter])


def test_the_demo_command_fits_its_budget(tmp_path: Path) -> None:
    """`flashsparse demo` as a new user runs it: converted into an empty cache, streamed under less than the model."""
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path)}
    command = [sys.executable, "-m", "flashsparse", "demo", "-n", "8", "--seed", "1"]
    ran = subprocess.run(
        command, capture_output=True, text=True, timeout=300, env=environment, stdin=subprocess.DEVNULL
    )
    assert ran.returncode == 0, ran.stderr
    assert "peak memory" in ran.stdout + ran.stderr
