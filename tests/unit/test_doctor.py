"""doctor: the limits it states are the arithmetic of measured rates, and its assumptions are named."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner

from converter.expected import expected_manifest
from flashsparse import machine, memory
from flashsparse.cli import doctor as command
from flashsparse.codec_outlook import CodecSample
from flashsparse.errors import BudgetError, CheckpointError, UsageError
from flashsparse.flash.curve import DEPTHS, SIZES, Curve, device_name, load_curve, save_curve
from flashsparse.outlook import ASSUMED_DENSITY, ASSUMED_HITS, Shape, checkpoint_shape, expect

CONFIG = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_act": "relu", "hidden_size": 4096,
    "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 32,
    "vocab_size": 32000, "max_position_embeddings": 2048, "tie_word_embeddings": False,
}  # fmt: skip


def expected_shape(source: Path, dram: str | None, tier: str, bits: int) -> Shape:
    return checkpoint_shape(source, expected_manifest(source, tier, bits), dram)


def drive(rate: float, device: str = "") -> Curve:
    return Curve(device, ((rate,) * len(DEPTHS),) * len(SIZES), None, 2 * rate)


def shape(tier: str, slots: float, density: float | None = None) -> Shape:
    return Shape("m", tier, 10, 1000, 8192, 8192, 10**9, 5 * 10**8, slots, density)


def test_predict_takes_the_slower_of_both_limits() -> None:
    found = expect(shape("predict", 300), drive(1e9), 10e9, 0.2, 0.9)
    read, touched = 10 * 1000 * 0.2 * 0.1 * 8192, 5e8 + 10 * 1000 * 0.2 * 8192
    assert (found.read_bytes, found.touched_bytes) == (round(read), round(touched))
    assert found.tokens_per_second == pytest.approx(1 / max(read / 1e9, touched / 10e9))


def test_exact_hides_only_the_hits() -> None:
    found = expect(shape("exact", 300), drive(1e9), 10e9, 0.2, 0.5)
    hits = 10 * 1000 * 0.2 * 0.5 * 8192 / 10e9
    assert found.tokens_per_second == pytest.approx(1 / (found.read_s + found.memory_s - min(found.read_s, hits)))


def test_dense_reads_everything_in_order() -> None:
    found = expect(shape("dense", 0), drive(1e9), 10e9, 0.2, None)
    assert (found.density, found.hit_rate) == (1.0, 0.0)
    assert found.read_s == pytest.approx(10 * 1000 * 8192 / 2e9)


@pytest.mark.parametrize(
    "slots,density,expected",
    [(1000, None, (ASSUMED_DENSITY, 1.0)), (300, None, (ASSUMED_DENSITY, ASSUMED_HITS)), (300, 0.4, (0.4, 0.0))],
)
def test_what_nobody_measured_is_assumed_and_named(slots: float, density: float | None, expected: object) -> None:
    found = expect(shape("predict", slots, density), drive(1e9), 10e9, None, None)
    assert (found.density, found.hit_rate) == expected
    assert ("assumed" in found.density_from) == (density is None)


def test_a_row_of_the_embedding_is_waited_for() -> None:
    known = shape("predict", 300)
    plain = expect(known, drive(1e9), 10e9, 0.2, 0.9)
    found = expect(replace(known, row=4096), drive(1e9), 10e9, 0.2, 0.9)
    assert found.read_bytes == plain.read_bytes + 4096
    assert 1 / found.tokens_per_second == pytest.approx(1 / plain.tokens_per_second + 4096 / 1e9)


@pytest.fixture(autouse=True)
def large_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "machine_memory", lambda: 64 * 10**9)


def test_a_checkpoint_keeps_its_embedding_in_memory_when_all_fits(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    some, every = (expected_shape(tmp_path, dram, "predict", 16) for dram in ("7GB", "20GB"))
    assert (some.row, every.row) == (8192, 0) and every.resident - some.resident == 32000 * 8192


def test_a_checkpoint_is_judged_by_its_configuration(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    found = expected_shape(tmp_path, "7GB", "predict", 16)
    assert (found.layers, found.records, found.record_bytes) == (32, 11008, 3 * 8192)
    assert found.resident == pytest.approx(32 * 4 * 4096 * 8192 + 32000 * 8192 + 32 * 11008 * 1280, rel=1e-3)
    assert 0.1 < found.slots / 11008 < 0.3
    assert expected_shape(tmp_path, "2.6GB", "predict", 4).record_bytes == 6912
    with pytest.raises(BudgetError, match=r"1\.00 GB is too small: resident weights"):
        expected_shape(tmp_path, "1GB", "predict", 16)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="not JSON"):
        expected_shape(tmp_path, None, "predict", 16)


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(machine, "MEMORY_BYTES", 1 << 20)
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    save_curve(drive(1e9, device_name(tmp_path)), tmp_path / "cache/flashsparse", tmp_path)
    arguments = [str(tmp_path), "--dram", "7GB", "--plot", str(tmp_path / "curve.png")]
    shown = CliRunner().invoke(command.doctor, arguments, catch_exceptions=False).output
    for part in (
        "--again measures anew; passes agree within 0 %",
        "1.00",
        "assumed; set it with --density",
        "expect         at most",
    ):
        assert part in shown
    assert (tmp_path / "curve.png").stat().st_size > 10_000
    facts = json.loads(CliRunner().invoke(command.doctor, [*arguments, "--json"], catch_exceptions=False).output)
    assert facts["memory"] > 0
    assert facts["outlook"]["tokens_per_second"] > 0
    assert facts["curve"]["sequential"] == 2e9


def test_options_of_a_checkpoint_are_refused_for_a_pack(tmp_path: Path) -> None:
    (tmp_path / "pack.json").touch()
    for option in (["--tier", "predict"], ["--bits", "16"]):
        with pytest.raises(UsageError, match=f"{option[0]} is for a checkpoint.*leave it out"):
            CliRunner().invoke(command.doctor, [str(tmp_path), *option], standalone_mode=False, catch_exceptions=False)


def test_when_compressing_pays() -> None:
    sample = CodecSample(8192, 1.6, 1e8, 4e8)
    assert sample.pays_below == pytest.approx(1.5e8)
    assert sample.gain(drive(1.5e8)) == pytest.approx(1)  # where it takes as long either way
    assert sample.gain(drive(1e8)) > 1 > sample.gain(drive(1e9))
    assert "would pay here (below 150 MB/s it does)" in command.codec_lines(drive(1e8), sample)[0]
    assert "does not pay here" in command.codec_lines(drive(1e9), sample)[0]
    assert command.codec_lines(drive(1e9), None) == []
    hardly = command.codec_lines(drive(1e9), CodecSample(8192, 1.004, 1e8, 4e8))[0]
    assert "(below 1.6 MB/s it does)" in hardly and "0.00 GB/s" not in hardly
    never = command.codec_lines(drive(1e9), CodecSample(8192, 1.0, 1e8, 4e8))[0]
    assert "does not pay here (its records do not become smaller)" in never


def test_compressed_records_are_read_faster() -> None:
    plain = shape("predict", 300)
    packed = replace(plain, stored=4096)
    assert expect(packed, drive(1e9), 10e9, 0.2, 0.5).read_s == pytest.approx(
        expect(plain, drive(1e9), 10e9, 0.2, 0.5).read_s / 2
    )


def test_a_doubtful_curve_is_measured_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(machine, "MEMORY_BYTES", 1 << 20)
    device, cache = device_name(tmp_path), tmp_path / "cache/flashsparse"
    old = replace(drive(1e9, device), measured=time.time() - 31 * 86400)
    save_curve(old, cache, tmp_path)
    assert machine.known_curve(tmp_path) == old  # reading follows it, and says so
    (note,) = machine.curve_notes(old)
    assert "measured 31 days ago" in note and "doctor --again" in note
    assert machine.curve_notes(drive(1e9)) == machine.curve_notes(None) == []
    fresh = replace(drive(2e9, device), spread=2.5)
    monkeypatch.setattr(machine, "measure", lambda *_: fresh)
    result = CliRunner().invoke(command.doctor, ["--at", str(tmp_path)], catch_exceptions=False)
    assert "the known curve is doubtful" in result.stderr and "31 days ago" in result.stderr
    assert "doubtful       two passes were 2.5 times apart" in result.stdout
    assert load_curve(cache, tmp_path) == fresh
