"""The memory plan: what a budget buys, decided before anything is loaded, and what the process really uses.

Sizes are bytes. Knows the operating system's figures (footprint, peak, control groups) and arithmetic on sizes; it
allocates nothing and knows no model. No MLX, no numpy.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from flashsparse import macos
from flashsparse.errors import BudgetError, FlashSparseError, UsageError, format_bytes

# Free under a control group's limit, for page tables and what else is charged to it.
GROUP_RESERVE, GROUP_SHARE = 16_000_000, 256
MIN_CONTEXT = 256
CONTEXT_STEP = 64
MIN_DENSITY = 1e-3  # a layer that calibration found silent still gets slots beyond the floor
_UNLIMITED = 1 << 60  # cgroup v1 writes a number near 2**63 for "no limit"
_UNITS = {"": 1, "b": 1} | {
    name: base**power
    for power, letter in enumerate("kmgt", 1)
    for name, base in ((letter, 1000), (letter + "b", 1000), (letter + "ib", 1024))
}


def parse_size(text: str, machine_bytes: int) -> int:
    """Bytes in `7GB` (decimal), `4GiB` (binary), `50%` (of `machine_bytes`) or `123456`. Raises UsageError."""
    found = re.fullmatch(r"\s*([0-9]{1,20}(?:\.[0-9]{1,20})?)\s*(%|[a-zA-Z]*)\s*", text)
    unit = found[2].lower() if found else ""
    if found is None or (unit != "%" and unit not in _UNITS):
        shown = text if len(text) <= 60 else text[:57] + "..."
        raise UsageError(f"size {shown!r} is not understood: write 7GB, 4GiB, 50% or a number of bytes")
    number = float(found[1])
    if unit == "%" and number > 100:
        raise UsageError(f"size {text!r} is more than the machine's memory ({format_bytes(machine_bytes)})")
    size = machine_bytes * number / 100 if unit == "%" else number * _UNITS[unit]
    if size < 1:
        raise UsageError(f"size {text!r} is less than one byte")
    return int(found[1]) * _UNITS[unit] if unit != "%" and "." not in found[1] else int(size)


def budget_bytes(dram: str | int, machine: int | None = None) -> int:
    """The bytes of the budget `dram`, of this machine's memory unless `machine` bytes are given.

    Raises UsageError for what is no size, and for more than there is: a promise that nothing could keep.
    """
    machine = machine_memory() if machine is None else machine
    size = dram if isinstance(dram, int) else parse_size(dram, machine)
    if size > machine:
        raise UsageError(
            f"a budget of {format_bytes(size)} is more than the machine's memory ({format_bytes(machine)}): leave "
            "--dram out for half of it or what the model needs, or give less"
        )
    return size


def machine_memory() -> int:
    """The machine's physical memory."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def footprint() -> int:
    """The process's memory now: VmRSS on Linux, the physical footprint on macOS."""
    return macos.footprint() if macos.here() else _status("VmRSS")


def peak_footprint() -> int:
    """The highest footprint since the process began, or since `reset_peak`: VmHWM, or macOS's lifetime maximum."""
    return macos.peak_footprint() if macos.here() else _status("VmHWM")


def reset_peak(clear_refs: str = "/proc/self/clear_refs") -> bool:
    """Let the peak start again from the present footprint. False where the system refuses (macOS always does)."""
    try:
        with open(clear_refs, "w") as file:
            file.write("5")
    except OSError:
        return False
    return True


def _status(field: str, path: str = "/proc/self/status") -> int:
    with open(path) as file:
        for line in file:
            if line.startswith(field + ":"):
                return int(line.split()[1]) * 1024
    raise FlashSparseError(f"{path} has no {field}: this system does not report the process's memory")


def cgroup_limit(root: str = "/") -> int | None:
    """The tightest memory limit of this process's control group and its parents (v1 and v2); None when unlimited.

    root: where /proc and /sys are looked for.
    """
    try:
        lines = Path(root, "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return None
    found: list[int] = []
    for line in lines:
        _, controllers, path = (*line.split(":", 2), "", "")[:3]
        if controllers == "":
            found += _limits(Path(root, "sys/fs/cgroup"), path, "memory.max")
            found += _limits(Path(root, "sys/fs/cgroup/unified"), path, "memory.max")
        elif "memory" in controllers.split(","):
            found += _limits(Path(root, "sys/fs/cgroup/memory"), path, "memory.limit_in_bytes")
    return min(found, default=None)


def _limits(mount: Path, group: str, name: str) -> list[int]:
    """Limits of `group` and its parents; in a container the group's own path may be missing below the mount."""
    parts = [part for part in group.split("/") if part not in ("", ".", "..")]
    limits = []
    for depth in range(len(parts), -1, -1):
        try:
            text = mount.joinpath(*parts[:depth], name).read_text().strip()
        except OSError:
            continue
        if text.isdigit() and int(text) < _UNLIMITED:  # v2 writes "max"
            limits.append(int(text))
    return limits


def default_budget(needs: int, runtime: int, machine: int | None = None, limit: int | None = None) -> int:
    """Half of the machine or what the model needs, whichever is smaller, and no more than a control group allows.

    needs: bytes with every record in a slot; runtime: footprint before loading; machine, limit: the machine's memory
    and the control group's limit when given, else this machine's.
    """
    budget = min((machine or machine_memory()) // 2, needs)
    limit = cgroup_limit() if limit is None else limit
    return budget if limit is None else max(0, min(budget, limit - runtime - GROUP_RESERVE - limit // GROUP_SHARE))


@dataclass(frozen=True)
class MemoryPlan:
    """What a budget buys. Bytes, except `max_kv_size` (tokens), `records` (per layer) and `slots` (per layer)."""

    budget: int
    runtime: int  # footprint before loading, not part of the budget
    resident: int
    kv: int
    max_kv_size: int
    scratch: int
    overhead: int
    slots: tuple[int, ...]
    slot_bytes: int  # from one slot to the next
    slots_bytes: int
    needs_all: int  # the budget with which every record has a slot
    floor: int  # the smallest budget that works
    records: int
    predictor: int = 0  # the part of `resident` that names neurons
    chunk: int = 0  # tokens of a prompt that are computed at once; 0: not stated
    on_flash: int = 0  # bytes of the embedding, of which memory holds only rows in use

    @property
    def holds_everything(self) -> bool:
        """Whether every record has a slot; where layers are streamed, whether there is nothing left to give them."""
        return self.budget >= self.needs_all or all(count == self.records for count in self.slots)

    @property
    def unused(self) -> int:
        return self.budget - self.resident - self.kv - self.scratch - self.overhead - self.slots_bytes

    def describe(self) -> str:
        """A few aligned lines for the terminal."""
        rows = [
            ("budget", self.budget, f"smallest {format_bytes(self.floor)}, everything {format_bytes(self.needs_all)}"),
            ("resident", self.resident - self.predictor, self._resident_note()),
            *([("predictor", self.predictor, "names the active neurons")] if self.predictor else []),
            ("kv cache", self.kv, f"{self.max_kv_size} tokens (--max-kv-size)"),
            ("slots", self.slots_bytes, self._slots_note()),
            ("scratch", self.scratch, f"prompts in passes of {self.chunk} tokens" if self.chunk else ""),
            ("overhead", self.overhead, ""),
            ("unused", self.unused, ""),
            ("runtime", self.runtime, "before loading, beside the budget"),
        ]
        return "\n".join(f"{name:<9}{format_bytes(size):>9}  {note}".rstrip() for name, size, note in rows)

    def _resident_note(self) -> str:
        note = "weights that are always in memory"
        return f"{note}; {format_bytes(self.on_flash)} of embedding stay on flash" if self.on_flash else note

    def _slots_note(self) -> str:
        if not any(self.slots):
            return "none: layers are streamed"
        least, most = min(self.slots), max(self.slots)
        share = f"{100 * sum(self.slots) / len(self.slots) / self.records:.0f} %"
        each = f"{least}" if least == most else f"{least} to {most}"
        return f"{each} of {self.records} records in each of {len(self.slots)} layers ({share})"

    def to_dict(self) -> dict[str, int | list[int]]:
        """The plan as plain values, with `unused`."""
        return {**asdict(self), "slots": list(self.slots), "unused": self.unused}


def make_plan(
    *,
    budget: int,
    runtime: int,
    resident: int,
    kv_bytes_per_token: int,
    max_kv_size: int | None,
    context_limit: int,
    scratch: int,
    overhead: int,
    records: int,
    layers: int,
    slot_bytes: int,
    table_bytes: int = 0,
    floor_slots: int = 64,
    expected_density: float = 0.12,
    predictor: int = 0,
    chunk: int = 0,
    densities: Sequence[float] | None = None,
    whole: Sequence[int] = (),
    on_flash: int = 0,
) -> MemoryPlan:
    """Divide `budget` among resident weights, KV cache and slots.

    Bytes; `context_limit` and `max_kv_size` in tokens; `records` per layer. Without `max_kv_size` the KV cache takes
    what leaves room for one token's set (`expected_density`) in every layer. `floor_slots=0`: the layers are streamed,
    without slots. `predictor`: the part of `resident` that the predictor is. `table_bytes`: what a slot costs beside
    its `slot_bytes`, counted into the plan's overhead. `on_flash`: bytes of the embedding that none of these count.
    `chunk` is kept in the plan as it is.

    With `densities` (the share of each layer's records that a token needs) slots are divided in proportion to them,
    else equally. The layers `whole` need all of their records for each token: they get all slots, before the others get
    more than the floor, or none when that does not fit, and are streamed then.
    Raises BudgetError below the floor, UsageError for a `max_kv_size` that the model cannot use.
    """
    if max_kv_size is not None and not 1 <= max_kv_size <= context_limit:
        raise UsageError(f"--max-kv-size {max_kv_size} is not between 1 and {context_limit}, the model's context")
    fixed, each = resident + scratch + overhead, slot_bytes + table_bytes
    sizes = _SlotSizes.of(records, layers, floor_slots, densities, expected_density, whole)
    context = max_kv_size or min(MIN_CONTEXT, context_limit)
    floor = fixed + context * kv_bytes_per_token + sum(sizes.least) * each
    if budget < floor:
        least_bytes = sum(sizes.least) * slot_bytes
        raise _below_floor(budget, floor, resident, context * kv_bytes_per_token, context, least_bytes)
    sizes.keep_whole((budget - floor) // each)
    if max_kv_size is None:
        room = budget - fixed - sum(sizes.wanted) * each
        context = max(context, _context_for(room, kv_bytes_per_token, context_limit))
    kv = context * kv_bytes_per_token
    slots = sizes.divide((budget - fixed - kv) // each)
    return MemoryPlan(
        budget=budget,
        runtime=runtime,
        resident=resident,
        kv=kv,
        max_kv_size=context,
        scratch=scratch,
        overhead=overhead + sum(slots) * table_bytes,
        slots=slots,
        slot_bytes=slot_bytes,
        slots_bytes=sum(slots) * slot_bytes,
        needs_all=fixed + (max_kv_size or context_limit) * kv_bytes_per_token + layers * sizes.most * each,
        floor=floor,
        records=records,
        predictor=predictor,
        on_flash=on_flash,
        chunk=chunk,
    )


@dataclass
class _SlotSizes:
    """Slots of each layer: the least, what one token wants, the most that are of use. `weights`: None, all equal."""

    least: list[int]
    wanted: list[int]
    most: int
    weights: list[float] | None
    whole: tuple[int, ...]

    @staticmethod
    def of(
        records: int, layers: int, floor: int, densities: Sequence[float] | None, expected: float, whole: Sequence[int]
    ) -> _SlotSizes:
        most = records if floor else 0
        least = [min(floor, records)] * layers
        for layer in whole:  # some slots are of no use to a layer that needs every record
            least[layer] = most if floor >= records else 0
        each = densities if densities is not None else [expected] * layers
        wanted = [min(most, max(low, math.ceil(records * share))) for low, share in zip(least, each, strict=True)]
        for layer in whole:
            wanted[layer] = least[layer]
        weights = None if densities is None else [max(share, MIN_DENSITY) for share in densities]
        return _SlotSizes(least, wanted, most, weights, tuple(whole))

    def keep_whole(self, spare: int) -> None:
        """Give layers that need every record all of their slots, while `spare` ones beyond the floor last."""
        for layer in self.whole:
            if 0 < self.most - self.least[layer] <= spare:
                spare -= self.most - self.least[layer]
                self.least[layer] = self.wanted[layer] = self.most

    def divide(self, total: int) -> tuple[int, ...]:
        """At most `total` slots in all."""
        slots = list(self.least)
        shared = [layer for layer in range(len(slots)) if layer not in self.whole]
        total -= sum(self.least[layer] for layer in self.whole)
        if shared and self.weights is None:
            share = min(self.most, total // len(shared))
            divided = [share] * len(shared)
        else:
            weights = [(self.weights or [])[layer] for layer in shared]
            divided = divide_slots(total, [self.least[layer] for layer in shared], self.most, weights)
        for layer, count in zip(shared, divided, strict=True):
            slots[layer] = count
        return tuple(slots)


def divide_slots(total: int, least: Sequence[int], most: int, weights: Sequence[float]) -> list[int]:
    """`total` slots in proportion to `weights` (> 0), every layer's within its `least` and `most`.

    All of `total` is given out unless every layer has the most; what rounding leaves goes to the largest fractions, the
    lower layer first. `total` is at least the sum of `least`.
    """

    def slots(scale: float) -> list[int]:
        return [min(most, max(low, int(scale * weight))) for low, weight in zip(least, weights, strict=True)]

    if not weights or total >= most * len(weights):
        return [most] * len(weights)
    low, high = 0.0, (most + 1) / min(weights)
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if sum(slots(middle)) <= total else (low, middle)
    given = slots(low)
    open_layers = [layer for layer in range(len(given)) if given[layer] < most]
    open_layers.sort(key=lambda layer: (-(low * weights[layer] - given[layer]), layer))
    for layer in open_layers[: total - sum(given)]:
        given[layer] += 1
    return given


def _context_for(room: int, bytes_per_token: int, limit: int) -> int:
    tokens = max(0, room) // max(1, bytes_per_token)
    return limit if tokens >= limit else tokens // CONTEXT_STEP * CONTEXT_STEP


def _below_floor(budget: int, floor: int, resident: int, kv: int, context: int, slots: int) -> BudgetError:
    smallest = -(-floor // 1_000_000)
    return BudgetError(
        f"a budget of {format_bytes(budget)} is too small: resident weights {format_bytes(resident)}, KV cache "
        f"{format_bytes(kv)} ({context} tokens), slots {format_bytes(slots)} and buffers need {format_bytes(floor)}; "
        f"the smallest that works is --dram {smallest}MB",
        smallest=floor,
    )
