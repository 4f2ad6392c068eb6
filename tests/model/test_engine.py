"""The engine on tiny models: same bits under every budget, honest counters, typed errors, sessions."""

from __future__ import annotations

import contextlib
import gc
import itertools
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest

import flashsparse
from flashsparse import flash
from flashsparse.pack.manifest import Manifest
from tests.model.packs import make_pack
from tests.model.predict_packs import make_predict_pack

PROMPT = [int(t) for t in np.random.default_rng(7).integers(3, 160, 70)]
STEPS = [int(t) for t in np.random.default_rng(8).integers(3, 160, 8)]


@pytest.fixture(scope="module")
def pack(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_pack(tmp_path_factory.mktemp("engine"))


def run(path: Path, **options: object) -> np.ndarray:
    """Logits of a prefill and of some decode steps."""
    with flashsparse.load(path, **options) as engine, engine.session() as session:
        return np.concatenate([session.logits(PROMPT), *(session.logits([t]) for t in STEPS)])


@pytest.mark.parametrize("bits,tier", [(16, "exact"), (8, "exact"), (4, "exact"), (16, "dense"), (4, "dense")])
def test_output_is_the_same_bits_for_every_budget_thread_count_and_read_mode(
    tmp_path: Path, bits: int, tier: str
) -> None:
    path = make_pack(tmp_path, bits=bits, tier=tier)
    expected = run(path, slots=512, threads=1, io_threads=1, read_mode="buffered")
    assert np.isfinite(expected).all()
    for (slots, threads), mode in itertools.product(((17, 3), (64, 2), (300, 1)), ("direct", "buffered")):
        found = run(path, slots=slots, threads=threads, io_threads=4, read_mode=mode)
        assert np.array_equal(expected, found), (slots, threads, mode)
    assert np.array_equal(expected, run(path, slots=1))


@pytest.mark.parametrize("lookahead", ["off", "on"])
def test_held_slots_stay_empty_and_change_no_bits(pack: Path, lookahead: str) -> None:
    expected = run(pack, slots=512)
    with flashsparse.load(pack, slots=512, lookahead=lookahead) as engine, engine.session() as session:
        tables = [ffn.table for ffn in engine._ffns if ffn.table is not None]
        engine._hold(True)
        rows = [session.logits(PROMPT)]
        assert [table.native.touched for table in tables] == [0] * len(tables)  # the prompt streams
        needed = []
        engine.observe(lambda layer, ids: needed.append(len(ids)))
        rows += [session.logits([token]) for token in STEPS]
        for index, table in enumerate(tables):
            assert table.native.touched == max(needed[index :: len(tables)]) < 512
        most = max(needed)
        engine._hold(False)
        session.logits(PROMPT)
        assert all(table.native.touched > most for table in tables)
    assert np.array_equal(np.concatenate(rows), expected)


def test_order_of_completions_and_state_of_the_cache_do_not_change_the_output(
    pack: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = run(pack, slots=512)
    rng = np.random.default_rng(0)
    original = flash.Batch.take

    def shuffled(self: flash.Batch, least: int = 1) -> np.ndarray:
        """Wait for all, then hand them out a few at a time in random order."""
        if not hasattr(self, "_waiting"):
            parts = [original(self)]
            while len(parts[-1]):
                parts.append(original(self))
            self._waiting = rng.permutation(np.concatenate(parts))
        count = int(rng.integers(1, 5))
        given, self._waiting = self._waiting[:count], self._waiting[count:]
        return given

    monkeypatch.setattr(flash.Batch, "take", shuffled)
    with flashsparse.load(pack, slots=64) as engine:
        for layer in engine._ffns:
            layer.native = None  # which takes reads without Batch
        for _ in range(3):  # the second and third time the slots hold other records
            with engine.session() as session:
                found = np.concatenate([session.logits(PROMPT), *(session.logits([t]) for t in STEPS)])
            assert np.array_equal(expected, found)


def test_native_rounds_do_what_python_does(tmp_path: Path) -> None:
    path = make_predict_pack(tmp_path)
    costs, results = [], []
    for natively in (False, True):
        with flashsparse.load(path, slots=64, lookahead="off") as engine, engine.session() as session:
            for layer in engine._ffns:
                layer.native = layer.native if natively else None
            results.append(np.concatenate([session.logits(PROMPT[:9]), *(session.logits([t]) for t in STEPS)]))
            held = [layer.table.resident().tolist() for layer in engine._ffns if layer.table is not None]
            costs.append({**asdict(engine.counters), "held": held})
    assert np.array_equal(*results)
    timed = {name for name, value in costs[0].items() if isinstance(value, float)}
    assert all(costs[0][name] == costs[1][name] for name in costs[0].keys() - timed)
    assert costs[0]["misses"] > 0 < costs[0]["hits"] and costs[0]["fired"] > 0


def test_a_short_prompt_reads_the_union_of_its_sets_and_a_long_one_each_record_once(pack: Path) -> None:
    with flashsparse.load(pack, slots=512, read_mode="buffered") as engine, engine.session() as session:
        seen: list[set[int]] = [set(), set(), set()]
        engine.observe(lambda layer, ids: seen[layer].update(ids.tolist()))
        before = engine.counters.copy()
        session.logits(PROMPT[:4])
        cost = engine.counters - before
        record = engine.manifest.record
        assert cost.misses == sum(map(len, seen))
        assert cost.needed_bytes == cost.misses * record.bytes <= cost.flash_bytes
    with flashsparse.load(pack, slots=64, read_mode="buffered") as engine, engine.session() as session:
        before = engine.counters.copy()
        session.logits(PROMPT[:64])
        cost = engine.counters - before
        assert 0 < cost.flash_bytes <= 3 * 512 * record.stride


def io_counter(name: str) -> int:
    lines = Path("/proc/self/io").read_text().splitlines()
    return int(dict(line.split(": ") for line in lines)[name])


@pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="needs Linux's per-process I/O counters")
@pytest.mark.parametrize("mode,counter", [("direct", "read_bytes"), ("buffered", "rchar")])
def test_counted_bytes_are_the_operating_systems_own(pack: Path, mode: str, counter: str) -> None:
    with flashsparse.load(pack, slots=64, read_mode=mode) as engine, engine.session() as session:
        if engine.read_mode != mode:
            pytest.skip(f"this filesystem refuses {mode} reads")
        session.logits(PROMPT)
        os.sync()
        counted, system = engine.counters.flash_bytes, io_counter(counter)
        for token in STEPS:
            session.logits([token])
        counted, system = engine.counters.flash_bytes - counted, io_counter(counter) - system
    # rchar also counts the reads of /proc/self/io itself.
    assert counted > 0 and system > 0
    assert counted <= system <= counted + 8192


def test_the_plan_is_shown_before_loading_and_the_smallest_budget_works(pack: Path) -> None:
    with pytest.raises(flashsparse.BudgetError) as refused:
        flashsparse.load(pack, dram="1MB")
    assert "smallest" in str(refused.value)
    plans: list[flashsparse.MemoryPlan] = []
    with flashsparse.load(pack, dram=refused.value.smallest, on_plan=plans.append) as engine:
        assert plans == [engine.plan]
        assert engine.plan.slots == (64, 64, 64)
        with engine.session() as session:
            assert np.array_equal(session.logits(PROMPT)[-1], run(pack, slots=512)[len(PROMPT) - 1])


def test_a_truncated_file_is_an_error_with_its_name_and_the_session_survives(tmp_path: Path) -> None:
    path = make_pack(tmp_path)
    expected = run(path, slots=512)
    victim = path / "flash-001.safetensors"
    data = victim.read_bytes()
    with flashsparse.load(path, slots=64, read_mode="buffered") as engine, engine.session() as session:
        with victim.open("r+b") as file:
            file.truncate(20000)
        with pytest.raises(flashsparse.FlashReadError, match=r"flash-001\.safetensors") as failed:
            session.logits(PROMPT)
        assert failed.value.offset >= 16384
        assert session.fed == 0
        with victim.open("r+b") as file:
            file.write(data)
        session.clear()
        assert np.array_equal(session.logits(PROMPT), expected[: len(PROMPT)])


def test_generate_counts_tokens_and_stops_where_asked(pack: Path) -> None:
    with flashsparse.load(pack, slots=64) as engine, engine.session() as session:
        pieces = list(session.generate(PROMPT, max_tokens=12))
        stats = pieces[-1].stats.to_dict()
        assert pieces[-1].finish_reason in ("length", "stop")
        assert stats["prompt_tokens"] == len(PROMPT)
        assert stats["generation_tokens"] == len(pieces)
        assert session.tokens == PROMPT + [p.token for p in pieces]
        assert isinstance(stats["hit_rate"], float) and 0 <= stats["hit_rate"] <= 1
        assert stats["peak_memory_bytes"] > stats["runtime_bytes"] > 0


def test_greedy_generation_is_the_argmax_of_the_logits(pack: Path) -> None:
    with flashsparse.load(pack, slots=64) as engine:
        with engine.session() as session:
            made = [p.token for p in session.generate(PROMPT, max_tokens=6)]
        with engine.session() as session:
            rows = session.logits(PROMPT + made[:-1])[len(PROMPT) - 1 :]
        assert made == [int(row.argmax()) for row in rows]


def test_sampling_repeats_with_a_seed_and_a_conversation_continues(pack: Path) -> None:
    options = {"max_tokens": 8, "temp": 1.0, "top_p": 0.9, "top_k": 20}
    with flashsparse.load(pack, slots=64) as engine:
        runs = []
        for seed in (1, 1, 2):
            with engine.session() as session:
                first = [p.token for p in session.generate(PROMPT[:9], seed=seed, **options)]
                second = [p.token for p in session.generate(PROMPT[9:12], seed=seed, **options)]
                assert session.tokens == PROMPT[:9] + first + PROMPT[9:12] + second
                runs.append(first + second)
    assert runs[0] == runs[1] != runs[2]


def test_a_saved_session_continues_with_the_same_bits(pack: Path, tmp_path: Path) -> None:
    file = tmp_path / "talk.session"
    with flashsparse.load(pack, slots=64) as engine:
        with engine.session() as session:
            list(session.generate(PROMPT[:20], max_tokens=3))
            session.save(file)
            expected = session.logits(STEPS)
        with engine.session() as session:
            session.load(file)
            assert np.array_equal(session.logits(STEPS), expected)
            with pytest.raises(flashsparse.SessionError, match="no saved session"):
                session.load(tmp_path / "absent")
            file.write_bytes(file.read_bytes()[:-8])
            with pytest.raises(flashsparse.SessionError):
                session.load(file)
    other = make_pack(tmp_path, "other", seed=5)
    with flashsparse.load(other, slots=64) as engine, engine.session() as session:
        list(session.generate(PROMPT[:20], max_tokens=3))
        session.save(file)
    with (
        flashsparse.load(pack, slots=64) as engine,
        engine.session() as session,
        pytest.raises(flashsparse.SessionError, match="pack"),
    ):
        session.load(file)


def descriptors(pack: Path) -> int:
    """How many of this process's are of the pack's files."""
    files = {(entry.stat().st_dev, entry.stat().st_ino) for entry in pack.iterdir()}
    found = 0
    for number in range(1024):
        with contextlib.suppress(OSError):
            stat = os.fstat(number)
            found += (stat.st_dev, stat.st_ino) in files
    return found


@pytest.mark.parametrize("layers", ["native", "modules"])
def test_an_engine_that_is_dropped_unclosed_says_so_and_leaves_no_descriptor(pack: Path, layers: str) -> None:
    engine = flashsparse.load(pack, slots=64, layers=layers)
    session = engine.session()
    assert list(session.generate([1, 2, 3], max_tokens=2))
    assert descriptors(pack) == 4
    with pytest.warns(ResourceWarning, match=r"unclosed FlashFile\(.*close it, or the engine"):
        del engine, session
        gc.collect()
    assert descriptors(pack) == 0


def test_misuse_is_a_typed_error(pack: Path) -> None:
    with flashsparse.load(pack, slots=64, max_kv_size=64) as engine:
        session = engine.session()
        with pytest.raises(flashsparse.SessionError, match="close it first"):
            engine.session()
        with pytest.raises(flashsparse.ContextLengthError, match="--max-kv-size"):
            session.logits(PROMPT)
        assert session.tokens == []
        with pytest.raises(flashsparse.UsageError, match="vocabulary"):
            session.logits([160])
        with pytest.raises(flashsparse.UsageError):
            session.logits([])
        with pytest.raises(flashsparse.UsageError, match="no tokenizer"):
            session.generate("hello")
        with pytest.raises(flashsparse.UsageError, match="temp"):
            session.generate([1], temp=-1)
        session.close()
        with pytest.raises(flashsparse.SessionError, match="closed"):
            session.logits([1])
    with pytest.raises(flashsparse.UsageError, match="read_mode"):
        flashsparse.load(pack, read_mode="mmap")
    with pytest.raises(flashsparse.UsageError, match="kernels"):
        flashsparse.load(pack, kernels="cuda")


def test_a_full_context_is_not_helped_by_a_larger_cache(pack: Path) -> None:
    limit = int(Manifest.load(pack).config["max_position_embeddings"])
    with (
        flashsparse.load(pack, slots=64, max_kv_size=limit) as engine,
        engine.session() as session,
        pytest.raises(flashsparse.ContextLengthError, match=f"needs {limit + 1} tokens.*new conversation"),
    ):
        session.logits([1] * (limit + 1))


def test_a_conversation_that_outgrows_its_cache_stops_and_keeps_what_it_has(pack: Path) -> None:
    with flashsparse.load(pack, slots=64, max_kv_size=64) as engine, engine.session() as session:
        made = list(session.generate(PROMPT[:60], max_tokens=50))
        assert [piece.finish_reason for piece in made] == [None] * 4 + ["length"]
        assert len(session.tokens) == 65 and session.fed == 64 and session.full
        with pytest.raises(flashsparse.ContextLengthError):
            next(session.generate([1]))
        assert len(session.tokens) == 65


def test_a_reply_that_just_fits_leaves_room(pack: Path) -> None:
    with flashsparse.load(pack, slots=64, max_kv_size=64) as engine, engine.session() as session:
        assert len(list(session.generate(PROMPT[:60], max_tokens=4))) == 4
        assert not session.full
        with pytest.raises(flashsparse.ContextLengthError):  # the prompt alone exceeds the cache
            next(session.generate([1]))
        assert len(session.tokens) == 64


@pytest.mark.parametrize("bits,tier", [(16, "exact"), (4, "exact"), (8, "dense")])
def test_native_kernels_agree_with_plain_mlx_operators(tmp_path: Path, bits: int, tier: str) -> None:
    # A float32 source has a float32 KV cache: a 16-bit one rounds last-bit differences up to its own step.
    path = make_pack(tmp_path, bits=bits, tier=tier, dtype="F32")
    native, reference = run(path, slots=64, kernels="native"), run(path, slots=64, kernels="reference")
    assert np.abs(native - reference).max() <= 1e-4 * np.abs(reference).max()


MEASURE = """
import sys, flashsparse
with flashsparse.load(sys.argv[1], dram=int(sys.argv[2])) as engine, engine.session() as session:
    pieces = list(session.generate(list(range(3, 153)), max_tokens=40))
    print(pieces[-1].stats.peak_memory_bytes - engine.runtime_bytes, engine.plan.budget)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads VmHWM")
def test_peak_footprint_less_runtime_stays_within_the_budget(tmp_path: Path) -> None:
    path = make_pack(tmp_path, hidden=256, intermediate=2048, layers=4, vocab=512)
    with pytest.raises(flashsparse.BudgetError) as refused:
        flashsparse.load(path, dram=1)
    for budget in (refused.value.smallest, refused.value.smallest + 2_000_000):
        command = [sys.executable, "-c", MEASURE, str(path), str(budget)]
        used, limit = map(int, subprocess.run(command, capture_output=True, text=True, check=True).stdout.split())
        assert 0 < used <= limit == budget


def test_a_pack_replaced_while_it_is_opened_is_seen_old_or_new_never_mixed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from flashsparse import opening

    path, other = make_pack(tmp_path), make_pack(tmp_path, "other", seed=5)
    expected = run(other, slots=64)
    original, calls = opening.load_tokenizer, []

    def replaced(manifest: object) -> object:
        if not calls:
            path.rename(tmp_path / "old")
            other.rename(path)
        calls.append(1)
        return original(manifest)

    monkeypatch.setattr(opening, "load_tokenizer", replaced)
    assert np.array_equal(run(path, slots=64), expected)
    assert len(calls) == 2


def test_resident_weights_in_many_segments_are_the_same(pack: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from flashsparse import weights

    expected = run(pack, slots=64)
    monkeypatch.setattr(weights, "SEGMENT_BYTES", 20_000)
    for mode in ("direct", "buffered"):
        assert np.array_equal(run(pack, slots=64, read_mode=mode), expected)


def test_buffers_that_mlx_allocates_serve_as_well(pack: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from flashsparse import weights

    expected = run(pack, slots=64)
    monkeypatch.setattr(weights, "_mapped_memory", lambda nbytes: weights._mlx_memory(nbytes)[1])
    assert np.array_equal(run(pack, slots=64), expected)
