"""What the order of records and merged reads are worth on this drive: real reads of what a recorded run misses.

    python -m bench.order TRAIN.npz TEST.npz --file SCRATCH --record 6912 [--slots 20%,50%] [--share 0.3]

Orders are found on the sets of one trace, as `convert --order` finds them, and judged on the misses of another (both by
`python -m bench.traces record` from one model): what so many slots miss, in steady state, and unions of
consecutive tokens that need at least `--share` of a layer. Each layer's reads are submitted together, direct where the
filesystem allows it. SCRATCH is made with many copies of the model's layers, and every token reads another copy, so
that no cache below sees a byte twice soon. Every repetition times all variants, in turn; plain reads in source order
are 1. Bytes are what the requests move, rounding to sectors and gaps included, over those of the records: they and the
requests do not depend on the hour.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from bench.traces.__main__ import share_of
from bench.traces.policies import Product
from bench.traces.trace import Ids, Trace
from converter.ordering import coactivation_order, frequency_order, random_order
from flashsparse.flash import FlashFile, ReadPool, slot_stride
from flashsparse.flash.plan import SEPARATE, Merging, reads

SECTOR = 4096
BLOCK = 64 << 20
Ranks = list[npt.NDArray[np.int64]]  # of each layer: neuron -> its record's place


@dataclass(frozen=True)
class Scratch:
    """A file of `copies` of `layers` layers of `records` records, `stride` bytes apart."""

    file: FlashFile
    layers: int
    records: int
    record: int
    stride: int
    copies: int

    @cached_property
    def memory(self) -> npt.NDArray[np.uint8]:
        """Room for a whole layer's records in slots."""
        room = slot_stride(self.stride, 0, self.file.sector, self.file.direct)
        return np.zeros(self.records * room + 2 * SECTOR, np.uint8)

    def base(self, copy: int, layer: int) -> int:
        return (copy % self.copies * self.layers + layer) * self.records * self.stride


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("train", type=Path)
    parser.add_argument("test", type=Path)
    parser.add_argument("--file", type=Path, required=True, help="is made, and removed at the end")
    parser.add_argument("--bytes", type=int, default=2_000_000_000, help="its size at most")
    parser.add_argument("--record", type=int, default=None, help="bytes of a record instead of the pack's")
    parser.add_argument("--slots", default="20%,50%")
    parser.add_argument("--share", type=float, default=0.3)
    parser.add_argument("--gap", type=int, default=Merging().gap, help="bytes read in vain, at most, to join two reads")
    parser.add_argument("--tokens", type=int, default=48, help="that are read, after the slots have filled")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--io-threads", type=int, default=16)
    args = parser.parse_args()
    train, test = Trace.load(args.train), Trace.load(args.test)
    cases = {f"misses of {text} slots": _misses(test, share_of(text, test.records)) for text in args.slots.split(",")}
    cases[f"at least {args.share:.0%} of a layer"] = _unions(test, args.share)
    ranks = orders(train)
    try:
        scratch = _scratch(args, test)
        rows = [row for name, sets in cases.items() for row in _measure(args, scratch, ranks, name, sets)]
    finally:
        args.file.unlink(missing_ok=True)
    report = {"gap": args.gap, "record": scratch.record, "direct": scratch.file.direct, "rows": rows}
    _show(report)
    print(json.dumps(report))


def orders(train: Trace) -> dict[str, Ranks]:
    """Each order's places, found on the sets of a trace."""
    active = []
    for sets in train.sets:
        matrix = np.zeros((len(sets), train.records), bool)
        for token, ids in enumerate(sets):
            matrix[token, ids] = True
        active.append(matrix)
    found: dict[str, list[npt.NDArray[Any]]] = {
        "source": [np.arange(train.records)] * len(active),
        "random": [random_order(train.records, 0, layer) for layer in range(len(active))],
        "frequency": [frequency_order(matrix) for matrix in active],
        "coactivation": [coactivation_order(matrix) for matrix in active],
    }
    return {name: [np.argsort(order) for order in each] for name, each in found.items()}


def _misses(trace: Trace, slots: int) -> list[list[Ids]]:
    """[layer][token]: what the runtime misses, after the first quarter of the trace."""
    found = []
    for sets in trace.sets:
        table = Product(trace.records, slots).table
        each: list[Ids] = []
        for ids in sets:
            missed: list[Ids] = [np.empty(0, np.int32)]
            for part in table.rounds(ids):
                missed.append(part.ids[part.missing])
                part.commit()
            table.end_token()
            each.append(np.concatenate(missed))
        found.append(each[len(each) // 4 :])
    return found


def _unions(trace: Trace, share: float) -> list[list[Ids]]:
    """[layer][group]: the union of as many consecutive tokens as need `share` of the layer's records."""
    found = []
    for sets in trace.sets:
        groups: list[Ids] = []
        seen = np.zeros(trace.records, bool)
        for ids in sets:
            seen[ids] = True
            if seen.sum() >= share * trace.records:
                groups.append(np.flatnonzero(seen))
                seen[:] = False
        found.append(groups)
    return found


def _scratch(args: argparse.Namespace, trace: Trace) -> Scratch:
    record = args.record or trace.record_bytes
    stride = -(-record // 64) * 64
    layer_bytes = trace.records * stride
    copies = max(1, args.bytes // (layer_bytes * len(trace.sets)))
    block = np.random.default_rng(0).integers(0, 256, BLOCK, np.uint8)
    with open(args.file, "wb", buffering=0) as out:
        left = copies * len(trace.sets) * layer_bytes + 2 * SECTOR
        while left > 0:
            left -= out.write(block[: min(left, BLOCK)].data)
    return Scratch(FlashFile(args.file), len(trace.sets), trace.records, record, stride, copies)


def _measure(
    args: argparse.Namespace, scratch: Scratch, ranks: dict[str, Ranks], name: str, sets: list[list[Ids]]
) -> list[dict[str, Any]]:
    """Variants take turns token by token, so that what else the machine does meets all of them."""
    variants = [(order, merge) for order in ranks for merge in (False, True)]
    seconds = np.zeros((len(variants), args.repetitions))
    requests, nbytes = np.zeros(len(variants), np.int64), np.zeros(len(variants), np.int64)
    tokens, copy = min(args.tokens, *map(len, sets)), 0
    with ReadPool(args.io_threads) as pool:
        for repetition in range(args.repetitions):
            for token in range(tokens):
                for turn in range(len(variants)):
                    which = (turn + token + repetition) % len(variants)
                    order, merge = variants[which]
                    now = [layer[token] for layer in sets]
                    took, asked, moved = _read(
                        scratch, pool, ranks[order], now, copy, Merging(args.gap) if merge else SEPARATE
                    )
                    seconds[which, repetition] += took
                    requests[which] += asked
                    nbytes[which] += moved
                    copy += 1
    needed = sum(len(ids) for layer in sets for ids in layer[:tokens])
    gains = seconds[0] / seconds
    return [
        {
            "case": name, "order": order, "merged": merge, "records": needed / tokens / scratch.layers,
            "requests_per_record": float(requests[which]) / needed / args.repetitions,
            "bytes_moved": float(nbytes[which]) / (needed * scratch.record) / args.repetitions,
            "ms_per_token": 1000 * float(seconds[which].mean()) / tokens,
            "gain": float(gains[which].mean()), "deviation": float(gains[which].std()),
        }
        for which, (order, merge) in enumerate(variants)
    ]  # fmt: skip


def _read(
    scratch: Scratch, pool: ReadPool, ranks: Ranks, sets: list[Ids], copy: int, merging: Merging
) -> tuple[float, int, int]:
    """Seconds in reading one token's sets, layer by layer, from a copy of the layers; requests and their bytes."""
    room = slot_stride(scratch.stride, 0, scratch.file.sector, scratch.file.direct)
    memory = scratch.memory
    address = -(-memory.ctypes.data // SECTOR) * SECTOR
    slots = address + np.arange(scratch.records, dtype=np.int64) * room
    took, requests, nbytes = 0.0, 0, 0
    for layer, (rank, ids) in enumerate(zip(ranks, sets, strict=True)):
        places = np.sort(rank[ids])
        positions = scratch.base(copy, layer) + places.astype(np.int64) * scratch.stride
        began = time.perf_counter()
        plan = reads(scratch.file, positions, scratch.record, slots[: len(places)], merging)
        with plan.submit(pool) as batch:
            batch.wait()
        took += time.perf_counter() - began
        requests += plan.requests
        nbytes += plan.nbytes
    return took, requests, nbytes


def _show(report: dict[str, Any]) -> None:
    print(f"records of {report['record']} bytes, gaps up to {report['gap']}, direct reads: {report['direct']}")
    print(f"{'':<26}{'order':<14}{'reads':<10}{'per record':>10}{'bytes':>8}{'ms/token':>10}{'gain':>14}")
    for row in report["rows"]:
        reading = "merged" if row["merged"] else "plain"
        print(
            f"{row['case']:<26}{row['order']:<14}{reading:<10}{row['requests_per_record']:>10.3f}{row['bytes_moved']:>8.3f}"
            f"{row['ms_per_token']:>10.2f}{row['gain']:>7.3f} ± {row['deviation']:.3f}"
        )


if __name__ == "__main__":
    main()
