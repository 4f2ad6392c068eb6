"""The slot table against a plain model, over any sequence of requests and failures."""

from __future__ import annotations

import math
import sys
from types import FrameType

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from flashsparse import cache
from flashsparse.cache import RECORD_BYTES, SLOT_BYTES, Reservation, Round, SlotTable

RECORDS = 24
requests = st.sets(st.integers(0, RECORDS - 1)).map(sorted)


class Model:
    """What a slot table must do, the slow way: one dict from record to slot and each record's decayed uses."""

    def __init__(self, slots: int) -> None:
        self.slots = slots
        self.slot_of: dict[int, int] = {}
        self.uses = {half_life: dict.fromkeys(range(RECORDS), np.float32(0)) for half_life in (2, 64)}
        self.step = self.touched = 0
        self.holding = False

    def key(self, record: int) -> tuple[np.float32, int]:
        """Records with the smallest are victims."""
        recent, lasting = (float(uses[record]) * math.exp2(-self.step / life) for life, uses in self.uses.items())
        return np.float32(recent + 0.01 * lasting), self.slot_of[record]

    def start(self, ids: list[int]) -> dict[int, int]:
        """Evict for the missing records of one round; their slots in the order in which they are given out."""
        missing = [i for i in ids if i not in self.slot_of]
        taken = set(self.slot_of.values())
        free = [slot for slot in range(self.within(len(ids) - len(missing), len(missing))) if slot not in taken]
        rest = sorted((i for i in self.slot_of if i not in ids), key=self.key)
        evicted = rest[: max(0, len(missing) - len(free))]
        given_out = sorted(free[: len(missing)] + [self.slot_of.pop(i) for i in evicted])
        self.touched = max([self.touched, *(slot + 1 for slot in given_out)])
        return dict(zip(missing, given_out, strict=True))

    def within(self, hits: int, missing: int) -> int:
        """Slots that may be given out: while holding those touched, and as many more as are needed beside the hits."""
        return min(self.slots, max(self.touched, hits + missing)) if self.holding else self.slots

    def reserve(self, new: list[int], slots: list[int], keep: list[int]) -> None:
        """The same slots as a round of `keep` and `new` would give out."""
        given = self.start(sorted({*new, *keep}))
        assert [given[i] for i in new] == slots

    def evict(self, slots: list[int]) -> None:
        for i in [i for i, slot in self.slot_of.items() if slot in slots]:
            del self.slot_of[i]

    def finish(self, used: list[int], arrived: dict[int, int]) -> None:
        self.slot_of |= arrived
        for half_life, uses in self.uses.items():
            for i in used:
                uses[i] += np.float32(math.exp2(self.step / half_life))


class Sequences(RuleBasedStateMachine):
    @initialize(slots=st.integers(1, RECORDS + 2))
    def begin(self, slots: int) -> None:
        self.table = SlotTable(RECORDS, slots)
        self.model = Model(slots)
        self.bytes_of: dict[int, int] = {}  # slot -> the record whose bytes lie there
        self.loaded = 0

    @rule(ids=requests)
    def request(self, ids: list[int]) -> None:
        seen: list[int] = []
        before, misses = set(self.table.resident().tolist()), self.table.misses
        for part in self.table.rounds(np.array(ids, np.int32)):
            self.check_round(part)
            self.read(part)
            part.commit()
            assert all(self.bytes_of[slot] == i for i, slot in zip(part.ids.tolist(), part.slots.tolist(), strict=True))
            self.model.finish(part.ids.tolist(), self.arriving)
            self.table.check()
            seen += part.ids.tolist()
            self.loaded += len(self.arriving)
        assert seen == ids
        if len(ids) <= self.table.slots:
            assert self.table.misses - misses == len(set(ids) - before)

    @rule(ids=requests, how=st.sampled_from(["abort", "leave", "keep", "read half"]), stop=st.integers(0, 3))
    def failing_request(self, ids: list[int], how: str, stop: int) -> None:
        rounds = self.table.rounds(np.array(ids, np.int32))
        for n, part in enumerate(rounds):
            self.check_round(part)
            if n < stop:
                self.read(part)
                part.commit()
                self.model.finish(part.ids.tolist(), self.arriving)
                self.loaded += len(self.arriving)
                continue
            if how == "read half":
                for slot in part.slots[part.missing][::2].tolist():
                    self.bytes_of[slot] = -1
            if how == "abort":
                part.abort()
                with pytest.raises(RuntimeError):
                    part.commit()
            if how == "keep":  # as when an exception's traceback keeps the iterator alive
                self.kept = rounds
            break
        if how == "keep":
            list(self.table.rounds(np.array([], np.int32)))
        else:
            rounds.close()
            self.table.check()

    @rule(hinted=requests, ids=requests, arrive=st.sampled_from(["all", "some", "none"]), flags=st.integers(0, 3))
    def request_with_reads_ahead(self, hinted: list[int], ids: list[int], arrive: str, flags: int) -> None:
        ask, used = bool(flags & 1), bool(flags & 2)
        named = np.array(hinted, np.int32)
        absent = self.table.absent(named)
        keep, new = named[~absent], named[absent][: self.table.slots - int(np.count_nonzero(~absent))]
        held = self.table.reserve(new, keep)
        self.model.reserve(new.tolist(), held.slots.tolist(), keep.tolist())
        self.table.check()
        if ask and self.table.fits(np.array(ids, np.int32)):
            for part in self.table.rounds(ids, held):
                self.read(part)
                assert set(part.ids[part.ahead].tolist()) == set(new.tolist()) & set(ids)
                assert all(
                    held.slots[np.flatnonzero(held.ids == part.ids[at])[0]] == part.slots[at] for at in part.ahead
                )
                assert part.missing[part.ahead].all()
                part.commit()
                rest = part.missing.copy()
                rest[part.ahead] = False
                self.model.evict(part.slots[rest].tolist())
                self.model.finish(part.ids.tolist(), dict(zip(part.ids.tolist(), part.slots.tolist(), strict=True)))
                self.loaded += int(np.count_nonzero(part.missing))
        here = np.array([arrive == "all" or (arrive == "some" and i % 2 == 0) for i in held.ids.tolist()], bool)
        asked = {i for i in held.ids.tolist() if i in self.model.slot_of}
        late = {i: s for i, s in zip(held.ids[here].tolist(), held.slots[here].tolist(), strict=True) if i not in asked}
        self.bytes_of |= {slot: i for i, slot in late.items()}
        self.table.settle(held, here, used)
        self.table.settle(held, here, used)  # once is enough
        self.model.finish(list(late) if used else [], late)
        self.model.touched = self.table.native.touched  # of rounds beside a reservation, which the model does not play
        self.table.check()

    @rule(on=st.booleans())
    def hold(self, on: bool) -> None:
        self.table.hold(on)
        self.model.holding = on

    @rule()
    def end_token(self) -> None:
        self.table.end_token()
        self.model.step += 1

    def check_round(self, part: Round) -> None:
        ids, slots = part.ids.tolist(), part.slots.tolist()
        assert len(ids) <= self.table.slots and len(set(slots)) == len(slots)
        self.arriving = self.model.start(ids)
        assert [i for i, new in zip(ids, part.missing.tolist(), strict=True) if new] == list(self.arriving)
        assert dict(zip(ids, slots, strict=True)) == {i: (self.model.slot_of | self.arriving)[i] for i in ids}

    def read(self, part: Round) -> None:
        for i, slot in zip(part.ids[part.missing].tolist(), part.slots[part.missing].tolist(), strict=True):
            self.bytes_of[slot] = i

    @invariant()
    def same_as_the_model(self) -> None:
        if not hasattr(self, "table"):
            return
        resident = set(self.table.resident().tolist())
        assert len(resident) <= self.table.native.touched <= self.table.slots
        assert self.table.native.touched == self.model.touched
        if getattr(self, "kept", None) is None:
            assert resident == set(self.model.slot_of)
            assert self.table.misses == self.loaded
        assert all(self.bytes_of[slot] == i for i, slot in self.model.slot_of.items())
        self.kept = None


TestSequences = Sequences.TestCase
TestSequences.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)


@given(ids=st.lists(requests, max_size=12), slots=st.integers(1, RECORDS))
@settings(max_examples=50, deadline=None)
def test_same_requests_give_same_slots(ids: list[list[int]], slots: int) -> None:
    tables = [SlotTable(RECORDS, slots), SlotTable(RECORDS, slots)]
    for wanted in ids:
        chosen = [[part.slots.tolist() for part in run_all(table, wanted)] for table in tables]
        assert chosen[0] == chosen[1]


def run_all(table: SlotTable, ids: list[int]) -> list[Round]:
    done = []
    for part in table.rounds(ids):
        part.commit()
        done.append(part)
    table.end_token()
    return done


def test_one_round_when_the_set_fits() -> None:
    table = SlotTable(100, 10)
    assert len(run_all(table, list(range(10)))) == 1
    assert [len(part.ids) for part in run_all(table, list(range(50, 75)))] == [10, 10, 5]
    assert run_all(table, []) == []


def test_a_held_table_takes_no_new_slots_but_for_what_a_request_needs() -> None:
    def ask(*ids: int) -> list[int]:
        slots: list[int] = []
        for part in table.rounds(ids):
            part.commit()
            slots += part.slots.tolist()
        return slots

    table = SlotTable(32, 16)
    assert ask(0, 1, 2, 3) == [0, 1, 2, 3]
    table.hold(True)
    assert sorted(ask(4, 5, 6)) == [0, 1, 2] and table.native.touched == 4
    held = table.reserve([7, 8], np.array([4], np.int32))
    assert max(held.slots) < 4
    table.settle(held, np.ones(2, bool))
    assert sorted(ask(10, 11, 12, 13, 14, 15)) == [0, 1, 2, 3, 4, 5]  # one token's set is read in one round
    table.hold(False)
    assert ask(20) == [6]


def test_what_was_used_least_goes_first() -> None:
    table = SlotTable(10, 3)
    for wanted in ([0], [1], [2], [1], [3]):
        run_all(table, wanted)
    assert table.resident().tolist() == [1, 2, 3]
    for wanted in ([3], [3], [3], [4], [5], [6]):
        run_all(table, wanted)
    assert table.resident().tolist() == [3, 5, 6]
    for wanted in ([7, 8], [0, 7, 8], [0, 1]):  # 3 was used most once, and long ago
        run_all(table, wanted)
    assert 3 not in table.resident()


@pytest.mark.parametrize("slots", [1, 40, 1000])
def test_a_table_takes_the_bytes_that_the_memory_plan_counts(slots: int) -> None:
    table = SlotTable(4000, slots)
    arrays = [
        value for owner in (table, table.native) for value in vars(owner).values() if isinstance(value, np.ndarray)
    ]
    assert sum(array.nbytes for array in arrays) == RECORD_BYTES * 4000 + SLOT_BYTES * slots


@pytest.mark.parametrize("slots", [300, 1201])
def test_victims_of_a_large_table_are_those_that_sorting_finds(slots: int) -> None:
    """Many keys share their highest bits, many are equal; steps go beyond the one at which uses are counted anew."""
    rng, records = np.random.default_rng(slots), 2500
    table, recent, lasting = SlotTable(records, slots), *np.zeros((2, records), np.float32)
    for step in range(150):
        ids = np.flatnonzero(rng.random(records) < rng.choice([0.02, 0.08])).astype(np.int32)
        before = table.native.record_in.copy()
        run_all(table, ids.tolist())
        keys = (recent * np.exp2(-step / 2) + 0.01 * (lasting * np.exp2(-step / 64))).astype(np.float32)
        keys = np.where(before < 0, -1, np.where(np.isin(before, ids), np.inf, keys[before]))
        missing = np.setdiff1d(ids, before)
        expected = before.copy()
        expected[np.sort(np.argsort(keys, kind="stable")[: len(missing)])] = missing
        assert np.array_equal(table.native.record_in, expected)
        recent[ids] += np.float32(2.0 ** (step / 2))
        lasting[ids] += np.float32(2.0 ** (step / 64))


@given(seed=st.integers(0, 2**32 - 1), pause=st.integers(1, 700))
@settings(max_examples=10, deadline=None)
def test_uses_are_compared_in_the_same_way_after_thousands_of_steps(seed: int, pause: int) -> None:
    """Records used once each, and long ago: the one used last stays longest, whatever was rescaled between."""
    table, order = SlotTable(64, 16), np.random.default_rng(seed).permutation(16).tolist()
    for _ in range(5000 // pause):
        for wanted in [[record] for record in order] * 2:
            run_all(table, wanted)
        for _ in range(pause):
            table.end_token()
    for count in range(1, 6):
        run_all(table, [16 + count])
        assert set(table.resident().tolist()) == {*order[count:], *range(17, 17 + count)}
    table.check()


def test_counts_hits_and_misses() -> None:
    table = SlotTable(10, 4)
    for wanted in ([0, 1, 2], [1, 2, 3], [1, 2, 3]):
        run_all(table, wanted)
    assert (table.hits, table.misses) == (5, 4)


def test_begin_is_kept_by_slot() -> None:
    table = SlotTable(10, 4)
    part = next(iter(table.rounds([3, 7])))
    table.set_begin(part.slots, np.array([128, 512]))
    assert table.begin[part.slots].tolist() == [128, 512]


@pytest.mark.parametrize("ids", [[3, 3], [4, 2], [-1, 2], [2, 10], [[1, 2]]])
def test_refuses_other_ids(ids: list[int]) -> None:
    with pytest.raises(ValueError, match="ids must be"):
        SlotTable(10, 4).rounds(ids)


def test_refuses_senseless_sizes() -> None:
    with pytest.raises(ValueError, match="must be positive"):
        SlotTable(10, 0)


def test_commit_twice_is_an_error() -> None:
    table = SlotTable(10, 4)
    for part in table.rounds([1, 2]):
        part.commit()
        with pytest.raises(RuntimeError, match="already committed"):
            part.commit()
    with pytest.raises(RuntimeError):
        part.commit()
    assert table.resident().tolist() == [1, 2]


@pytest.mark.parametrize("commit", [True, False])
def test_a_request_left_behind_does_not_block_the_next(commit: bool) -> None:
    table = SlotTable(10, 4)
    left = table.rounds([0, 1, 2, 3, 4])
    part = next(left)
    if commit:
        part.commit()
    run_all(table, [7, 8])
    assert table.resident().tolist() == ([2, 3, 7, 8] if commit else [7, 8])
    table.check()
    assert not run_all(table, [7, 8])[0].missing.any()
    waiting = next(new := table.rounds([1]))
    with pytest.raises(RuntimeError, match="another request"):
        next(left)
    waiting.commit()
    assert list(new) == []


class Interrupt:
    """Raises KeyboardInterrupt before the n-th bytecode that runs in flashsparse.cache, as a signal would."""

    def __init__(self, after: int) -> None:
        self.left = after

    def __call__(self, frame: FrameType, event: str, _: object) -> Interrupt | None:
        if frame.f_code.co_filename != cache.__file__:
            return None
        frame.f_trace_opcodes = True
        if event == "opcode":
            self.left -= 1
            if self.left == 0:
                raise KeyboardInterrupt
        return self

    def __enter__(self) -> None:
        self.before = sys.gettrace()
        sys.settrace(self)

    def __exit__(self, *_: object) -> None:
        sys.settrace(self.before)


def ask(
    table: SlotTable, slab: np.ndarray, ids: list[int], arrive: bool = True, held: Reservation | None = None
) -> None:
    """A request as the engine makes it; slab holds the record number that lies in each slot, -1 for torn bytes."""
    for part in table.rounds(ids, held):
        slab[part.slots[part.missing]] = -1
        assert slab[part.slots[~part.missing]].tolist() == part.ids[~part.missing].tolist()
        if not arrive:
            raise OSError
        slab[part.slots[part.missing]] = part.ids[part.missing]
        part.commit()
    table.end_token()


def ask_ahead(table: SlotTable, slab: np.ndarray, hinted: list[int], ids: list[int], arrive: bool = True) -> None:
    """The same with reads ahead, as the engine makes them: reserve, read, ask, settle."""
    named = np.array(hinted, np.int32)
    absent = table.absent(named)
    held = table.reserve(named[absent], named[~absent])
    slab[held.slots] = -1
    slab[held.slots[::2]] = held.ids[::2]  # half of them arrive
    here = np.arange(len(held.ids)) % 2 == 0
    try:
        ask(table, slab, ids, arrive, held)
    finally:
        here |= np.isin(held.ids, ids) & arrive
        table.settle(held, here & (slab[held.slots] == held.ids))


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("ids", [[2, 6, 7], [0, 1, 9], [4, 5, 8]])
@pytest.mark.parametrize("arrive", [True, False])
def test_an_interrupt_between_reserving_and_settling_leaves_hits_true(ids: list[int], arrive: bool) -> None:
    kept, after, interrupt = [], 0, Interrupt(0)
    while interrupt.left <= 0:
        after += 1
        interrupt = Interrupt(after)
        table, slab = SlotTable(16, 6), np.full(6, -1)
        for wanted in ([0, 1, 2, 3], [2, 3, 9], [4, 5]):
            ask(table, slab, wanted)
        try:
            with interrupt:
                ask_ahead(table, slab, [2, 6, 8], ids, arrive)
        except (KeyboardInterrupt, OSError) as error:
            kept.append(error)
        if after % 2:
            with pytest.raises(OSError):
                ask(table, slab, [15], arrive=False)
        else:
            ask_ahead(table, slab, [10, 11], [10, 12])
            table.check()
        table.settle(table.reserve([], np.empty(0, np.int32)), np.empty(0, bool))
        table.check()
        assert set(table.resident().tolist()) <= set(slab.tolist())


def test_reservations_that_make_no_sense_are_refused() -> None:
    table = SlotTable(16, 4)
    run_all(table, [1, 2])
    with pytest.raises(ValueError, match="absent ones"):
        table.reserve([2, 3], np.empty(0, np.int32))
    with pytest.raises(ValueError, match="2 in 4 slots"):
        table.reserve([3, 4, 5], np.array([1, 2], np.int32))
    held = table.reserve([3, 4], np.array([1], np.int32))
    assert not table.fits(np.array([1, 2, 5], np.int32))
    with pytest.raises(ValueError, match="do not fit"):
        table.rounds([1, 2, 5], held)
    assert table.fits(np.array([1, 2, 3, 4], np.int32))
    table.settle(held, np.array([True, False]))
    assert table.resident().tolist() == [1, 2, 3]
    table.reserve([4, 5, 6], np.empty(0, np.int32))
    run_all(table, [7, 8, 9, 10])  # a reservation that nobody knows of any more is dropped
    assert table.resident().tolist() == [7, 8, 9, 10]
    table.check()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # interrupts while iterators are closed
@pytest.mark.parametrize(
    ("ids", "arrive"),
    [
        ([2, 4, 5], True),
        ([2, 6, 7, 9], True),
        ([1, 3, 4, 8, 10, 12, 13, 14], True),
        ([2, 6, 7, 9], False),
    ],
)
def test_an_interrupt_at_any_bytecode_leaves_hits_true(ids: list[int], arrive: bool) -> None:
    kept, after, interrupt = [], 0, Interrupt(0)
    while interrupt.left <= 0:
        after += 1
        interrupt = Interrupt(after)
        table, slab = SlotTable(16, 6), np.full(6, -1)
        for wanted in ([0, 1, 2, 3], [2, 3, 9], [4, 5]):
            ask(table, slab, wanted)
        try:
            with interrupt:
                ask(table, slab, ids, arrive)
        except (KeyboardInterrupt, OSError) as error:
            kept.append(error)  # its traceback keeps the iterator alive
        if after % 2:
            with pytest.raises(OSError):
                ask(table, slab, [5, 15], arrive=False)
        list(table.rounds([]))
        table.check()
        assert set(table.resident().tolist()) <= set(slab.tolist())
        for wanted in ([7, 8], [0, 1, 2, 3, 4, 5, 6, 7], ids, list(range(10, 16))):
            ask(table, slab, wanted)
            table.check()
        assert table.resident().tolist() == list(range(10, 16))
    assert after > 100
