"""Sparsity of whole models: measuring and searching over walks, and `flashsparse sparsity` as a user meets it."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from converter.model import LayerWeights, Model, open_model
from converter.samples import Samples
from converter.sparsing import Point, Sparsing, check_setting, open_sparsing
from converter.walk import Block, losses, walk
from flashsparse.cli.sparsity import sparsity
from flashsparse.errors import ConvertError, UsageError
from flashsparse.sparsity.activations import activate
from flashsparse.sparsity.metrics import METRICS, Cett, top_k_mask
from flashsparse.sparsity.texts import file_sha256
from flashsparse.sparsity.thresholds_file import read_thresholds
from tests.checkpoints import write_checkpoint
from tests.model.packs import make_pack

DEMO = Path(__file__).parents[2] / "flashsparse" / "demo_model"
CARD = DEMO / "README.md"
ALL = tuple(METRICS)


def no_room(*_: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def windows(vocab: int = 128, lengths: tuple[int, ...] = (40, 23, 9)) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.integers(0, vocab, n) for n in lengths]


@pytest.fixture(scope="module", params=["relu", "silu", "opt", "drelu", "minicpm"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Model]:
    path = tmp_path_factory.mktemp("source") / request.param
    if request.param == "opt":
        write_checkpoint(path, "opt")
    elif request.param == "minicpm":
        write_checkpoint(path, "minicpm", scale_emb=12, scale_depth=1.4, dim_model_base=32)
    else:
        write_checkpoint(path, "bamboo" if request.param == "drelu" else "llama", activation=request.param)
    with open_model(path) as opened:
        yield opened


@pytest.fixture
def measured(model: Model) -> Iterator[Sparsing]:
    with open_sparsing(model, windows(), ALL) as sparsing:
        yield sparsing


def same(one: Point, other: Point) -> None:
    """Equal but for the order in which products are summed."""
    assert one.thresholds == pytest.approx(other.thresholds, rel=1e-5)
    assert one.layers == pytest.approx(other.layers, abs=1e-3)
    assert one.ppl_ratio == pytest.approx(other.ppl_ratio, rel=1e-4)


def test_a_target_of_nothing_is_the_dense_model(measured: Sparsing) -> None:
    for metric, setting in (("pplp", 0.0), ("topk", 1.0), ("cats", 0.0), ("teal", 0.0)):
        point = measured.at(metric, setting)
        assert point.ppl_ratio == pytest.approx(1, abs=1e-4)
        if METRICS[metric] == "gate":
            assert point.layers == measured.density
        elif metric == "pplp" and measured.model.activation.name != "drelu":  # whose h has zeros of its own
            assert point.layers == pytest.approx(measured.density, abs=2e-3)


@pytest.mark.parametrize("metric", ["topk", "cats", "teal"])
def test_the_share_asked_is_the_share_kept_where_the_inputs_are_dense(measured: Sparsing, metric: str) -> None:
    point = measured.at(metric, 0.8 if metric in ("cats", "teal") else 0.2)
    if metric == "teal" and not measured.model.gated:
        return  # relu's h is zero or positive: the share of neurons kept is no more than the density
    assert point.layers[0] == pytest.approx(0.2, abs=0.02)


def test_top_k_in_the_first_layer_is_the_published_mask(measured: Sparsing) -> None:
    """All 72 tokens are in the sample, and nothing before the first layer is skipped."""
    expected: list[np.ndarray] = []

    def visit(block: Block) -> None:
        if block.layer == 0:
            expected.append(activate(measured.model.activation.name, measured.model.activation.param, block.gate))

    walk(measured.model, measured.windows, visit)
    a = np.concatenate(expected)
    mask = top_k_mask(a, 0.1) & (a != 0)
    assert measured.at("topk", 0.1).layers[0] == pytest.approx(mask.mean(), abs=1.5 / mask.size)


def test_cett_thresholds_are_those_of_the_dense_layers(measured: Sparsing) -> None:
    hidden: list[list[np.ndarray]] = [[] for _ in range(measured.model.layers)]
    walk(measured.model, measured.windows, lambda block: hidden[block.layer].append(block.hidden))
    point = measured.at("pplp", 0.2)
    for layer, parts in enumerate(hidden):
        weights = measured.model.layer(layer)
        assert point.thresholds[layer] == Cett(
            np.concatenate(parts), weights.down, weights.down_norms
        ).largest_threshold(0.2)
        assert 0 < point.layers[layer] < measured.density[layer]
    same(measured.at("pplp", 0.2), point)


@pytest.mark.parametrize("metric", ALL)
def test_the_search_stays_within_the_perplexity(measured: Sparsing, metric: str) -> None:
    point = measured.search(metric, 1.05)
    assert point.ppl_ratio < 1.05
    same(point, measured.at(metric, point.setting))
    assert point.activation_ratio < np.mean(measured.density)


def test_fat_is_the_model_with_fatrelu(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "relu")
    with open_model(source) as relu, open_sparsing(relu, windows(), ["fat"]) as measured:
        point = measured.at("fat", 0.3)
    with open_model(source, "fatrelu:0.3") as fat:
        loss = losses(fat, walk(fat, windows()), windows()).mean()
        with open_sparsing(fat, windows(), ["fat"]) as expected:
            assert point.layers == pytest.approx(expected.density, abs=1e-9)
    assert point.ppl_ratio == pytest.approx(np.exp(loss - measured.dense_loss), rel=1e-5)


def test_a_layer_that_never_fires(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real: Callable[[Model, int], LayerWeights] = Model.layer

    def layer(self: Model, index: int) -> LayerWeights:
        weights = real(self, index)
        return replace(weights, gate=np.zeros_like(weights.up)) if index == 1 else weights

    monkeypatch.setattr(Model, "layer", layer)
    with open_model(write_checkpoint(tmp_path / "relu")) as opened, open_sparsing(opened, windows(), ALL) as measured:
        for metric in ALL:
            point = measured.at(metric, 0.3)
            assert point.layers[1] == 0
            assert point.dead[1] == 96
            assert np.isfinite(point.ppl_ratio)
        assert point.layers[0] > 0


def test_a_pack_measures_as_its_source(tmp_path: Path) -> None:
    pack = make_pack(tmp_path)
    points = []
    for path in (pack, tmp_path / "pack-source"):
        with open_model(path) as opened, open_sparsing(opened, windows(), ["pplp"]) as measured:
            points.append(measured.at("pplp", 0.1))
    same(*points)


def test_samples_are_evenly_spaced_tokens(tmp_path: Path) -> None:
    with open_model(write_checkpoint(tmp_path / "relu")) as opened:
        samples = Samples(opened, windows(), {"gate", "hidden"}, 20, tmp_path)
        seen: list[np.ndarray] = []

        def visit(block: Block) -> None:
            samples.add(block)
            if block.layer == 1:
                seen.append(block.hidden)

        walk(opened, windows(), visit)
        hidden = np.concatenate(seen)
        assert samples.tokens == 20
        chosen = np.round(np.linspace(0, 71, 20)).astype(int)
        assert np.array_equal(samples.hidden(1), hidden[chosen])
        assert samples.gate(1).shape == (20 * 96,)
        assert (np.diff(samples.gate(1)) >= 0).all()
        assert samples.largest(1) == samples.gate(1)[-1]
        share = samples.between("hidden", 1, 0.1, 0.5)
        magnitudes = np.abs(hidden[chosen])
        assert share == pytest.approx(((magnitudes >= np.float32(0.1)) & (magnitudes < np.float32(0.5))).mean())
        assert samples.between("gate", 1, 0.0, 1e9) == pytest.approx((samples.gate(1) != 0).mean())


def test_other_text_can_give_the_thresholds(tmp_path: Path) -> None:
    with open_model(write_checkpoint(tmp_path / "relu")) as opened:
        other = [(ids + 5) % 128 for ids in windows()]
        with (
            open_sparsing(opened, windows(), ["topk"], other) as crossed,
            open_sparsing(opened, other, ["topk"]) as own,
        ):
            assert crossed.at("topk", 0.2).thresholds == own.at("topk", 0.2).thresholds
            assert crossed.dense_loss != own.dense_loss


def test_cett_beats_top_k_and_fat_on_the_demo_model() -> None:
    """The published shape: fewer neurons at a lower perplexity. The settings cost between one and five per cent."""
    with open_model(DEMO) as demo:
        ids = demo.tokenizer().encode(CARD.read_text())[:384]
        with open_sparsing(demo, [np.array(ids)], ("topk", "fat", "pplp"), sample_tokens=96) as measured:
            cett, top_k, fat = (measured.at(*one) for one in (("pplp", 0.06), ("topk", 0.1), ("fat", 0.21)))
    for other in (top_k, fat):
        assert cett.activation_ratio < 0.85 * other.activation_ratio
        assert cett.ppl_ratio < other.ppl_ratio


@pytest.mark.parametrize(
    ("metric", "setting", "activation"),
    [
        ("topk", 0.0, "relu"), ("topk", 1.1, "relu"), ("fat", -1.0, "relu"), ("fat", 0.0, "silu"),
        ("cats", 1.0, "silu"), ("teal", -0.1, "silu"), ("pplp", 0.0, "relu"),
        ("fat", float("nan"), "relu"), ("fat", float("inf"), "relu"),
    ],
)  # fmt: skip
def test_settings_out_of_range(metric: str, setting: float, activation: str) -> None:
    with pytest.raises(UsageError, match=metric):
        check_setting(metric, setting, activation)


# The command


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny checkpoint with a tokenizer."""
    path = write_checkpoint(tmp_path_factory.mktemp("silu") / "source", activation="silu", vocab=4096, hidden=32)
    shutil.copy(DEMO / "tokenizer.json", path)
    return path


def run(*arguments: object) -> list[str]:
    done = CliRunner().invoke(sparsity, [str(one) for one in arguments], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.stdout.splitlines()


def test_table_json_and_thresholds(source: Path, tmp_path: Path) -> None:
    saved = tmp_path / "thresholds.json"
    options = ("--metric", "cats", "--arg", "0.5", "--tokens", "200", "--window", "64")
    lines = run(source, "--text", CARD, *options, "--json", "--save-thresholds", saved)
    report = json.loads(lines[-1])
    assert len(report["layers"]) == 2
    assert report["tokens"] == 200
    assert report["sparsity"] == pytest.approx(1 - report["activation_ratio"])
    assert report["activation_ratio"] == pytest.approx(0.5, abs=0.05)
    assert lines[0].split() == ["layer", "active", "not", "zero", "threshold", "dead"]
    assert [line.split()[0] for line in lines[1:3]] == ["0", "1"]
    assert f"{report['activation_ratio']:.2%}" in "\n".join(lines[3:-1])
    found = read_thresholds(saved)
    assert (found.metric, found.quantity, found.arg, found.tokens) == ("cats", "gate", 0.5, 200)
    assert list(found.thresholds) == [layer["threshold"] for layer in report["layers"]]
    assert found.model.activation == "silu"
    assert list(found.texts) == report["texts"] == [file_sha256(CARD)]


def test_pplp_takes_one_per_cent_unless_told(source: Path) -> None:
    report = json.loads(run(source, "--text", CARD, "--tokens", "100", "--json")[-1])
    assert (report["metric"], report["arg"]) == ("pplp", 1.0)
    assert report["ppl_ratio"] < 1.01
    assert 0 < report["setting"] < 1


def test_a_search_says_how_many_walks_and_how_long(source: Path) -> None:
    arguments = [str(source), "--text", str(CARD), "--tokens", "100"]
    searched = CliRunner().invoke(sparsity, arguments).stderr.splitlines()
    assert searched[0].startswith("  2%  walk 1 of at most 22, dense model")
    for line in searched[1:]:
        assert re.match(r" *\d+%  walk \d+ of at most 22, pplp [\d.e-]+(, about .* left)?$", line), line
        assert "left" in line or line.startswith("100%")
    assert 3 < len(searched) <= 23
    one = CliRunner().invoke(sparsity, [*arguments, "--metric", "topk", "--arg", "0.5"]).stderr.splitlines()
    assert [line.split(", about")[0] for line in one] == [
        " 25%  walk 1 of 2, dense model", " 75%  walk 2 of 2, topk 0.5", "100%  walk 2 of 2, topk 0.5",
    ]  # fmt: skip


def test_plots(source: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    picture = tmp_path / "out.png"
    run(source, "--text", CARD, "--metric", "teal", "--arg", "0.4", "--tokens", "64", "--plot", picture)
    first = picture.read_bytes()
    assert first.startswith(b"\x89PNG")
    run(source, "--text", CARD, "--metric", "teal", "--arg", "0.4", "--tokens", "64", "--plot", picture)
    assert picture.read_bytes() == first


@pytest.mark.parametrize("activation", ["relu", "silu"])
def test_a_calibration_is_drawn(tmp_path: Path, activation: str) -> None:
    pytest.importorskip("matplotlib")
    from converter.calibrate import calibrate

    path = write_checkpoint(tmp_path / "source", activation=activation, vocab=4096, hidden=32)
    shutil.copy(DEMO / "tokenizer.json", path)
    calibrate(path, [CARD], out=tmp_path / "calibration", tokens=128, window=64)
    run("--statistics", tmp_path / "calibration", "--plot", tmp_path / "out.svg")
    assert "<svg" in (tmp_path / "out.svg").read_text()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ((), "needs --arg"),
        (("--arg", "0.5", "--ppl-ratio", "1.1"), "exclude each other"),
        (("--arg", "0.5", "--save-thresholds", "nowhere/thresholds.json"), "nowhere is no directory"),
        (("--ppl-ratio", "1"), "above 1"),
        (("--arg", "1.5"), "topk: found 1.5"),
        (("--arg", "0.5", "--window", "1000"), "at most 512"),
        (("--arg", "0.5", "--calibration-text", CARD), "given as --text too"),
        (("--arg", "0.5", "--text", CARD), "the same text as"),
        (("--arg", "0.5", "--plot", "out.jpg"), "ends in .png"),
        (("--arg", "0.5", "--plot", "no-such-directory/out.png"), "no directory"),
        (("--statistics", DEMO), "neither SRC nor --text"),
    ],
)
def test_errors(source: Path, options: tuple[str, ...], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        run(source, "--text", CARD, "--metric", "topk", *options)


def test_nothing_to_measure(source: Path, tmp_path: Path) -> None:
    (tmp_path / "one.txt").write_text("a")
    with pytest.raises(UsageError, match="less than 2 tokens"):
        run(source, "--text", tmp_path / "one.txt", "--metric", "topk", "--arg", "0.5")
    with pytest.raises(UsageError, match="expected SRC and --text"):
        run(source)
    with pytest.raises(UsageError, match="--plot FILE"):
        run("--statistics", tmp_path)


def test_a_full_disk_of_temporary_files(model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr(Samples, "_save", no_room)
    with pytest.raises(ConvertError, match=r"disk full .*set TMPDIR"), open_sparsing(model, windows(), ["pplp"]):
        pass
    assert not [*tmp_path.iterdir()]
