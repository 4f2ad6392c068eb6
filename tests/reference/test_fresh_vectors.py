"""Vectors made afresh with torch against the committed ones, and the engine against the fresh ones.

Needs .venv-reference (`make test-reference` creates it); the tests themselves run without torch.
"""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import numpy as np
import pytest

from tests.vector_files import NAMES, ROOT, TOLERANCE, engine_greedy, engine_logits, error, read

pytestmark = pytest.mark.reference
REPOSITORY = ROOT.parents[1]
PYTHON = REPOSITORY / ".venv-reference" / "bin" / "python"


@pytest.fixture(scope="session")
def fresh(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory of vectors made just now from the committed seeds."""
    if not PYTHON.exists():
        pytest.fail(f"{PYTHON} is missing: run `make test-reference`")
    out = tmp_path_factory.mktemp("vectors")
    script = REPOSITORY / "tests" / "reference" / "make_vectors.py"
    subprocess.run([PYTHON, script, "--out", out, "--seeds", ROOT], check=True, timeout=1200)
    return out


def test_every_case_is_committed(fresh: Path) -> None:
    assert sorted(path.stem for path in fresh.glob("*.npz")) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_fresh_vectors_equal_the_committed_ones(name: str, fresh: Path) -> None:
    new, old = read(name, fresh), read(name)
    for file in ("config.json", "model.safetensors"):
        assert _content(new.folder / file) == _content(old.folder / file), file
    np.testing.assert_array_equal(new.tokens, old.tokens)
    np.testing.assert_array_equal(new.greedy, old.greedy)
    assert error(new.logits, old.logits) < 1e-5


@pytest.mark.parametrize("name", NAMES)
def test_the_engine_agrees_with_fresh_vectors(name: str, fresh: Path, tmp_path: Path) -> None:
    import flashsparse
    from converter.convert import convert

    vector = read(name, fresh)
    pack = convert(vector.folder, tmp_path / "pack", activation=vector.record["convert_activation"])
    with flashsparse.load(pack) as engine:
        assert error(engine_logits(engine, vector), vector.logits) < TOLERANCE
        assert engine_greedy(engine, vector) == vector.greedy.tolist()


def _content(path: Path) -> object:
    """A file's bytes; of config.json what it says, less the version that wrote it."""
    if path.suffix != ".json":
        return path.read_bytes()
    return {key: value for key, value in json.loads(path.read_text()).items() if key != "transformers_version"}
