"""What tier predict loses on the embedded demo model, through the whole pipeline: calibrate, convert, judge.

Both texts are the model's own samples, so that the test needs no text from elsewhere; they differ by their seed.
"""

from __future__ import annotations

from pathlib import Path

import pytest

import flashsparse
from converter.convert import convert
from flashsparse.pack.manifest import PREDICTOR, Manifest
from flashsparse.quality.evaluate import cut_windows, encode, evaluate

MODEL = Path(__file__).parents[2] / "flashsparse" / "demo_model"
STORIES, TOKENS = 10, 400
pytestmark = pytest.mark.slow


def sampled(pack: Path, seed: int) -> str:
    """Stories that the model makes up."""
    stories = []
    with flashsparse.load(pack, dram="200MB") as engine, engine.session() as session:
        for number in range(STORIES):
            session.clear()
            pieces = session.generate("Once upon a time", TOKENS, temp=1.0, seed=STORIES * seed + number)
            stories.append("Once upon a time" + "".join(piece.text for piece in pieces))
    return "\n".join(stories)


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("texts")
    exact = convert(MODEL, root / "exact")
    paths = root / "calibration.txt", root / "judged.txt"
    for seed, path in enumerate(paths):
        path.write_text(sampled(exact, seed))
    return paths


def test_the_default_predictor_costs_little_and_takes_little(texts: tuple[Path, Path], tmp_path: Path) -> None:
    pack = convert(MODEL, tmp_path / "pack", tier="predict", calibrate=[texts[0]])
    manifest = Manifest.load(pack)
    ffn = 2 * 3 * manifest.hidden_size * manifest.intermediate_size * manifest.layers
    assert manifest.files[PREDICTOR].bytes < 0.055 * ffn
    with flashsparse.load(pack, dram="200MB") as engine:
        ids = encode(engine, texts[1].read_text(), 4096)
        found = evaluate(engine, cut_windows(ids, 512)).to_dict()
    assert found["perplexity_ratio"] < 1.01
    assert found["value_recall"] > 0.96
    assert found["predicted_density"] < 1.2 * found["true_density"]
