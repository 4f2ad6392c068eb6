"""The engine's Metal path around its kernels, which plain MLX operators stand in for: results, refills, read-backs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

import flashsparse
from flashsparse.errors import RefillError, UsageError
from flashsparse.flash.reader import Batch
from flashsparse.kernels import resolve
from flashsparse.metal.refills import Refills, Timeline
from flashsparse.stats import Counters
from metal_kernels import launch
from tests.metal import plain
from tests.metal.kinds import DECODED, KINDS, PROMPT, close, run
from tests.vector_files import TOLERANCE, error

LAYERS = 3


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_pack_computes_what_native_does(kind: str, tmp_path: Path, stand_in: None, debug: None) -> None:
    pack = KINDS[kind](tmp_path)
    expected, native = run(pack)
    found, metal = run(pack, kernels="metal")
    assert close(found, expected)
    assert (metal.hits, metal.misses, metal.active) == pytest.approx(
        (native.hits, native.misses, native.active), rel=0.05
    )


@pytest.mark.parametrize("kind", ["exact", "compact", "gate-copy", "dense"])
def test_results_do_not_depend_on_slots_or_reading(
    kind: str, packs: dict[str, Path], stand_in: None, debug: None
) -> None:
    """Up to the stand-in's products, whose sums depend on how many records they take; the harness's have equal bits."""
    expected, _ = run(packs[kind], kernels="metal", slots=224)
    for options in ({"slots": 9}, {"slots": 40, "io_threads": 1}, {"slots": 70, "read_mode": "buffered"}):
        found, _ = run(packs[kind], kernels="metal", **options)
        assert error(found, expected) < 1e-5, options


@pytest.mark.parametrize("slots", [9, 60])
def test_results_do_not_depend_on_the_order_of_arrival(
    slots: int, packs: dict[str, Path], stand_in: None, debug: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected, _ = run(packs["exact"], kernels="metal", slots=slots)
    take, rng, waiting = Batch.take, np.random.default_rng(5), {}

    def shuffled(self: Batch, least: int = 1) -> np.ndarray:
        """All reads, handed out in another order and a few at a time."""
        if self.number not in waiting:
            parts = []
            while len(part := take(self)):
                parts.append(part)
            waiting[self.number] = list(rng.permutation(np.concatenate(parts))) if parts else []
        left = waiting[self.number]
        count = int(rng.integers(1, 4))
        done, waiting[self.number] = left[:count], left[count:]
        return np.array(done, np.int32)

    monkeypatch.setattr(Batch, "take", shuffled)
    found, _ = run(packs["exact"], kernels="metal", slots=slots)
    assert np.array_equal(found, expected)


def test_refilling_too_early_would_change_results(
    packs: dict[str, Path], stand_in: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without the rule the rounds of a token overwrite what is still to be computed: the stand-in is late enough."""
    expected, _ = run(packs["exact"], kernels="metal", slots=9)
    monkeypatch.setattr(Refills, "settle", lambda self: self._leases.clear())
    found, _ = run(packs["exact"], kernels="metal", slots=9)
    assert error(found, expected) > 1e-2


@pytest.mark.parametrize("embeddings", ["memory", "flash"])
@pytest.mark.parametrize("kind", ["exact", "compact", "gate-copy"])
def test_a_decoded_token_reads_back_once_a_layer(
    kind: str, embeddings: str, packs: dict[str, Path], stand_in: None
) -> None:
    options = {"kernels": "metal", "slots": 160, "embeddings": embeddings}
    with flashsparse.load(packs[kind], **options) as engine, engine.session() as session:
        session.logits(PROMPT)
        for token in DECODED:
            before = engine.counters.readbacks
            session.logits([token])
            assert engine.counters.readbacks - before == LAYERS + 1  # and the logits


@pytest.mark.parametrize("embeddings", ["memory", "flash"])
@pytest.mark.parametrize("kind", ["exact", "compact", "gate-copy"])
def test_a_decoded_token_makes_no_arrays_of_weights_or_lists(
    kind: str, embeddings: str, packs: dict[str, Path], stand_in: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """MLX takes nothing from the host but the token's number, and no more memory than small results need."""
    options = {"kernels": "metal", "slots": 160, "embeddings": embeddings}
    made: list[Any] = []
    constructor = mx.array

    def counted(*arguments: Any) -> mx.array:
        made.append(arguments[0])
        return constructor(*arguments)

    with flashsparse.load(packs[kind], **options) as engine, engine.session() as session:
        session.logits(PROMPT)
        session.logits([1])
        for token in DECODED:
            with monkeypatch.context() as patched:
                patched.setattr(mx, "array", counted)
                session.logits([token])
        held = []
        for token in DECODED:
            session.logits([token])
            held.append(mx.get_active_memory())
    assert max(held) - min(held) < 16 << 10  # nothing is kept
    assert [np.size(each) for each in made] == [1] * len(DECODED)


@pytest.mark.parametrize("lookahead", ["off", "token"])
@pytest.mark.parametrize("kind", ["exact", "exact-q4", "minicpm", "dense"])
def test_an_embedding_on_flash_changes_no_bits(
    kind: str, lookahead: str, tmp_path: Path, stand_in: None, debug: None
) -> None:
    pack, found = KINDS[kind](tmp_path), []
    steps = [list(range(128)), *([token] for token in (127, 0, 64, 64, 5)), PROMPT]
    for embeddings in ("memory", "flash"):
        options = {"kernels": "metal", "lookahead": lookahead, "max_kv_size": 160, "embeddings": embeddings}
        with flashsparse.load(pack, **options) as engine, engine.session() as session:
            found.append(np.concatenate([session.logits(part) for part in steps]))
            assert (engine.counters.embedding_reads > 0) == (embeddings == "flash")
    assert np.array_equal(*found)


def test_a_row_is_written_when_nothing_reads_it(
    packs: dict[str, Path], stand_in: None, debug: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    with flashsparse.load(packs["exact"], kernels="metal", embeddings="flash") as engine:
        decoder: Any = engine._decoder
        rows, embedding, all_others = decoder.rows, decoder.inner.embed_tokens, np.arange(64, 128, dtype=np.int32)

        def late(token: int) -> mx.array:
            places = rows.places(np.array([token], np.int32))
            output = embedding(mx.array(places)[None])
            rows.reading(places, output)
            return output

        expected = np.array(late(3))
        output, before = late(3), engine.counters.readbacks
        rows.places(all_others)
        assert engine.counters.readbacks == before + 1 and np.array_equal(np.array(output), expected)
        late(3)
        monkeypatch.setattr(Refills, "settle", lambda self: None)
        with pytest.raises(RefillError):
            rows.places(all_others)


def test_keys_and_values_are_written_in_place(packs: dict[str, Path], stand_in: None) -> None:
    with flashsparse.load(packs["exact"], kernels="metal", max_kv_size=64) as engine, engine.session() as session:
        session.logits(PROMPT)
        cache = engine._caches[0]
        before = cache.keys.ctypes.data, cache.values.ctypes.data
        for token in DECODED:
            session.logits([token])
        assert (cache.keys.ctypes.data, cache.values.ctypes.data) == before


def test_a_saved_session_is_the_native_kernels_session_too(
    packs: dict[str, Path], stand_in: None, tmp_path: Path
) -> None:
    with flashsparse.load(packs["exact"], max_kv_size=64) as engine, engine.session() as session:
        session.logits(PROMPT)
        session.save(tmp_path / "native")
        expected = session.logits(DECODED)
    with flashsparse.load(packs["exact"], kernels="metal", max_kv_size=64) as engine, engine.session() as session:
        session.load(tmp_path / "native")
        assert error(session.logits(DECODED), expected) < TOLERANCE
        session.save(tmp_path / "metal")
    with flashsparse.load(packs["exact"], max_kv_size=64) as engine, engine.session() as session:
        session.load(tmp_path / "metal")
        assert session.fed == len(PROMPT) + len(DECODED)


def test_refills_wait_and_a_generation_that_changed_is_an_error() -> None:
    counters = Counters()
    timeline = Timeline(counters)
    refills = Refills(timeline, 8, debug=True)
    refills.reading(np.array([1, 2]), mx.zeros((1,)) + 1)
    refills.refilling(np.array([3]))
    with pytest.raises(RefillError, match="may still read"):
        refills.refilling(np.array([2, 4]))
    refills.settle()
    assert counters.readbacks == 1
    refills.refilling(np.array([2]))
    refills.reading(np.array([2]), mx.zeros((1,)) + 1)
    refills.generation[2] += 1  # something wrote into the slot
    with pytest.raises(RefillError, match=r"slots \[2\]"):
        refills.settle()


def test_what_a_later_result_depends_on_is_not_waited_for_again() -> None:
    counters = Counters()
    timeline = Timeline(counters)
    refills = Refills(timeline, 4)
    output = mx.zeros((1,)) + 1
    refills.reading(np.array([0]), output)
    timeline.later((output != 0).sum())
    timeline.finish(output + 1)
    refills.refilling(np.array([0]))
    refills.settle()
    assert (counters.readbacks, counters.fired) == (1, 1)


def test_what_the_kernels_names_stand_for(packs: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve("native") == "native" and resolve("reference") == "reference"
    with launch.stand_in(plain.metal_kernel):
        assert resolve("metal") == "metal"
        monkeypatch.setattr("sys.platform", "darwin")
        assert resolve("auto") == "metal"
        assert resolve("auto", layers="native") == "native"
    if not launch.available():
        assert resolve("auto") == "native"
        with pytest.raises(UsageError, match="needs an Apple GPU"):
            resolve("metal")


def test_what_the_gpu_does_not_do_is_refused(packs: dict[str, Path], stand_in: None) -> None:
    with pytest.raises(UsageError, match="native"):
        flashsparse.load(packs["exact"], kernels="metal", layers="native")
    with (
        flashsparse.load(packs["exact"], kernels="metal") as engine,
        pytest.raises(UsageError, match="kernels='native'"),
    ):
        engine.judge(print)
