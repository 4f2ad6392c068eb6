"""How near the native CPU kernels come to what this machine's memory allows.

    python -m bench.kernels [--threads 2] [--only linear,ffn] [--repeats 5]

The ceiling comes first: a native read of a buffer far beyond the caches, on one thread and on all. Every kernel is
then timed in turns with that read, so that a disturbed moment disturbs both; `share` is the ratio of the two means.
Products with many tokens are arithmetic, not reading: their rate stands alone. Operands never fit the last-level
cache. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from functools import partial

import numpy as np

from flashsparse import native
from flashsparse.weights import Buffer

HIDDEN, INTERMEDIATE = 4096, 11008  # Llama-2-7B
DENSITY = 0.1
BUFFER_BYTES = 288 << 20  # several times any last-level cache of the machines this is for
MINIMUM_S = 0.03  # what one repetition lasts at least
TYPES = ("F32", "F16", "BF16", "Q8", "Q4")
KINDS = ("linear", "score", "ffn", "attention", "prefill")
GROUP = 64


@dataclass
class Case:
    """One thing to time. `work`: bytes or operations of one call, in `unit` (GB/s or GFLOP/s)."""

    kernel: str
    threads: int
    work: float
    unit: str
    call: Callable[[], None]


@dataclass
class Row:
    """mean and deviation over the repetitions; share: of the ceiling timed in the same repetitions."""

    kernel: str
    threads: int
    unit: str
    mean: float
    deviation: float
    best: float
    share: float | None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--only", default=",".join(KINDS), help="comma-separated: " + ", ".join(KINDS))
    args = parser.parse_args()
    chosen = args.only.split(",")
    if unknown := set(chosen) - set(KINDS):
        parser.error(f"unknown kernels {', '.join(sorted(unknown))}; there are {', '.join(KINDS)}")
    rows = run(chosen, args.threads, args.repeats)
    print(json.dumps({"isa": native.isa(), "rows": [asdict(row) for row in rows]}))
    return 0


def run(chosen: list[str], threads: int, repeats: int) -> list[Row]:
    """Time the ceiling, then every case of the chosen kinds; prints each row as it is known."""
    memory = Memory()
    rows: list[Row] = []
    print(f"kernels: {native.isa()}; share: of the memory read rate on as many threads, timed in turns")
    print(f"{'kernel':<26}{'threads':>8}{'mean':>10}{'dev':>8}{'best':>9}  {'unit':<9}{'share':>6}")
    for count in sorted({1, threads}):
        with native.Workers(count) as workers:
            ceiling = Case("memory read", count, BUFFER_BYTES, "GB/s", partial(memory.read, workers))
            rows.append(measure(ceiling, None, repeats))
            show(rows[-1])
    for count in sorted({1, threads}):
        with native.Workers(count) as workers:
            ceiling = Case("memory read", count, BUFFER_BYTES, "GB/s", partial(memory.read, workers))
            for kind in chosen:
                for case in CASES[kind](memory, workers):
                    rows.append(measure(case, ceiling, repeats))
                    show(rows[-1])
    return rows


def show(row: Row) -> None:
    share = "" if row.share is None else f"{row.share:6.0%}"
    print(
        f"{row.kernel:<26}{row.threads:>8}{row.mean:>10.1f}{row.deviation:>8.1f}{row.best:>9.1f}  {row.unit:<9}{share}",
        flush=True,
    )


def measure(case: Case, ceiling: Case | None, repeats: int) -> Row:
    """Rates of `repeats` timings, each beside one of the ceiling; what is counted in operations has no share."""
    case.call()
    rates, limits = [], []
    for _ in range(repeats):
        if ceiling is not None and case.unit == ceiling.unit:
            limits.append(rate(ceiling))
        rates.append(rate(case))
    mean = statistics.mean(rates)
    share = mean / statistics.mean(limits) if limits else None
    return Row(case.kernel, case.threads, case.unit, mean, statistics.pstdev(rates), max(rates), share)


def rate(case: Case) -> float:
    """Work per second, in 10^9, of as many calls as fill MINIMUM_S."""
    calls, began = 0, time.perf_counter()
    while (passed := time.perf_counter() - began) < MINIMUM_S:
        case.call()
        calls += 1
    return calls * case.work / passed / 1e9


class Memory:
    """The engine's own kind of memory, full of numbers; cases take their operands from it."""

    def __init__(self) -> None:
        self.buffer = Buffer(BUFFER_BYTES)
        self.random = np.random.default_rng(0)
        self._held = ""
        self.fill("F16")

    def fill(self, dtype: str) -> None:
        """Make every stretch of the buffer hold finite numbers of the type."""
        if dtype == self._held:
            return
        pattern = self._pattern(dtype).view(np.uint8)
        self.buffer.bytes.reshape(-1, len(pattern))[:] = pattern
        self._held = dtype

    def _pattern(self, dtype: str) -> np.ndarray:
        values = self.random.standard_normal(1 << 18).astype(np.float32) * 0.02
        if dtype == "F16":
            return values.astype(np.float16)
        if dtype == "F32":
            return values
        if dtype == "BF16":
            return (values.view(np.uint32) >> 16).astype(np.uint16)
        return self.random.integers(0, 256, 1 << 19, np.uint8)

    def normal(self, *shape: int) -> np.ndarray:
        return self.random.standard_normal(shape).astype(np.float32)

    def read(self, workers: native.Workers) -> None:
        native.memory_read(workers, self.buffer.bytes)

    def matrices(self, dtype: str, rows: int, columns: int) -> tuple[list[native.Matrix], int]:
        """As many matrices as fit, and the bytes of one: words, scales and biases of all are apart, as in a pack."""
        bits = native.bits(dtype)
        words, parts = rows * columns * bits // 8, rows * columns // GROUP * 2 if dtype[0] == "Q" else 0
        count = min(self.buffer.nbytes // words, 16)
        self.fill(dtype)
        small = np.full(2 * parts * count // 2, 0x2000, np.uint16)  # 2^-7 as float16
        found = []
        for i in range(count):
            scales, biases = (small.ctypes.data + (2 * i + k) * parts if parts else 0 for k in range(2))
            at, kind = self.buffer.address + i * words, native.DTYPES[dtype]
            stored, group = (native.DTYPES["F16"], GROUP) if parts else (0, 0)
            keep = (self, small)
            found.append(native.Matrix(at, rows, columns, kind, scales, biases, stored, group, keep))
        return found, words + 2 * parts


def products(memory: Memory, workers: native.Workers, dtype: str, tokens: int) -> Callable[[], None]:
    """Products with one matrix after the other, so that each comes from memory."""
    matrices, _ = memory.matrices(dtype, HIDDEN, HIDDEN)
    x, y = memory.normal(tokens, HIDDEN), np.empty((tokens, HIDDEN), np.float32)
    return in_turn([partial(native.linear, workers, matrix, None, x, y) for matrix in matrices])


def in_turn(calls: Iterable[Callable[[], None]]) -> Callable[[], None]:
    turn = itertools.cycle(calls)
    return lambda: next(turn)()


def linear(memory: Memory, workers: native.Workers) -> Iterator[Case]:
    for dtype in TYPES:
        work = HIDDEN * HIDDEN * native.bits(dtype) / 8
        work += HIDDEN * HIDDEN // GROUP * 4 if dtype[0] == "Q" else 0
        yield Case(f"linear {dtype}", workers.threads, work, "GB/s", products(memory, workers, dtype, 1))


def score(memory: Memory, workers: native.Workers) -> Iterator[Case]:
    for bits in (1, 2, 3, 4):
        matrices, size = memory.matrices(f"Q{bits}", INTERMEDIATE, HIDDEN)
        x, y = memory.normal(1, HIDDEN), np.empty((1, INTERMEDIATE), np.float32)
        calls = [partial(native.score, workers, matrix, None, x, y) for matrix in matrices]
        yield Case(f"score Q{bits}", workers.threads, size, "GB/s", in_turn(calls))


def ffn(memory: Memory, workers: native.Workers) -> Iterator[Case]:
    """Gates known (tier exact: up and down are read) and not (tier predict: all three vectors are)."""
    for dtype in TYPES[1:]:
        for vectors in (2, 3):
            yield ffn_case(memory, workers, dtype, vectors)


def ffn_case(memory: Memory, workers: native.Workers, dtype: str, vectors: int) -> Case:
    quantized = dtype[0] == "Q"
    vector = HIDDEN * native.bits(dtype) // 8 + (HIDDEN // GROUP * 4 if quantized else 0)
    gate = 0 if vectors == 3 else -1
    record = native.Record(
        gate=gate,
        up=(vectors - 2) * vector,
        down=(vectors - 1) * vector,
        d=HIDDEN,
        dtype=native.DTYPES[dtype],
        scale_dtype=native.DTYPES["F16"],
        group_size=GROUP if quantized else 0,
        activation=native.ACTIVATIONS["fatrelu"],
        param=-1e30,  # every gate is active: all vectors of all records are read
        gated=True,
    )
    memory.fill("F16")  # words may be anything; scales and biases must be finite
    slots = memory.buffer.nbytes // record.bytes
    count = round(INTERMEDIATE * DENSITY)
    places = memory.random.permutation(slots)[: slots // count * count].reshape(-1, count).astype(np.int64)
    x, y = memory.normal(1, HIDDEN), np.zeros((1, HIDDEN), np.float32)
    activated = None if vectors == 3 else np.ones((1, INTERMEDIATE), np.float32)
    ids, hidden = np.arange(count, dtype=np.int32), np.empty((1, count), np.float32)

    def call(offsets: np.ndarray) -> None:
        native.ffn_hidden(workers, record, memory.buffer.bytes, offsets, ids, ids, x, activated, None, hidden)
        native.ffn_down(workers, record, memory.buffer.bytes, offsets, ids, hidden, y)

    calls = [partial(call, row * record.bytes) for row in places]
    name = f"ffn {dtype} {'gates known' if vectors == 2 else 'whole bundles'}"
    return Case(name, workers.threads, count * record.bytes, "GB/s", in_turn(calls))


def attention(memory: Memory, workers: native.Workers) -> Iterator[Case]:
    """One token at position 4095: 32 heads of 128 values, 32 and 8 key heads."""
    for dtype in ("F16", "BF16"):
        memory.fill(dtype)
        for kv_heads in (32, 8):
            yield attention_case(memory, workers, dtype, kv_heads)


def attention_case(memory: Memory, workers: native.Workers, dtype: str, kv_heads: int) -> Case:
    size = kv_heads * 4096 * 128
    values = memory.buffer.bytes.view(np.uint16 if dtype == "BF16" else np.float16)
    caches = values[: len(values) // size * size].reshape(-1, kv_heads, 4096, 128)
    q, out = memory.normal(1, 32, 128), np.empty((1, 32, 128), np.float32)

    def call(k: np.ndarray, v: np.ndarray) -> None:
        native.attention(workers, q, k, v, dtype, 4095, 0, 128**-0.5, out)

    pairs = zip(caches[::2], caches[1::2], strict=False)
    calls = [partial(call, *pair) for pair in pairs]
    return Case(f"attention {dtype} {kv_heads} kv", workers.threads, 2 * size * 2, "GB/s", in_turn(calls))


def prefill(memory: Memory, workers: native.Workers) -> Iterator[Case]:
    for dtype in ("F16", "BF16", "Q4"):
        for tokens in (8, 64, 512):
            work = 2 * HIDDEN * HIDDEN * tokens
            call = products(memory, workers, dtype, tokens)
            yield Case(f"linear {dtype} {tokens} tokens", workers.threads, work, "GFLOP/s", call)


CASES: dict[str, Callable[[Memory, native.Workers], Iterator[Case]]] = {
    "linear": linear,
    "score": score,
    "ffn": ffn,
    "attention": attention,
    "prefill": prefill,
}

if __name__ == "__main__":
    raise SystemExit(main())
