"""PowerInfer's predictors: the fold of the norm, the converted file and its checks; the .pt files need torch."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
from pathlib import Path

import numpy as np
import pytest

from converter.predictors.powerinfer import KIND, convert, fold_norm, load_imported, main
from flashsparse.errors import CheckpointError, ConvertError, UsageError
from flashsparse.pack.safetensors import header_bytes, read_header

REPOSITORY = Path(__file__).parents[2]
PYTHON = REPOSITORY / ".venv-reference" / "bin" / "python"
D, WIDTH, RANKS = 8, 12, (4, 6)
MAKE = """
import sys, pathlib, torch
root = pathlib.Path(sys.argv[1])
torch.manual_seed(0)
for index, rank in enumerate((4, 6)):
    state = {"fc1.weight": torch.randn(rank, 8), "fc2.weight": torch.randn(12, rank)}
    torch.save(state, root / f"model_{index}.pt", _use_new_zipfile_serialization=index == 0)
x = torch.randn(50, 8)
logits = [torch.relu(x @ m["fc1.weight"].T) @ m["fc2.weight"].T
          for m in (torch.load(root / f"model_{index}.pt") for index in (0, 1))]
(root / "expected.bin").write_bytes(torch.cat([x.ravel(), *map(torch.ravel, logits)]).numpy().tobytes())
"""
EVIL = """
import sys, os, torch
class Evil:
    def __reduce__(self):
        return os.mkdir, (sys.argv[1] + "/owned",)
torch.save({"fc1.weight": Evil(), "fc2.weight": torch.zeros(1, 1)}, sys.argv[1] + "/model_0.pt")
"""


def weights(seed: int = 0) -> list[tuple[np.ndarray, np.ndarray]]:
    rng = np.random.default_rng(seed)
    shapes = [((rank, D), (WIDTH, rank)) for rank in RANKS]
    return [(rng.standard_normal(a).astype(np.float16), rng.standard_normal(b).astype(np.float16)) for a, b in shapes]


def write(path: Path, layers: list[tuple[np.ndarray, np.ndarray]], kind: str = KIND, threshold: str = "0.0") -> Path:
    arrays = {
        f"layers.{index}.{name}.weight": values
        for index, pair in enumerate(layers)
        for name, values in zip(("fc1", "fc2"), pair, strict=True)
    }
    types = {np.dtype(np.float16): "F16", np.dtype(np.float32): "F32"}
    stored = {name: (types[values.dtype], values.shape) for name, values in arrays.items()}
    head = header_bytes(stored, metadata={"kind": kind, "threshold": threshold})
    path.write_bytes(head + b"".join(values.tobytes() for values in arrays.values()))
    return path


def raw_logits(x: np.ndarray, fc1: np.ndarray, fc2: np.ndarray) -> np.ndarray:
    return np.asarray(np.maximum(x @ fc1.astype(np.float64).T, 0) @ fc2.astype(np.float64).T)


def test_folding_the_norm_keeps_every_decision_at_zero(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    residual, gain = rng.standard_normal((200, D)) * 5, rng.standard_normal(D) + 0.1  # gains of both signs
    rms = np.sqrt((residual**2).mean(axis=1, keepdims=True))
    x = (residual / rms * gain).astype(np.float32)
    imported = load_imported(write(tmp_path / "p", weights(), threshold="-0.5"), 2, D, WIDTH)
    assert (imported.threshold, imported.layers) == (-0.5, 2)
    for index, (fc1, fc2) in enumerate(weights()):
        before = raw_logits(residual, fc1, fc2)
        predictor = imported.layer(index, gain)
        assert predictor.relu and predictor.rank == RANKS[index]
        np.testing.assert_allclose(predictor.logits(x) * rms, before, rtol=1e-4, atol=1e-4)
        clear = np.abs(before) > 1e-3
        assert np.array_equal((predictor.logits(x) >= 0)[clear], (before >= 0)[clear])


def test_inputs_that_the_norm_silences_are_folded_to_nothing() -> None:
    fc1 = np.ones((2, 3), np.float32)
    folded = fold_norm(fc1, np.array([2.0, 0.0, -4.0], np.float32))
    assert folded.tolist() == [[0.5, 0, -0.25]] * 2


def swapped(pair: tuple[np.ndarray, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    return pair[1], pair[0]


@pytest.mark.parametrize(
    "layers,options,message",
    [
        (weights()[:1], {}, "'layers.1.fc1.weight': found no such tensor"),
        (weights() + weights()[:1], {}, "'layers.2.fc1.weight': found a tensor that the model has no layer for"),
        ([weights()[0], swapped(weights()[1])], {}, "layer 1: found fc1 [12, 6] and fc2 [6, 8], expected [rank, 8]"),
        ([(a.astype(np.float32), b) for a, b in weights()], {}, "'layers.0.fc1.weight': found F32 [4, 8]"),
        ([(a[0], b) for a, b in weights()], {}, "'layers.0.fc1.weight': found F16 [8]"),
        (weights(), {"kind": "other"}, "found kind 'other'"),
        (weights(), {"threshold": "nan"}, "found the threshold 'nan'"),
        (weights(), {"threshold": "low"}, "found the threshold 'low'"),
    ],
)
def test_a_file_that_does_not_fit_the_model_is_named(
    layers: list[tuple[np.ndarray, np.ndarray]], options: dict[str, str], message: str, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match=re.escape(message)):
        load_imported(write(tmp_path / "p", layers, **options), 2, D, WIDTH)


def test_pickled_files_are_never_opened_by_the_loader(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "model_0.pt"):
        with pytest.raises(UsageError, match=r"python -m converter.predictors.powerinfer"):
            load_imported(path, 2, D, WIDTH)


def test_a_directory_that_holds_no_predictors_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UsageError, match="expected a directory"):
        convert(tmp_path / "none", tmp_path / "out")
    with pytest.raises(CheckpointError, match=r"found 0 predictor files, expected model_0.pt"):
        convert(tmp_path, tmp_path / "out")
    (tmp_path / "model_1.pt").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"found 1 predictor files, expected model_0.pt"):
        convert(tmp_path, tmp_path / "out")
    assert main([str(tmp_path / "none"), str(tmp_path / "out")]) == 2
    assert main([str(tmp_path), str(tmp_path / "out")]) == 1
    assert capsys.readouterr().err.count("\n") == 2
    (tmp_path / "out").write_bytes(b"kept")
    with pytest.raises(ConvertError, match="exists"):
        convert(tmp_path, tmp_path / "out")
    assert (tmp_path / "out").read_bytes() == b"kept"


@pytest.mark.parametrize("text", ["[1]", "{", '{"sparse_threshold": true}', '{"sparse_threshold": "x"}'])
def test_a_config_without_a_number_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "model_0.pt").write_bytes(b"")
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"config.json"):
        convert(tmp_path, tmp_path / "out")


@pytest.mark.skipif(importlib.util.find_spec("torch") is not None, reason="torch is installed")
def test_without_torch_the_way_to_get_it_is_named(tmp_path: Path) -> None:
    (tmp_path / "model_0.pt").write_bytes(b"")
    with pytest.raises(ConvertError, match=r"pip install 'flashsparse\[train\]'"):
        convert(tmp_path, tmp_path / "out")


def with_torch(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    if not PYTHON.exists():
        pytest.skip(f"{PYTHON} is missing: run `make test-reference`")
    return subprocess.run([PYTHON, *arguments], cwd=REPOSITORY, capture_output=True, text=True, timeout=300)


@pytest.mark.reference
def test_files_of_torch_are_converted(tmp_path: Path) -> None:
    assert with_torch("-c", MAKE, tmp_path).returncode == 0
    (tmp_path / "config.json").write_text(json.dumps({"sparse_threshold": 0.25}))
    ran = with_torch("-m", "converter.predictors.powerinfer", tmp_path, tmp_path / "out")
    assert (ran.returncode, ran.stderr) == (0, "")
    imported = load_imported(tmp_path / "out", 2, D, WIDTH)
    assert imported.threshold == 0.25 and len(read_header(tmp_path / "out").tensors) == 4
    expected = np.frombuffer((tmp_path / "expected.bin").read_bytes(), np.float32)
    x, logits = expected[: 50 * D].reshape(50, D), expected[50 * D :].reshape(2, 50, WIDTH)
    for index in range(2):
        np.testing.assert_allclose(imported.layer(index, np.ones(D)).logits(x), logits[index], atol=0.02)
    assert not list(tmp_path.glob(".*.partial"))


@pytest.mark.reference
def test_a_pickle_with_code_in_it_is_refused_and_not_run(tmp_path: Path) -> None:
    assert with_torch("-c", EVIL, tmp_path).returncode == 0
    ran = with_torch("-m", "converter.predictors.powerinfer", tmp_path, tmp_path / "out")
    assert ran.returncode == 1 and "cannot be read as weights" in ran.stderr and ran.stderr.count("\n") == 1
    assert not (tmp_path / "owned").exists() and not (tmp_path / "out").exists()
