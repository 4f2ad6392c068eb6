"""Lookahead on the engine's Metal path: results stay what they are, read-backs are counted.

Plain MLX operators stand in for the kernels; `test_engine.py` has the kernels themselves, to the bit.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

import flashsparse
from flashsparse import FlashReadError, UsageError, prefetch
from flashsparse.engine import Engine
from flashsparse.flash import Batch
from flashsparse.metal.choice import Predict
from flashsparse.metal.ffn import MetalFFN
from flashsparse.metal.prefetch import MetalPrefetch
from flashsparse.metal.refills import Timeline
from flashsparse.metal.walk import Lookup
from metal_kernels import launch
from tests.metal import plain
from tests.metal.kinds import KINDS, PROMPT
from tests.vector_files import error

pytestmark = pytest.mark.usefixtures("stand_in", "debug")
LAYERS = 3
STEPS = [int(t) for t in np.random.default_rng(4).integers(3, 120, 8)]
SAME = 1e-5  # of the largest logit: the stand-in's sums depend on how many records they take
HINTING = ("exact", "compact", "gate-copy", "gate-copy-topk", "low-rank", "resident-gate", "opt")
Decoded = tuple[np.ndarray, list[int]]


def decode(engine: Engine, steps: list[int] = STEPS) -> Decoded:
    """Logits after the prompt and each step, and each step's read-backs."""
    readbacks = []
    with engine.session() as session:
        rows = [session.logits(PROMPT)[-1:]]
        for token in steps:
            before = engine.counters.readbacks
            rows.append(session.logits([token]))
            readbacks.append(engine.counters.readbacks - before)
    return np.concatenate(rows), readbacks


def load(pack: Path, lookahead: str, slots: int = 160, **options: Any) -> Engine:
    return flashsparse.load(pack, kernels="metal", max_kv_size=64, lookahead=lookahead, slots=slots, **options)


def check_tables(engine: Engine) -> None:
    for layer in engine._ffns:
        assert layer.table is not None
        assert layer.lookahead is None or layer.lookahead.pending is None
        layer.table.check()


@pytest.mark.parametrize(
    ("kind", "slots"), [*((kind, 160) for kind in HINTING), ("exact", 30), ("gate-copy", 30), ("gate-copy", 224)]
)
def test_results_are_the_same_with_hints(kind: str, slots: int, tmp_path: Path) -> None:
    pack = KINDS[kind](tmp_path)
    with load(pack, "off", slots) as engine:
        expected, _ = decode(engine)
        active = engine.counters.active
        assert engine.counters.prefetched == 0
    for mode in ("on", "auto", "token"):
        with load(pack, mode, slots) as engine:
            found, readbacks = decode(engine)
            total = engine.counters
            check_tables(engine)
            assert error(found, expected) < SAME
            assert total.active == active
            assert total.prefetch_used <= total.prefetched
            assert 0 < total.hit_rate < 1
            if slots == 160:
                assert total.prefetch_used > 0 or mode == "auto"
                assert max(readbacks) <= LAYERS + 1


@pytest.mark.parametrize("kind", ["exact", "compact", "gate-copy"])
def test_hints_take_no_read_backs_of_their_own(kind: str, packs: dict[str, Path]) -> None:
    with load(packs[kind], "on") as engine:
        _, readbacks = decode(engine)
        assert readbacks == [LAYERS + 1] * len(STEPS)  # a list in each layer, and the logits
        assert engine.counters.prefetch_used > 0


@pytest.mark.parametrize("kind", ["exact", "compact", "gate-copy"])
def test_a_planned_token_reads_back_once_and_its_logits(kind: str, packs: dict[str, Path]) -> None:
    with load(packs[kind], "token", slots=224) as engine:
        _, readbacks = decode(engine)
        assert readbacks.count(2) >= len(STEPS) - 1
        assert engine.counters.resumed == len(STEPS) - readbacks.count(2)
    with load(packs[kind], "token", slots=150) as engine:
        _, readbacks = decode(engine)
        assert engine.counters.resumed > 0  # where the plan did not cover a token, it is no more than without one
        assert max(readbacks) == LAYERS + 1


def test_reads_begin_before_the_layer_knows_its_list(packs: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    under_way = []
    choose = Predict.choose

    def noted(self: Predict, x: mx.array) -> Any:
        under_way.extend(ffn.lookahead.pending is not None for ffn in engine._ffns if ffn.chooser is self)
        return choose(self, x)

    monkeypatch.setattr(Predict, "choose", noted)
    with load(packs["gate-copy"], "on") as engine:
        decode(engine)
    assert sum(under_way) > len(STEPS)


@pytest.mark.parametrize("mode", ["on", "token"])
@pytest.mark.parametrize("guess", ["nothing", "more than fits", "the wrong half"])
def test_wrong_hints_change_nothing(
    mode: str, guess: str, packs: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    scores = {
        "nothing": np.full(224, np.nan, np.float32),
        "more than fits": np.ones(224, np.float32),
        "the wrong half": (np.arange(224) % 2).astype(np.float32),
    }[guess]
    with load(packs["gate-copy"], "off") as engine:
        expected, _ = decode(engine)
    monkeypatch.setattr(Predict, "likely", lambda self, guessed: (scores, 0.5))
    with load(packs["gate-copy"], mode) as engine:
        found, _ = decode(engine)
        check_tables(engine)
        assert error(found, expected) < SAME
        assert guess != "the wrong half" or engine.counters.prefetch_wasted_bytes > 0


@pytest.mark.parametrize("mode", ["on", "token"])
def test_a_read_ahead_that_fails_is_read_again(
    mode: str, packs: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    with load(packs["exact"], "off") as engine:
        expected, _ = decode(engine)
    calls = 0

    def take(ahead: prefetch.Ahead, least: int) -> np.ndarray:
        nonlocal calls
        calls += 1
        if calls % 3 == 0:
            raise FlashReadError("as a drive does", "", 0, 0, 5)
        return ahead.batch.take(least)

    monkeypatch.setattr(prefetch.Ahead, "_done", take)
    with load(packs["exact"], mode) as engine:
        found, _ = decode(engine)
        check_tables(engine)
    assert error(found, expected) < SAME and calls > 10


def test_a_read_ahead_that_fails_was_of_no_use(packs: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(ahead: prefetch.Ahead, least: int) -> np.ndarray:
        raise FlashReadError("as a drive does", "", 0, 0, 5)

    landed, land = [], MetalPrefetch.land

    def noted(self: MetalPrefetch) -> None:
        before = self.counters.prefetched
        land(self)
        used, needed = self.counters.prefetch_used, np.arange(self.flash.records, dtype=np.int32)
        self.account(needed)  # as if the layer needed every record
        landed.append((self.counters.prefetched - before, self.counters.prefetch_used - used))

    monkeypatch.setattr(prefetch.Ahead, "_done", fail)
    monkeypatch.setattr(MetalPrefetch, "land", noted)
    with load(packs["exact"], "token") as engine:
        decode(engine)
    begun, used = np.sum(landed, axis=0)
    assert begun > 0 and used == 0


@pytest.mark.parametrize("owner", [Lookup, Timeline, Batch, MetalFFN])
def test_an_interrupted_token_is_fed_again(
    owner: type, packs: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    name = {Lookup: "compute", Timeline: "finish", Batch: "take", MetalFFN: "account"}[owner]
    with load(packs["exact"], "token") as engine:
        expected, _ = decode(engine)
    kept, original = [], getattr(owner, name)
    with load(packs["exact"], "token") as engine, engine.session() as session:
        rows = [session.logits(PROMPT)[-1:]]
        for index, token in enumerate(STEPS):
            left = index % 4 + 1

            def interrupting(*arguments: Any, **options: Any) -> Any:
                nonlocal left
                left -= 1
                if left == 0:
                    raise KeyboardInterrupt
                return original(*arguments, **options)

            with monkeypatch.context() as patched:
                patched.setattr(owner, name, interrupting)
                fed = session.fed
                try:
                    rows.append(session.logits([token]))
                    continue
                except KeyboardInterrupt as interrupt:
                    kept.append(interrupt)  # its traceback keeps rounds and batches alive
            assert session.fed == fed
            del session._tokens[fed:]  # else it would be fed together with the next
            rows.append(session.logits([token]))
        found = np.concatenate(rows)
    assert error(found, expected) < SAME and len(kept) > 2


def test_what_is_kept_of_a_resumed_token_is_what_it_would_be(packs: dict[str, Path]) -> None:
    kept = []
    for mode in ("off", "token"):
        with load(packs["exact"], mode, slots=120) as engine, engine.session() as session:
            for token in PROMPT + STEPS:
                session.logits([token])
            kept.append([(cache.keys.copy(), cache.values.copy()) for cache in engine._caches])
            assert engine.counters.resumed > 0 or mode == "off"
    for (keys, values), (other_keys, other_values) in zip(*kept, strict=True):
        assert error(other_keys, keys) < 1e-3 and error(other_values, values) < 1e-3  # 16 bits


def test_every_step_is_observed_once_and_in_order(packs: dict[str, Path]) -> None:
    seen: dict[str, list[tuple[int, list[int]]]] = {"off": [], "token": []}
    for mode, found in seen.items():
        with load(packs["gate-copy"], mode, slots=200) as engine:
            engine.observe(lambda layer, ids, found=found: found.append((layer, ids.tolist())))
            decode(engine)
    assert seen["off"] == seen["token"]


def test_a_planned_token_makes_no_arrays(packs: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Any] = []
    constructor = mx.array

    def counted(*arguments: Any) -> mx.array:
        made.append(arguments[0])
        return constructor(*arguments)

    with load(packs["exact"], "token") as engine, engine.session() as session:
        session.logits(PROMPT)
        session.logits([1])
        before = engine.counters.resumed
        with monkeypatch.context() as patched:
            patched.setattr(mx, "array", counted)
            for token in STEPS:
                session.logits([token])
        passes = len(STEPS) + engine.counters.resumed - before
    assert [np.size(each) for each in made] == [1] * passes  # the token's number


def test_packs_with_a_whole_layer_take_hints_around_it(tmp_path: Path) -> None:
    pack = KINDS["whole-layer"](tmp_path)
    with load(pack, "off", slots=224) as engine:
        expected, _ = decode(engine)
    with load(pack, "token", slots=224) as engine:
        found, readbacks = decode(engine)
        hinting = [isinstance(ffn, MetalFFN) and len(ffn.named_here) for ffn in engine._ffns]
        assert hinting == [1, 0, 0] and not engine._kernels.walk.wanted  # type: ignore[union-attr]
        assert readbacks == [LAYERS] * len(STEPS)  # the whole layer needs none
    assert error(found, expected) < SAME


def test_dense_results_are_computed_without_hints(packs: dict[str, Path]) -> None:
    results = []
    for mode in ("off", "token"):
        with load(packs["gate-copy"], mode) as engine:
            engine.set_dense(True)
            results.append(decode(engine)[0])
            assert engine.counters.prefetched == engine.counters.resumed == 0
    assert np.array_equal(*results)


def test_plans_of_whole_tokens_are_for_the_gpu(packs: dict[str, Path]) -> None:
    with pytest.raises(UsageError, match="'token'"):
        flashsparse.load(packs["exact"], kernels="native", lookahead="token")


USED = {
    "exact": {"fs_gate"},
    "exact-q4": {"fs_gate"},
    "compact": {"fs_candidates_round", "fs_candidates"},
    "gate-copy": {"fs_score_round", "fs_score"},
    "gate-copy-topk": {"fs_score_round", "fs_score", "fs_topk"},
    "gate-up-copy": {"fs_score_round", "fs_value"},
    "low-rank": {"fs_topk"},
    "resident-gate": {"fs_gate", "fs_topk"},
}
ALWAYS = {"fs_compact", "fs_sparse_ffn_hidden", "fs_sparse_ffn_down", "fs_sparse_ffn_sum"}


@pytest.mark.parametrize("kind", USED)
@pytest.mark.parametrize("mode", ["off", "token"])
def test_a_pack_is_computed_by_the_kernels_made_for_it(kind: str, mode: str, tmp_path: Path) -> None:
    built: dict[str, plain.PlainKernel] = {}

    def make(name: str, *arguments: Any, **options: Any) -> plain.PlainKernel:
        return built.setdefault(name, plain.metal_kernel(name, *arguments, **options))

    with launch.stand_in(make), load(KINDS[kind](tmp_path), mode) as engine:
        decode(engine)
    launched = {max((k for k in plain.KERNELS if name.startswith(k)), key=len) for name, k in built.items() if k.calls}
    assert launched == USED[kind] | ALWAYS | ({"fs_lookup"} if mode == "token" else set())
