"""`flashsparse eval` on the demo model: a predicting pack against the walk in numpy, references, the record."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer

from converter.convert import convert
from converter.model import LayerWeights, open_model
from converter.walk import Block, losses, perplexity, walk
from flashsparse.cli import cli
from flashsparse.errors import FlashSparseError, UsageError
from flashsparse.pack.manifest import PREDICTOR, Manifest
from flashsparse.quality.evaluate import cut_windows
from flashsparse.quality.measures import SetMeasures, total
from flashsparse.sparsity.low_bit import LowBit, quantize_rows
from flashsparse.sparsity.spec import LayerSpec, PredictorSpec
from tests.model.predict_packs import predictor_tensors, write_tensors

ROOT = Path(__file__).resolve().parents[2]
DEMO, TEXT, OTHER_TEXT = ROOT / "flashsparse" / "demo_model", ROOT / "README.md", ROOT / "CONTRIBUTING.md"
LAYER = LayerSpec(bits=2, group_size=64, threshold=0.3)
TOKENS, WINDOW = 300, 128
SMALL = ("--tokens", str(TOKENS), "--window", str(WINDOW))
KEYS = {
    "perplexity", "bits_per_byte", "kl", "top1_agreement", "recall", "precision", "predicted_density", "true_density",
    "tokens",
}  # fmt: skip


@pytest.fixture(scope="module")
def packs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("packs")


@pytest.fixture(scope="module")
def exact(packs: Path) -> Path:
    return convert(DEMO, packs / "exact")


@pytest.fixture(scope="module")
def predict(packs: Path) -> Path:
    """The demo model with a 2-bit copy of each gate; it says that it was calibrated on OTHER_TEXT and another."""
    path = convert(DEMO, packs / "predict", tier="dense")
    manifest = Manifest.load(path)
    digests = (hashlib.sha256(OTHER_TEXT.read_bytes()).hexdigest(), "0" * 64)
    texts = tuple(sorted(digests))
    spec = PredictorSpec("gate_copy", "threshold", "none", None, texts, 1000, (LAYER,) * manifest.layers)
    entry = write_tensors(path / PREDICTOR, predictor_tensors(spec, DEMO, manifest))
    replace(manifest, tier="predict", predictor=spec, files=manifest.files | {PREDICTOR: entry}).write()
    return path


def run(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> tuple[list[str], str]:
    """Lines of standard output, and standard error."""
    cli.main([str(one) for one in arguments], standalone_mode=False)
    found = capsys.readouterr()
    return found.out.splitlines(), found.err


def evaluate(capsys: pytest.CaptureFixture[str], pack: Path, *options: str | Path) -> dict[str, Any]:
    lines, _ = run(capsys, "eval", pack, "--text", TEXT, *SMALL, "--json", *options)
    found: dict[str, Any] = json.loads(lines[-1])
    return found


class Masks:
    """A walk's visitor that masks by the 2-bit copy, as the pack does, and counts what that hits."""

    def __init__(self, layers: int) -> None:
        self.sets = [SetMeasures() for _ in range(layers)]
        self.copy: LowBit
        self.norms: np.ndarray

    def on_layer(self, layer: int, weights: LayerWeights) -> None:
        self.copy, self.norms = quantize_rows(weights.scoring, 2, 64, search=False), weights.down_norms

    def visit(self, block: Block) -> np.ndarray:
        predicted = self.copy.product(block.x) >= np.float32(0.3)
        self.sets[block.layer].add(predicted, block.gate > 0, np.abs(block.hidden) * self.norms)
        return predicted


def test_a_predicting_pack_against_the_walk(predict: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = evaluate(capsys, predict, "--generate", "0")
    assert set(found) >= KEYS and found["tokens"] == TOKENS and found["against"] == "dense"
    with open_model(DEMO) as model:
        ids = model.tokenizer().encode(TEXT.read_text())[: TOKENS + 1]
        # The walk's losses want the predicted token inside the window; the model is causal, so that it changes nothing.
        windows = [np.array(window) for window in cut_windows(ids, WINDOW)]
        masks = Masks(model.layers)
        sparse = losses(model, walk(model, windows, masks.visit, on_layer=masks.on_layer), windows)
        dense = losses(model, walk(model, windows), windows)
    assert len(dense) == TOKENS
    assert found["dense_perplexity"] == pytest.approx(perplexity(dense), rel=2e-3)
    assert found["perplexity"] == pytest.approx(perplexity(sparse), rel=1e-2)
    assert abs(perplexity(sparse) / perplexity(dense) - 1) > 1e-2  # the two above can be told apart
    # The walk counted the last token of each window too.
    for name, share in total(masks.sets).to_dict().items():
        assert found[name] == pytest.approx(share, abs=0.01)
    for layer, sets in zip(found["layers"], masks.sets, strict=True):
        assert layer["recall"] == pytest.approx(sets.to_dict()["recall"], abs=0.02)
    assert 0.5 < found["recall"] < 1 and 0 < found["kl"] < 1 and 0.5 < found["top1_agreement"] < 1
    tokenizer = Tokenizer.from_file(str(DEMO / "tokenizer.json"))
    spelled, first = (tokenizer.decode(some, skip_special_tokens=False) for some in (ids, ids[:1]))
    assert TEXT.read_text().startswith(spelled)
    bits = np.log2(found["perplexity"]) * TOKENS / len(spelled[len(first) :].encode())
    assert found["bits_per_byte"] == pytest.approx(bits, rel=1e-9)


def test_an_exact_pack_against_its_checkpoint(exact: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = evaluate(capsys, exact, "--reference", DEMO)
    assert found["against"] == "reference" and found["generation"] is None
    assert 0 <= found["kl"] < 1e-5 and found["top1_agreement"] > 0.99
    assert (found["recall"], found["precision"], found["value_recall"]) == (1, 1, 1)
    assert found["predicted_density"] == found["true_density"] < 0.5
    assert found["perplexity_ratio"] == pytest.approx(1, abs=1e-3)


def test_a_pack_as_the_reference(predict: Path, exact: Path, capsys: pytest.CaptureFixture[str]) -> None:
    own, given = (evaluate(capsys, predict, "--generate", "0", *more) for more in ((), ("--reference", exact)))
    assert given["kl"] == pytest.approx(own["kl"], rel=1e-2)
    assert given["dense_perplexity"] == pytest.approx(own["dense_perplexity"], rel=1e-3)
    assert given["perplexity"] == own["perplexity"]


def test_a_wrong_reference_is_refused_before_loading(
    exact: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for reference, words in (("nope", "nope: no such directory, and not a repository id"), (tmp_path, "config.json")):
        with pytest.raises(FlashSparseError, match=words):
            run(capsys, "eval", exact, "--text", TEXT, *SMALL, "--reference", reference)
        assert "budget" not in capsys.readouterr().err  # no plan was shown, nothing was loaded


def test_a_dense_pack(packs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = evaluate(capsys, convert(DEMO, packs / "dense", tier="dense"), "--tokens", "20")
    assert (found["recall"], found["predicted_density"], found["true_density"], found["kl"]) == (1, 1, None, None)


def test_generating_freely(predict: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines, _ = run(
        capsys,
        "eval",
        predict,
        "--text",
        TEXT,
        *SMALL,
        "--generate",
        "12",
        "--prompts",
        "2",
        "--threads",
        "1",
        "--json",
    )
    found = json.loads(lines[-1])["generation"]
    assert (found["prompts"], found["tokens"]) == (2, 24)
    assert 0 <= found["equal_share"] <= 1 and 0 <= found["mean_divergence"] <= 12
    assert found["mean_divergence"] <= found["equal_share"] * 12
    assert found["sampled_perplexity"] > 1 and found["dense_sampled_perplexity"] > 1
    assert json.loads(lines[-1])["flash_bytes_per_token"] > 0
    assert any(line.startswith("greedy from 2 prompts") for line in lines)


def test_the_record_is_kept_shown_and_repeatable(
    predict: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (predict / "quality.json").unlink(missing_ok=True)
    assert [
        line.split("  ", 1)[1].strip() for line in run(capsys, "info", predict)[0] if line.startswith("quality")
    ] == ["not measured: run `flashsparse eval`"]
    found = evaluate(capsys, predict, "--generate", "0")
    kept = (predict / "quality.json").read_bytes()
    evaluate(capsys, predict, "--generate", "0", "--threads", "1", "--dram", "40MB")
    assert (predict / "quality.json").read_bytes() == kept
    del found["flash_bytes_per_token"]
    assert json.loads(kept) == found | {"format": "flashsparse-quality", "version": 1}
    assert str(tmp_path.parent) not in kept.decode()
    shown = "\n".join(run(capsys, "info", predict)[0])
    assert f"recall {100 * found['recall']:.2f} %" in shown
    assert json.loads(run(capsys, "info", predict, "--json")[0][0])["quality"]["recall"] == found["recall"]
    assert "all checksums match" in run(capsys, "verify", predict)[0][-1]


def test_a_record_of_another_pack_is_ignored(
    predict: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluate(capsys, predict, "--generate", "0", "--tokens", "10")
    path = predict / "quality.json"
    path.write_text(path.read_text().replace(Manifest.load(predict).digest, "0" * 64))
    assert "not known: quality.json is of another pack" in "\n".join(run(capsys, "info", predict)[0])
    with monkeypatch.context() as patched:
        patched.setattr("builtins.input", lambda prompt: (_ for _ in ()).throw(EOFError))
        assert "not known: quality.json is of another pack" in run(capsys, "chat", predict, "--stats")[1]


def test_figures_that_cannot_be_kept_are_still_printed(exact: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = exact / "quality.json"
    path.unlink(missing_ok=True)
    path.mkdir()
    try:
        lines, said = run(capsys, "eval", exact, "--text", TEXT, "--tokens", "10")
    finally:
        path.rmdir()
    assert "the figures are not kept" in said and any(line.startswith("perplexity") for line in lines)


def test_a_plot(predict: Path, exact: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib", reason="plots need matplotlib")
    evaluate(capsys, exact)
    evaluate(capsys, predict, "--generate", "0", "--plot", tmp_path / "a.png", "--beside", exact)
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(UsageError, match="judged on another text or window"):
        evaluate(capsys, predict, "--beside", exact, "--window", "64")


def test_what_is_refused(predict: Path, packs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for texts in ((OTHER_TEXT,), (TEXT, OTHER_TEXT)):
        with pytest.raises(UsageError, match=r"CONTRIBUTING\.md: the pack was calibrated on this text"):
            run(capsys, "eval", predict, *(word for text in texts for word in ("--text", text)))
    with pytest.raises(UsageError, match="the same text as"):
        run(capsys, "eval", predict, "--text", TEXT, "--text", TEXT)
    for message, options in (
        ("context is 512 tokens", ("--window", "513")),
        ("--max-kv-size 100: expected 232", ("--window", "100", "--max-kv-size", "100")),
        (r"a\.xyz: expected a name that ends in", ("--plot", tmp_path / "a.xyz")),
        ("no quality.json", ("--beside", convert(DEMO, packs / "fresh", tier="dense"))),
    ):
        with pytest.raises(UsageError, match=message):
            run(capsys, "eval", predict, "--text", TEXT, *options)
    (tmp_path / "one").write_text("a")
    with pytest.raises(UsageError, match="1 tokens, expected at least 2"):
        run(capsys, "eval", predict, "--text", tmp_path / "one")
