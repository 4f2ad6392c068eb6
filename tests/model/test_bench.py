"""The benchmark suite on tiny shapes: every rung computes the same, and what is printed follows from the counters."""

from __future__ import annotations

import argparse
import contextlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import flashsparse
from bench import convert as convert_bench
from bench import figures, mlx_lm_peer, peers, prefill, scaling
from bench.activity import PROFILES
from bench.ceilings import Ceilings, Limit, drive_rate, limit_of, memory_rate, touched_bytes
from bench.decode import check, summarize, table
from bench.decode_run import Decode, off_profile, read_sequence
from bench.gguf_model import write_gguf
from bench.native_time import native_time
from bench.packs import make_pack, sequence_path
from bench.rungs import RUNGS, SplitPool, forget
from bench.synthetic import SHAPES, Shape, thresholds, write
from flashsparse.flash import FlashFile, ReadPool
from flashsparse.pack.manifest import Manifest
from flashsparse.pack.safetensors import read_header, read_tensor
from flashsparse.stats import Counters

SHAPE = Shape(hidden=128, intermediate=384, layers=2, heads=2, kv_heads=1, vocab=256, positions=256, tokens=128)
PROMPT, TOKENS = 12, 10


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("bench") / "checkpoint"
    with contextlib.suppress(ValueError):  # so small a shape misses its profile; the files are complete
        write(path, SHAPE, PROFILES["paper"])
    return path


@pytest.fixture(scope="module")
def pack(checkpoint: Path) -> Path:
    return make_pack(checkpoint, checkpoint.with_name("predict"), "predict-16", 64)


@pytest.fixture(scope="module")
def exact(checkpoint: Path) -> Path:
    return make_pack(checkpoint, checkpoint.with_name("exact"), "exact-16")


def run(pack: Path, name: str, **options: Any) -> Decode:
    rung = RUNGS[name]
    tokens, _ = read_sequence(sequence_path(pack), PROMPT + TOKENS)
    load = {"slots": 64, "max_kv_size": 32, **options, **rung.load}
    with native_time() as native, flashsparse.load(pack, **load) as engine:
        sets = None
        if rung.replayed:
            sets = Decode(engine, tokens, PROMPT, native).run().sets
            if rung.forgets:
                forget(engine)
        return Decode(engine, tokens, PROMPT, native, rung, sets).run()


def test_rungs_with_the_same_sets_give_the_same_logits(pack: Path) -> None:
    names = ("default", "sets", "window", "no-window", "bundles", "oracle", "slots")
    done = {name: run(pack, name, **({"slots": None} if name == "slots" else {})) for name in names}
    assert len({decode.digest.hexdigest() for decode in done.values()}) == 1
    assert done["slots"].cost.flash_reads == 0
    assert done["no-window"].cost.hits == 0
    assert done["bundles"].reads == done["bundles"].cost.flash_reads <= done["bundles"].cost.misses
    assert done["window"].reads > done["window"].cost.misses  # in pieces, where a record is larger than two sectors


def test_forgetting_ends_what_was_read_ahead(pack: Path) -> None:
    tokens, _ = read_sequence(sequence_path(pack), PROMPT + TOKENS)
    with native_time() as native, flashsparse.load(pack, slots=64, max_kv_size=32, lookahead="on") as engine:
        first = Decode(engine, tokens, PROMPT, native).run()
        forget(engine)
        second = Decode(engine, tokens, PROMPT, native).run()
    assert first.digest.hexdigest() == second.digest.hexdigest()
    assert first.cost.hits == second.cost.hits


def test_the_floor_rungs_give_the_dense_result_and_read_everything(pack: Path) -> None:
    streamed, naive = run(pack, "streamed", slots=None), run(pack, "naive", slots=None)
    assert streamed.digest.hexdigest() == naive.digest.hexdigest()
    manifest = Manifest.load(pack)
    ffn = manifest.layers * manifest.intermediate_size * manifest.record.bytes
    assert streamed.cost.flash_bytes >= TOKENS * ffn
    assert naive.cost.flash_bytes == streamed.cost.flash_bytes + TOKENS * manifest.files["resident.safetensors"].bytes


def test_exact_packs_run_the_rungs_they_can(exact: Path) -> None:
    assert run(exact, "default").digest.hexdigest() == run(exact, "window").digest.hexdigest()
    assert "exact" not in RUNGS["naive"].tiers


@pytest.mark.parametrize("sector", [1, 512])
def test_split_reads_bring_the_same_bytes(tmp_path: Path, sector: int) -> None:
    data = np.random.default_rng(0).integers(0, 256, 40000, np.uint8)
    (tmp_path / "file").write_bytes(data.tobytes())
    offsets = np.array([0, 9000, 39000, 500])
    lengths, needs = np.array([4000, 1536, 1536, 100]), np.array([4000, 1536, 1000, 100])
    arena = np.zeros(4 * 4096, np.uint8)
    dests = arena.ctypes.data + np.arange(4) * 4096
    with FlashFile(tmp_path / "file", "buffered") as file, ReadPool(2) as pool:
        with SplitPool(pool, sector).submit(file, offsets, lengths, needs, dests) as batch:
            taken = []
            while len(done := batch.take()):
                taken += done.tolist()
        assert pool.counters.reads == (12 if sector == 1 else 3 + 3 + 3 + 1)
    assert sorted(taken) == [0, 1, 2, 3]
    for n, (offset, need) in enumerate(zip(offsets, needs, strict=True)):
        assert np.array_equal(arena[4096 * n :][:need], data[offset : offset + need])


def test_split_reads_of_nothing_are_finished(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"abc")
    arena, zero = np.zeros(8, np.uint8), np.array([0])
    with (
        FlashFile(tmp_path / "file", "buffered") as file,
        ReadPool(1) as pool,
        SplitPool(pool, 1).submit(file, zero, zero, zero, zero + arena.ctypes.data) as batch,
    ):
        assert batch.take().tolist() == [0]
        assert batch.take().tolist() == []


def test_bytes_touched_are_weights_records_and_keys(pack: Path) -> None:
    manifest = Manifest.load(pack)
    resident = sum(manifest.files[name].bytes for name in ("resident.safetensors", "predictor.safetensors"))
    cost = Counters(active=30)
    expected = resident - 256 * 128 * 2 + 3 * manifest.record.bytes + 2 * 2 * 1 * 64 * 2 * 100
    assert touched_bytes(manifest, cost, 10, 100) == expected


def test_limits_are_the_larger_or_the_sum(pack: Path, exact: Path) -> None:
    ceilings = Ceilings(drive=1e9, read_bytes=768, depth=8, memory=1e10)
    cost = Counters(active=30, flash_bytes=10_000_000)
    predict, plain = (limit_of(Manifest.load(p), ceilings, cost, 10, 100) for p in (pack, exact))
    assert predict.seconds == max(predict.reading_s, predict.memory_s) == 1e-3
    assert plain.seconds == plain.reading_s + plain.memory_s > 1e-3
    assert "the larger of the two gives 1000.00 tokens/s" in predict.describe()
    assert "inf" in Limit(0.0, 0.0, overlapped=True).describe()


def test_rates_are_positive(pack: Path) -> None:
    assert drive_rate([Manifest.load(pack).flash_path(0)], 768, 4, 0.01) > 0
    assert memory_rate(1, 0.01) > 0


def test_a_denser_prediction_is_no_reason_to_void_a_run() -> None:
    asked = PROFILES["paper"].asked
    denser = {**asked, "density": 0.2, "new": 0.05}
    kinder = {**asked, "persistence_1": 0.9}
    assert off_profile({"tier": "predict", "measured": denser}, "paper") == []
    assert len(off_profile({"tier": "exact", "measured": denser}, "paper")) == 2
    assert len(off_profile({"tier": "predict", "measured": kinder}, "paper")) == 1


def test_the_summary_follows_from_the_runs(pack: Path) -> None:
    decode = run(pack, "default")
    report = decode.report() | {
        "measured": decode.measured(None),
        "void": [],
        "group_peak_bytes": 0,
        "profile": None,
        "cached_share": None,
    }
    result = summarize([report, report], Ceilings(1e9, 768, 8, 1e10))
    assert result["share_of_limit"] == pytest.approx(result["limit_s"]["both"] / report["step_s"])
    assert 0 < report["bookkeeping_share"] < 1
    assert report["step_s"] == pytest.approx(report["reading_s"] + report["computing_s"] + report["bookkeeping_s"])
    whole = {"rung": "default", "cache": "cold", **result}
    other = {**whole, "rung": "window", "logits_sha256": ["another"]}
    assert check([whole]) == [] and len(check([whole, other])) == 1
    assert [line.split()[0] for line in table([whole, other]).strip().splitlines()] == ["rung", "default", "window"]


def test_prefill_reads_each_record_at_most_once_per_chunk(pack: Path, exact: Path) -> None:
    for path in (pack, exact):
        args = argparse.Namespace(pack=path, sequence=None, prompt=100, dram=None, max_kv_size=None, here=0.0)
        report = prefill.run(args)
        assert 0 < report["records_read"] <= report["records_needed"]
        assert prefill.check([report]) == []
    assert len(prefill.check([report | {"records_read": report["records_needed"] + 1}])) == 1


def test_prefill_limits_follow_from_the_counters(exact: Path) -> None:
    manifest = Manifest.load(exact)
    run = {"flash_bytes": 2_000_000, "records_needed": 10, "prefill_s": 4.0, "first_token_s": 5.0, "load_s": 1.0}
    run["resident"] = 30_000
    found = prefill.summarize(manifest, [run], 100, sequential=1e6, products=1e12)
    assert found["limit_s"]["reading"] == 2.0 and found["share_of_limit"] == 0.5
    assert found["limit_s"]["first_token"] == pytest.approx(2 + (30_000 + 10 * manifest.record.bytes) / 1e6)
    attention, head = 2 * 128 * 64 * (2 * 2 + 2 * 1), 128 * 256  # of both layers; of the last token
    assert prefill.operations(manifest, 3, 0) == 2 * (3 * attention + head)
    assert prefill.operations(manifest, 0, 1) == 2 * (head + 2 * 128)  # up and down: the gate is resident


def test_conversion_limits_are_reading_and_writing_once() -> None:
    run = {"seconds": 4.0, "pack_bytes": 1_000_000, "peak_bytes": 5}
    found = convert_bench.summarize([run, run], 1_000_000, 1e6)
    assert found["limit_s"] == 2.0 and found["share_of_limit"] == 0.5 and found["bytes_per_s"] == [250_000.0] * 2


def test_peers_get_the_same_tokens_threads_and_limit(
    pack: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    argv = ["peers", str(pack), "--gguf", "m.gguf", "--checkpoint", str(checkpoint), "--threads", "3",
                "--prompt", "12", "--tokens", "5", "--limit", "3GB", "--skip", "mlx-lm"]  # fmt: skip
    monkeypatch.setattr(sys, "argv", argv)
    contenders = peers.make_contenders(peers.parse())
    names = [contender.name for contender in contenders]
    assert names[0] == "flashsparse" and "mlx-lm" not in names and "mlx-lm in memory" in names
    for contender in contenders:
        assert "12" in contender.command and "5" in contender.command
        assert contender.limit == (
            None if "in memory" in contender.name or "slots" in contender.name else 3_000_000_000
        )
        assert "3" in contender.command or "mlx" in contender.name


def test_the_table_of_peers_says_how_many_times_as_fast() -> None:
    ours = peers.Contender("ours", [], [], None, [{"decode_tps": 6.0, "prefill_tps": 2.0}])
    slow = peers.Contender("slow", [], [], 7_000_000_000, [{"decode_tps": 2.0}, {"decode_tps": 4.0}])
    dead = peers.Contender("dead", [], [], None, failed="exit -9 (killed: out of memory)")
    lines = peers.table([ours, slow, dead]).strip("\n").splitlines()
    assert lines[2].split()[-1] == "2.00" and "3.000 ± 1.414" in lines[2] and "7.00 GB" in lines[2]
    assert "out of memory" in lines[3]


def test_a_contender_that_fails_is_not_run_again(tmp_path: Path) -> None:
    contender = peers.Contender("broken", [sys.executable, "-c", "raise SystemExit('no such thing')"], [], None)
    peers.run(contender)
    assert contender.failed == "exit 1 no such thing" and contender.runs == []
    peers.run(contender)


def test_mlx_lm_runs_the_same_tokens(checkpoint: Path) -> None:
    found = mlx_lm_peer.run(argparse.Namespace(checkpoint=checkpoint, prompt=6, tokens=3, seconds=60.0))
    assert found["tokens"] == 3 and found["decode_tps"] > 0 and found["prefill_tps"] > 0


def test_gguf_files_hold_the_synthetic_model(tmp_path: Path, checkpoint: Path) -> None:
    gguf = pytest.importorskip("gguf")
    write_gguf(tmp_path / "model.gguf", SHAPE, "paper")
    reader = gguf.GGUFReader(tmp_path / "model.gguf")
    stored = {tensor.name: tensor.data for tensor in reader.tensors}
    header = read_header(checkpoint / "model-00001-of-00001.safetensors")
    for name, ours in (("mlp.up_proj", "ffn_up"), ("self_attn.v_proj", "attn_v")):
        raw = read_tensor(header, f"model.layers.1.{name}.weight").view(np.float16)
        assert np.array_equal(stored[f"blk.1.{ours}.weight"], raw)
    query = read_tensor(header, "model.layers.1.self_attn.q_proj.weight").view(np.float16)
    assert np.array_equal(stored["blk.1.attn_q.weight"][1], query[32])  # the second half of the first head, interleaved


def test_scaling_points_are_made_measured_and_deleted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(scaling.SHAPES, "small", SHAPE)
    monkeypatch.setattr(scaling, "BUDGETS", (0.5, 1.0))
    monkeypatch.setattr(scaling, "write", _write)
    args = argparse.Namespace(work=tmp_path, shape="small", profile="paper", kind="exact-16", prompt=8, tokens=8)
    points = list(scaling.budgets(args))
    floor, everything = points[0].x, points[1].x
    assert floor < everything and points[1].options == {"dram": str(everything)}
    assert list(tmp_path.iterdir()) == []


def _write(*args: Any) -> None:
    with contextlib.suppress(ValueError):
        write(*args)


@pytest.mark.parametrize("density", [0.05, 0.3])
def test_a_denser_profile_has_that_density(density: float) -> None:
    profile = scaling.denser("paper", density)
    limits = thresholds(200_000, profile, np.random.default_rng(0))
    drive = np.random.default_rng(1).standard_normal(limits.shape)
    assert float((drive > limits).mean()) == pytest.approx(density, abs=0.005)


def test_the_shapes_have_their_sizes() -> None:
    sizes = {name: scaling.weights(SHAPES[name]) / 1e9 for name in scaling.SIZES}
    assert {name: round(size, 1) for name, size in sizes.items()} == {"1b": 1.1, "3b": 3.0, "7b": 6.7, "13b": 13.0}


def test_figures_draw_points_with_the_limit_and_rungs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    point = {"x": 7e9, "decode_tps": [2.0, 3.0], "limit_tps": 4.0, "hit_rate": 0.5, "density": 0.1,
             "flash_bytes_per_token": 1e6, "budget_bytes": 7_000_000_000}  # fmt: skip
    bars = [{"rung": "naive", "decode_tps": [0.1]}, {"rung": "sets", "failed": "exit 1"}]
    for name, result in (("a", {"against": "size", "points": [point, {**point, "x": 3e9}]}), ("b", {"results": bars})):
        (tmp_path / name).write_text("a table\n" + json.dumps(result) + "\n")
    command = ["bench.figures", str(tmp_path / "plot.png"), str(tmp_path / "a"), str(tmp_path / "b")]
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(sys, "argv", command)
        assert figures.main() == 0
        assert (tmp_path / "plot.png").stat().st_size > 1000
        (tmp_path / "b").write_text("a table\n")
        assert figures.main() == 1
    assert "b: the last line is not" in capsys.readouterr().err
    assert scaling.table("size", [point]).splitlines()[-1].split()[0] == "7.0B"


@pytest.mark.slow
def test_the_program_prints_limits_then_figures_then_json(pack: Path) -> None:
    command = [sys.executable, "-m", "bench.decode", str(pack), "--prompt", "12", "--tokens", "10", "--repeat", "1",
               "--rung", "default", "--rung", "streamed"]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True)
    lines = done.stdout.splitlines()
    assert lines[0].startswith("drive") and lines[1].startswith("memory")
    found = json.loads(lines[-1])
    assert [result["rung"] for result in found["results"]] == ["default", "streamed"]
