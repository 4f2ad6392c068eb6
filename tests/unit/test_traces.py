"""Replays of recorded sets: LRU is a naive one, Belady is the optimum, and the rest do what their names say."""

from __future__ import annotations

import itertools
import json
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bench.traces.__main__ import replay
from bench.traces.policies import Belady, Clock, Decayed, Keyed, Lfu, Product, Window, misses, policies, rounds_of
from bench.traces.trace import FORMAT, Trace
from flashsparse.errors import UsageError

RECORDS = 6


def sets_of(*sets: tuple[int, ...]) -> list[np.ndarray]:
    return [np.array(sorted(ids), np.uint16) for ids in sets]


some_sets = st.lists(st.sets(st.integers(0, RECORDS - 1), max_size=4), min_size=1, max_size=7).map(
    lambda found: sets_of(*map(tuple, found))
)


def fewest_misses(sets: list[np.ndarray], slots: int) -> int:
    """By trying every choice of victims."""
    rounds = [frozenset(map(int, part)) for ids in sets for part in rounds_of(ids, slots)]

    @cache
    def best(time: int, held: frozenset[int]) -> int:
        if time == len(rounds):
            return 0
        now = rounds[time]
        room = slots - len(now)
        others = sorted(held - now)
        kept = itertools.combinations(others, min(room, len(others)))
        return len(now - held) + min(best(time + 1, now | frozenset(keep)) for keep in kept)

    return best(0, frozenset())


@settings(deadline=None, max_examples=200)
@given(some_sets, st.integers(1, 5))
def test_belady_misses_as_few_as_any_choice_of_victims(sets: list[np.ndarray], slots: int) -> None:
    belady = Belady(RECORDS, slots, [part for ids in sets for part in rounds_of(ids, slots)])
    assert misses(belady, sets, slots).sum() == fewest_misses(sets, slots)


def naive_lru(sets: list[np.ndarray], slots: int) -> list[int]:
    """Least recently used by round, lower slots first among equals; free slots before all."""
    used = {slot: (-1, slot) for slot in range(slots)}
    holds: dict[int, int] = {}
    found = []
    for time, ids in enumerate(sets):
        missed = 0
        for number, part in enumerate(rounds_of(ids, slots)):
            missing = [int(i) for i in part if int(i) not in holds.values()]
            hit = [slot for slot, held in holds.items() if held in part]
            free = sorted((key, slot) for slot, key in used.items() if slot not in hit)
            for record, (_, slot) in zip(missing, free, strict=False):
                holds[slot] = record
            for slot, held in holds.items():
                if held in part:
                    used[slot] = (time * 100 + number, slot)
            missed += len(missing)
        found.append(missed)
    return found


@settings(deadline=None, max_examples=100)
@given(some_sets, st.integers(1, 5))
def test_lru_is_what_a_naive_one_gives(sets: list[np.ndarray], slots: int) -> None:
    single = [one for ids in sets for one in ids.reshape(-1, 1)]  # of equals, either may go
    assert misses(Keyed(RECORDS, slots), single, slots).tolist() == naive_lru(single, slots)


@settings(deadline=None, max_examples=100)
@given(some_sets, st.integers(1, 5))
def test_every_policy_lies_between_the_optimum_and_missing_everything(sets: list[np.ndarray], slots: int) -> None:
    found = {name: misses(make(), sets, slots) for name, make in policies(sets, RECORDS, slots, 1).items()}
    first = len(set(np.concatenate(sets).tolist()))
    for name, missed in found.items():
        assert missed.sum() >= max(first, found["Belady"].sum()), name
        assert (missed <= [len(ids) for ids in sets]).all(), name


@pytest.mark.parametrize("make", [Clock, Lfu, Decayed, Keyed, Product])
def test_with_a_slot_for_every_record_only_first_uses_miss(make: type) -> None:
    sets = sets_of((0, 3), (1, 3), (0, 1, 5), (5,), (0,))
    assert misses(make(RECORDS, RECORDS), sets, RECORDS).tolist() == [2, 1, 1, 0, 0]


def test_the_window_forgets_what_was_not_used_lately() -> None:
    sets = sets_of((0,), (1,), (1,), (1,), (0,), (1,), (1,), (1,), (1,), (0,))
    assert misses(Window(RECORDS, 4), sets, 4).tolist() == [1, 1, 0, 0, 0, 0, 0, 0, 0, 1]


def test_the_clock_spares_once_what_was_used() -> None:
    # Both are spared, so the hand comes round to 0; at the next miss 1 is no longer spared, and 2 is.
    sets = sets_of((0,), (1,), (2,), (3,), (2,))
    clock = Clock(RECORDS, 2)
    assert misses(clock, sets[:3], 2).tolist() == [1, 1, 1]
    assert sorted(clock.record_in.tolist()) == [1, 2]
    assert misses(clock, sets[3:], 2).tolist() == [1, 0]
    assert sorted(clock.record_in.tolist()) == [2, 3]


def test_lfu_keeps_what_was_used_often() -> None:
    sets = sets_of((0,), (0,), (0,), (1,), (2,), (0,))
    assert misses(Lfu(RECORDS, 2), sets, 2).tolist() == [1, 0, 0, 1, 1, 0]


def test_a_decayed_frequency_forgets() -> None:
    sets = sets_of(*[(0,)] * 40, *[(1,), (2,)] * 40)
    assert misses(Lfu(RECORDS, 2), sets, 2)[-2:].sum() == 2
    assert misses(Decayed(RECORDS, 2), sets, 2)[-2:].sum() == 0


def test_pins_come_from_the_first_tokens_only() -> None:
    sets = sets_of((0,), (0,), (1,), (2,), (0,), (1,), (2,), (0,))
    pinned = misses(policies(sets, RECORDS, 2, 2)["LRU, 1/2 pinned"](), sets, 2)
    assert pinned.tolist() == [1, 0, 1, 1, 0, 1, 1, 0]


def tiny_trace() -> Trace:
    rng = np.random.default_rng(0)
    sets = [[np.flatnonzero(rng.random(40) < 0.2).astype(np.uint16) for _ in range(12)] for _ in range(3)]
    sets[1][4] = sets[1][4][:0]
    description = {"format": FORMAT, "layers": 3, "records": 40, "record_bytes": 100, "stride": 128}
    return Trace(description, np.arange(12, dtype=np.int32), sets)


def test_a_trace_is_read_as_it_was_written(tmp_path: Path) -> None:
    trace = tiny_trace()
    trace.save(tmp_path / "t.npz")
    found = Trace.load(tmp_path / "t.npz")
    assert found.description == trace.description and found.tokens.tolist() == trace.tokens.tolist()
    assert all(
        a.tolist() == b.tolist() for x, y in zip(found.sets, trace.sets, strict=True) for a, b in zip(x, y, strict=True)
    )
    assert found.density == trace.density


@pytest.mark.parametrize("damage", ["format", "counts", "ids", "not"])
def test_what_is_no_trace_is_refused(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "t.npz"
    tiny_trace().save(path)
    parts = dict(np.load(path))
    if damage == "format":
        parts["description"] = np.frombuffer(json.dumps({"format": "other"}).encode(), np.uint8)
    elif damage == "counts":
        parts["counts"] = parts["counts"][:, :2]
    elif damage == "ids":
        parts["ids"] = parts["ids"] + 40
    np.savez(path, **parts)
    if damage == "not":
        path.write_bytes(b"something else")
    with pytest.raises(UsageError, match=r"t\.npz"):
        Trace.load(path)


def test_replayed_bytes_are_the_missed_records(tmp_path: Path) -> None:
    trace = tiny_trace()
    rows = {(row["policy"], row["slots"]): row for row in replay(trace, [4, 40], 3)}
    needed = sum(len(ids) for layer in trace.sets for ids in layer[3:]) / 9
    lru, all_in = rows["LRU", 4], rows["LRU", 40]
    assert lru["bytes_per_token"] == pytest.approx(100 * lru["misses_per_token"])
    assert lru["hit_rate"] == pytest.approx(1 - lru["misses_per_token"] / needed)
    assert all_in["hit_rate"] == rows["Belady", 40]["hit_rate"] >= rows["Belady", 4]["hit_rate"] >= lru["hit_rate"]
