"""Sizes, footprints, control groups and the memory plan."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flashsparse import errors, memory
from flashsparse.errors import BudgetError, FlashSparseError, UsageError
from flashsparse.macos import PAGE_BYTES
from flashsparse.rows import buffer_bytes, embedding_bytes
from flashsparse.sizes import Passes, Sizes
from tests.unit.tiny_pack import write_pack

GB = 1_000_000_000


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("7GB", 7 * GB), ("7 gb", 7 * GB), ("4GiB", 4 << 30), ("1.5GB", 1_500_000_000), ("512MiB", 512 << 20),
        ("50%", 8 * GB), ("12.5 %", 2 * GB), ("123456", 123456), ("100%", 16 * GB), ("9007199254740993", 2**53 + 1),
    ],
)  # fmt: skip
def test_parse_size(text: str, size: int) -> None:
    assert memory.parse_size(text, 16 * GB) == size


@pytest.mark.parametrize("text", ["", "GB", "7XB", "-7GB", "7,5GB", "120%", "0", "0%", "1e9", "seven"])
def test_parse_size_refuses(text: str) -> None:
    with pytest.raises(UsageError, match="size"):
        memory.parse_size(text, 16 * GB)


def test_a_budget_beyond_the_machine_is_refused() -> None:
    assert memory.budget_bytes("16GB", 16 * GB) == memory.budget_bytes(16 * GB, 16 * GB) == 16 * GB
    for dram in ("9000TB", "17GB", 16 * GB + 1):
        with pytest.raises(UsageError, match=r"more than the machine's memory \(16\.00 GB\)"):
            memory.budget_bytes(dram, 16 * GB)
    with pytest.raises(UsageError, match="more than the machine"):
        memory.budget_bytes("9000TB")


def test_format_bytes() -> None:
    sizes = (7 * GB, 512_000_000, 1_500_000, 2_500, 12)
    assert [memory.format_bytes(size) for size in sizes] == ["7.00 GB", "512 MB", "1.5 MB", "2.5 kB", "12 B"]
    assert memory.format_bytes is errors.format_bytes


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_footprint_follows_what_is_touched() -> None:
    before, machine = memory.footprint(), memory.machine_memory()
    block = bytearray(b"\1" * 40_000_000)
    assert memory.footprint() - before > 30_000_000
    assert 0 < memory.footprint() <= memory.peak_footprint() < machine
    del block


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_reset_peak() -> None:
    block = bytearray(b"\1" * 80_000_000)
    peak = memory.peak_footprint()
    del block
    if not memory.reset_peak():
        pytest.skip("this system refuses")
    assert memory.peak_footprint() < peak - 40_000_000
    assert memory.reset_peak("/proc/no-such-file") is False


def test_status_without_the_field_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "status").write_text("Name: x\nVmRSS:\t  12 kB\n")
    assert memory._status("VmRSS", str(tmp_path / "status")) == 12 * 1024
    with pytest.raises(FlashSparseError, match="VmHWM"):
        memory._status("VmHWM", str(tmp_path / "status"))


def put(root: Path, name: str, text: str) -> None:
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text + "\n")


def test_cgroup_v2_takes_the_tightest_parent(tmp_path: Path) -> None:
    put(tmp_path, "proc/self/cgroup", "0::/user/app/run")
    put(tmp_path, "sys/fs/cgroup/user/app/run/memory.max", "max")
    put(tmp_path, "sys/fs/cgroup/user/app/memory.max", "9000000000")
    put(tmp_path, "sys/fs/cgroup/user/memory.max", "8000000000")
    assert memory.cgroup_limit(str(tmp_path)) == 8_000_000_000


def test_cgroup_v1_takes_the_tightest_parent(tmp_path: Path) -> None:
    put(tmp_path, "proc/self/cgroup", "5:devices:/x\n4:memory:/a/b\n0::/")
    put(tmp_path, "sys/fs/cgroup/memory/a/b/memory.limit_in_bytes", "3000000000")
    put(tmp_path, "sys/fs/cgroup/memory/a/memory.limit_in_bytes", str(2**63 - 4096))
    put(tmp_path, "sys/fs/cgroup/memory/memory.limit_in_bytes", "9223372036854771712")
    put(tmp_path, "sys/fs/cgroup/devices/x/memory.limit_in_bytes", "1")
    assert memory.cgroup_limit(str(tmp_path)) == 3_000_000_000


def test_cgroup_path_of_the_host_seen_from_a_container(tmp_path: Path) -> None:
    put(tmp_path, "proc/self/cgroup", "4:cpu,memory:/docker/1234\n0::/../outer")
    put(tmp_path, "sys/fs/cgroup/memory/memory.limit_in_bytes", "2000000000")
    assert memory.cgroup_limit(str(tmp_path)) == 2_000_000_000


def test_cgroup_hybrid_mount(tmp_path: Path) -> None:
    put(tmp_path, "proc/self/cgroup", "0::/a")
    put(tmp_path, "sys/fs/cgroup/unified/a/memory.max", "1000000000")
    assert memory.cgroup_limit(str(tmp_path)) == 1_000_000_000


def test_no_cgroup_limit(tmp_path: Path) -> None:
    assert memory.cgroup_limit(str(tmp_path)) is None
    put(tmp_path, "proc/self/cgroup", "4:memory:/a\n0::/\nnonsense")
    put(tmp_path, "sys/fs/cgroup/memory/a/memory.limit_in_bytes", "9223372036854771712")
    put(tmp_path, "sys/fs/cgroup/memory.max", "max")
    assert memory.cgroup_limit(str(tmp_path)) is None


def test_default_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "cgroup_limit", lambda: None)
    assert memory.default_budget(20 * GB, 0, machine=16 * GB) == 8 * GB
    assert memory.default_budget(3 * GB, 0, machine=16 * GB) == 3 * GB
    reserve = 16_000_000 + 4 * GB // 256
    assert memory.default_budget(20 * GB, 75_000_000, machine=16 * GB, limit=4 * GB) == 4 * GB - 75_000_000 - reserve
    assert memory.default_budget(20 * GB, 75_000_000, machine=16 * GB, limit=90_000_000) == 0


SHAPE = {
    "runtime": 75_000_000, "resident": 7 * GB, "kv_bytes_per_token": 524_288, "max_kv_size": None,
    "context_limit": 4096, "scratch": 100_000_000, "overhead": 50_000_000, "records": 11008, "layers": 32,
    "slot_bytes": 17_408,
}  # fmt: skip


def test_plan_leaves_room_for_one_token() -> None:
    plan = memory.make_plan(budget=9 * GB, **SHAPE)
    assert plan.max_kv_size % 64 == 0 and 256 < plan.max_kv_size < 4096
    assert len(set(plan.slots)) == 1 and plan.slots[0] >= 0.12 * 11008
    assert plan.unused < 32 * 17_408
    assert plan.slots_bytes == sum(plan.slots) * plan.slot_bytes


def test_plan_of_everything() -> None:
    plan = memory.make_plan(budget=9 * GB, **SHAPE)
    whole = memory.make_plan(budget=plan.needs_all, **SHAPE)
    assert whole.slots == (11008,) * 32 and whole.max_kv_size == 4096 and whole.unused == 0
    assert memory.make_plan(budget=plan.needs_all + 5, **SHAPE).unused == 5


def test_plan_below_the_floor_names_the_smallest() -> None:
    with pytest.raises(BudgetError, match="too small") as caught:
        memory.make_plan(budget=GB, **SHAPE)
    smallest = caught.value.smallest
    plan = memory.make_plan(budget=smallest, **SHAPE)
    assert plan.slots == (64,) * 32 and plan.max_kv_size == 256 and plan.floor == smallest
    with pytest.raises(BudgetError):
        memory.make_plan(budget=smallest - 1, **SHAPE)
    words = str(caught.value).split()
    assert memory.parse_size(words[words.index("--dram") + 1], 0) >= smallest


def test_plan_with_a_given_context() -> None:
    plan = memory.make_plan(budget=9 * GB, **(SHAPE | {"max_kv_size": 100}))
    assert plan.max_kv_size == 100 and plan.kv == 100 * 524_288
    for tokens in (0, 4097):
        with pytest.raises(UsageError, match="--max-kv-size"):
            memory.make_plan(budget=9 * GB, **(SHAPE | {"max_kv_size": tokens}))


def test_plan_of_streamed_layers_has_no_slots() -> None:
    plan = memory.make_plan(budget=9 * GB, **(SHAPE | {"floor_slots": 0}))
    assert plan.slots == (0,) * 32 and plan.slots_bytes == 0
    assert plan.max_kv_size == (9 * GB - 7_150_000_000) // 524_288 // 64 * 64
    assert "streamed" in plan.describe()


@given(
    extra=st.integers(0, 30_000_000), records=st.integers(1, 500), layers=st.integers(1, 6),
    context=st.integers(1, 900), kv=st.integers(0, 9000), density=st.floats(0, 1),
    given_context=st.none() | st.integers(1, 900), table=st.integers(0, 90),
)  # fmt: skip
def test_plan_never_exceeds_its_budget(
    extra: int, records: int, layers: int, context: int, kv: int, given_context: int | None, density: float, table: int
) -> None:
    shape = {
        "runtime": 1, "resident": 1000, "kv_bytes_per_token": kv, "context_limit": context, "scratch": 10,
        "max_kv_size": None if given_context is None else min(given_context, context), "overhead": 5,
        "records": records, "layers": layers, "slot_bytes": 640, "expected_density": density, "table_bytes": table,
    }  # fmt: skip
    with pytest.raises(BudgetError) as caught:
        memory.make_plan(budget=0, **shape)
    plan = memory.make_plan(budget=caught.value.smallest + extra, **shape)
    assert plan.unused >= 0 and min(64, records) <= plan.slots[0] <= records
    assert min(256, context) <= plan.max_kv_size <= context or plan.max_kv_size == shape["max_kv_size"]
    assert plan.budget <= plan.needs_all or plan.slots[0] == records


def test_what_slots_cost_beside_their_bytes_is_overhead() -> None:
    plain = memory.make_plan(budget=9 * GB, **(SHAPE | {"max_kv_size": 512}))
    plan = memory.make_plan(budget=9 * GB, table_bytes=36, **(SHAPE | {"max_kv_size": 512}))
    assert plan.overhead == 50_000_000 + 36 * sum(plan.slots) and plan.slots_bytes == sum(plan.slots) * 17_408
    assert 0 <= plan.unused < 32 * (17_408 + 36)
    assert plan.floor - plain.floor == 36 * 32 * 64 and plan.needs_all - plain.needs_all == 36 * 32 * 11008
    assert memory.make_plan(budget=plan.floor, table_bytes=36, **(SHAPE | {"max_kv_size": 512})).unused == 0


def test_the_overhead_grows_with_records_and_slots(tmp_path: Path) -> None:
    def overhead(records: int, slots: int, tier: str = "exact") -> int:
        pack = write_pack(tmp_path / f"{records}", intermediate_size=records)
        files: list[Any] = [SimpleNamespace(sector=512, direct=False)]
        return Sizes(pack, files, tier, 1, 1).plan(0, None, 64, slots)[0].overhead

    assert overhead(512, 100) - overhead(256, 100) == 12 * 256 * 2  # 12 bytes for each record of two layers
    assert overhead(512, 300) - overhead(512, 100) == 29 * 200 * 2  # 29 for each slot
    assert overhead(512, 0, "dense") == overhead(256, 0, "dense") == overhead(256, 1) - 2 * (12 * 256 + 29)


def test_the_embedding_stays_on_flash_unless_all_else_fits(tmp_path: Path) -> None:
    pack = write_pack(tmp_path / "untied", vocab_size=20_000, intermediate_size=512)
    left = embedding_bytes(pack)
    assert left == 20_000 * pack.hidden_size * 2

    def plan(embeddings: str, dram: int | None, slots: int | None = None) -> memory.MemoryPlan:
        files: list[Any] = [SimpleNamespace(sector=512, direct=True)]
        return Sizes(pack, files, "exact", 1, 1, embeddings=embeddings).plan(0, dram, 64, slots)[0]

    kept, flash = plan("memory", 1 << 40), plan("flash", 1 << 40)
    assert (kept.on_flash, flash.on_flash) == (0, left)
    gained = left - buffer_bytes(pack, 512)
    assert gained > left / 2
    for before, after in ((kept.floor, flash.floor), (kept.needs_all, flash.needs_all)):
        assert gained - 6 * PAGE_BYTES <= before - after <= gained
    for dram, expected in ((kept.needs_all, kept), (kept.needs_all - 1, flash), (flash.floor, flash)):
        found = plan("auto", dram)
        assert found.on_flash == expected.on_flash and found.unused >= 0
    assert all(count == pack.intermediate_size for count in plan("auto", kept.needs_all - 1).slots)
    assert plan("auto", None).on_flash == 0 and plan("auto", None, pack.intermediate_size).on_flash == 0
    assert plan("auto", None, pack.intermediate_size - 1).on_flash == left
    assert "of embedding stay on flash" in flash.describe() and "embedding" not in kept.describe()
    with pytest.raises(BudgetError) as caught:
        plan("auto", flash.floor - 1)
    assert caught.value.smallest == flash.floor


def test_an_embedding_that_every_token_needs_stays_in_memory(tmp_path: Path) -> None:
    """A tied one, and one so small that rows in use would take as much."""
    files: list[Any] = [SimpleNamespace(sector=512, direct=True)]
    for name, changes in (("tied", {"tie_word_embeddings": True, "vocab_size": 20_000}), ("small", {})):
        pack = write_pack(tmp_path / name, **changes)
        plan, _ = Sizes(pack, files, "exact", 1, 1).plan(0, 1 << 24, 64, 1)
        assert plan.on_flash == 0


def test_prompts_run_in_smaller_passes_where_memory_is_scarce(tmp_path: Path) -> None:
    pack = replace(write_pack(tmp_path, hidden_size=4096, intermediate_size=4096), prefill_chunk=256)
    sizes = Sizes(pack, [SimpleNamespace(sector=512, direct=False)], "exact", 1, 1, native=True)  # type: ignore[list-item]
    floor = sizes.plan(0, None, 64, 64)[0].floor
    found = [sizes.plan(0, floor + spare, 64, None) for spare in (0, 64 << 20, 256 << 20, 1 << 30)]
    assert [passes.chunk for _, passes in found] == [64, 64, 128, 256]
    assert [passes.tile_bytes for _, passes in found[1:]] == [4 << 20] * 3
    for (plan, passes), spare in zip(found, (0, 64 << 20, 256 << 20, 1 << 30), strict=True):
        assert plan.scratch == sizes.scratch_bytes(passes) and plan.unused >= 0 and plan.chunk == passes.chunk
        least = sizes.scratch_bytes(Passes(64, passes.tile_bytes))
        assert plan.scratch - least <= spare // 16
        assert f"passes of {passes.chunk} tokens" in plan.describe()


def test_a_tier_without_slots_takes_large_passes_where_no_budget_is_given(tmp_path: Path) -> None:
    """It needs no more than its floor, which says nothing about what passes may take."""
    pack = replace(write_pack(tmp_path, hidden_size=4096, intermediate_size=4096), prefill_chunk=256)
    sizes = Sizes(pack, [SimpleNamespace(sector=512, direct=False)], "dense", 1, 1, native=True)  # type: ignore[list-item]
    plan, passes = sizes.plan(0, None, 64, None)
    assert passes == Passes(256, 4 << 20) == sizes.plan(0, 1 << 32, 64, None)[1]
    assert plan.scratch == sizes.scratch_bytes(passes) and plan.unused == 0
    assert sizes.plan(0, plan.floor, 64, None)[1] == sizes.smallest_passes()


def test_the_smallest_budget_is_the_same_whatever_is_given(tmp_path: Path) -> None:
    """That of the smallest passes, and of an embedding on flash where it may be there."""
    pack = replace(write_pack(tmp_path, vocab_size=20_000, intermediate_size=4096), prefill_chunk=256)
    sizes = Sizes(pack, [SimpleNamespace(sector=512, direct=True)], "exact", 1, 1, native=True)  # type: ignore[list-item]
    for embeddings in ("auto", "memory", "flash"):
        kind = replace(sizes, embeddings=embeddings)
        with pytest.raises(BudgetError) as caught:
            kind.plan(0, 1, 64, None)
        smallest = caught.value.smallest
        for dram in (smallest, smallest + (1 << 22), 1 << 40):
            assert kind.plan(0, dram, 64, None)[0].floor == smallest


def test_plan_describes_itself() -> None:
    plan = memory.make_plan(budget=9 * GB, **SHAPE)
    lines = plan.describe().splitlines()
    assert lines[0].split()[:3] == ["budget", "9.00", "GB"]
    assert len({line.index(" ", 10) for line in lines if line.startswith(("budget", "resident"))}) == 1
    assert plan.to_dict()["slots"] == list(plan.slots) and plan.to_dict()["unused"] == plan.unused


def test_imports_neither_mlx_nor_numpy() -> None:
    code = "import sys, flashsparse.memory; sys.exit(any(m in sys.modules for m in ('mlx', 'numpy')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_slots_follow_the_densities() -> None:
    shape = SHAPE | {"layers": 4, "records": 1000, "max_kv_size": 4096}
    densities = (0.02, 0.04, 0.3, 0.5)
    floor = memory.make_plan(budget=1 << 62, densities=densities, **shape).floor
    plan = memory.make_plan(budget=floor + (860 - 4 * 64) * 17_408 + 5, densities=densities, **shape)
    assert plan.slots == (64, 64, 274, 458)  # (860 - 128) in proportion 3 : 5, the first two at the floor
    assert plan.unused == 5
    assert memory.make_plan(budget=floor, densities=densities, **shape).slots == (64,) * 4
    most = memory.make_plan(budget=plan.needs_all, densities=densities, **shape)
    assert most.slots == (1000,) * 4 and most.unused == 0
    assert "64 to 458 of 1000 records in each of 4 layers (22 %)" in plan.describe()


def test_a_layer_that_needs_every_record_has_all_slots_or_none() -> None:
    shape = SHAPE | {"layers": 3, "records": 1000, "max_kv_size": 4096, "whole": (0,)}
    for densities in (None, (1.0, 0.1, 0.3)):
        floor = memory.make_plan(budget=1 << 62, densities=densities, **shape).floor
        plan = memory.make_plan(budget=floor + 999 * 17_408, densities=densities, **shape)
        assert plan.slots[0] == 0 and sum(plan.slots[1:]) >= 2 * 64 + 998
        plan = memory.make_plan(budget=floor + 1000 * 17_408, densities=densities, **shape)
        assert plan.slots == (1000, 64, 64)
        assert memory.make_plan(budget=plan.needs_all, densities=densities, **shape).slots == (1000,) * 3
    assert memory.make_plan(budget=plan.needs_all, **(shape | {"layers": 1})).slots == (1000,)


def test_the_context_leaves_room_for_the_densities() -> None:
    thin = memory.make_plan(budget=9 * GB, densities=(0.02,) * 32, **SHAPE)
    wide = memory.make_plan(budget=9 * GB, densities=(0.2,) * 32, **SHAPE)
    assert thin.max_kv_size > wide.max_kv_size
    assert min(thin.slots) >= 0.02 * 11008 and min(wide.slots) >= 0.2 * 11008


@given(
    st.lists(st.tuples(st.floats(1e-3, 1), st.integers(0, 64)), min_size=1, max_size=40),
    st.integers(64, 3000),
    st.integers(0, 100_000),
)
def test_divided_slots_are_all_given_out_in_order_of_weight(
    layers: list[tuple[float, int]], most: int, extra: int
) -> None:
    weights, least = [weight for weight, _ in layers], [low for _, low in layers]
    total = sum(least) + extra
    given = memory.divide_slots(total, least, most, weights)
    assert sum(given) == min(total, most * len(layers))
    assert all(low <= count <= most for low, count in zip(least, given, strict=True))
    free = [(w, c) for w, c, low in zip(weights, given, least, strict=True) if low < c < most]
    for weight, count in free:  # in proportion, within the one slot that rounding gives or takes
        assert all(abs(count * other / weight - theirs) <= 1 + other / weight for other, theirs in free)
    assert given == memory.divide_slots(total, least, most, weights)


def test_plan_shows_the_predictor_by_itself() -> None:
    plan = memory.make_plan(budget=9 * GB, predictor=500_000_000, **SHAPE)
    assert "resident   6.50 GB" in plan.describe()
    assert "predictor   500 MB  names the active neurons" in plan.describe()
    assert "predictor" not in memory.make_plan(budget=9 * GB, **SHAPE).describe()
