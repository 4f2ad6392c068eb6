"""The stored rotary frequencies against transformers, computed just now. Needs .venv-reference, as the vectors do."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import numpy as np
import pytest

REPOSITORY = Path(__file__).parents[2]
PYTHON = REPOSITORY / ".venv-reference" / "bin" / "python"
GOLDEN = REPOSITORY / "tests" / "unit" / "golden" / "rope.json"


@pytest.mark.reference
def test_the_stored_frequencies_are_transformers(tmp_path: Path) -> None:
    if not PYTHON.exists():
        pytest.fail(f"{PYTHON} is missing: run `make test-reference`")
    out = tmp_path / "rope.json"
    subprocess.run([PYTHON, REPOSITORY / "tests" / "reference" / "rope.py", out], check=True, timeout=600)
    stored, fresh = (json.loads(path.read_text())["cases"] for path in (GOLDEN, out))
    for old, new in zip(stored, fresh, strict=True):
        assert new["config"] == old["config"]
        assert new["attention_scaling"] == pytest.approx(old["attention_scaling"], rel=1e-6)
        np.testing.assert_allclose(new["inv_freq"], old["inv_freq"], rtol=1e-6)
