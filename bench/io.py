"""Reading: the pool against a bare loop of preads, and the read plan against one request for each record.

    python -m bench.io [FOLDER] [--records 6912]

Ceiling first: threads that do nothing but pread, at the same places, size and number in flight. Then the pool, and its
share of the ceiling: the two take turns, and the share is the median over pairs, with quartiles, so that what a drive
or a neighbour does in between cancels. `reached`: whether that is at least 95 %. Cold: direct reads; warm: buffered,
with the file in the page cache. Both states are checked. Then a layer of records read in one batch, at random places,
for growing shares of it. Prints tables and one JSON line. Writes a temporary file of 512 MiB into FOLDER.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np

from flashsparse.flash import FlashFile, Merging, ReadPool, reads, slot_stride
from flashsparse.flash.curve import load_curve
from flashsparse.flash.plan import SEPARATE
from flashsparse.flash.probe import Loop, cached_share, empty_cache, temporary_file
from flashsparse.places import cache_dir
from flashsparse.weights import Buffer

POINTS = ((4096, 16), (8192, 16), (8192, 32), (24576, 16), (24576, 32), (131072, 16))
SHARES = (0.01, 0.03, 0.1, 0.3, 0.5, 0.9)
SECONDS = 0.25
TARGET = 0.95  # of the bare loop
RECORDS = 11008
SLAB = 256 << 20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", default=Path())
    parser.add_argument("--records", type=int, default=6912, help="bytes of a record: 6912 is 4096 wide at 4 bits")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--threads", type=int, default=16, help="of the pool, for the plan")
    args = parser.parse_args()
    with temporary_file(args.folder, 512 << 20) as path:
        pool = pool_table(path, args.repeats)
        plan = plan_table(path, args)
    cold = [row["cold"]["share"] for row in pool]
    reached = f"median of {100 * min(cold):.0f} % or more at every point, cold; at least 95 % is asked"
    print(f"\nreached: {'yes' if min(cold) >= TARGET else 'no'}, {reached}")
    print(json.dumps({"pool": pool, "plan": plan, "record_bytes": args.records}))


def pool_table(path: Path, repeats: int) -> list[dict[str, Any]]:
    print("GB/s of                cold: bare         pool   share                  warm: bare         pool   share")
    rows = []
    with Loop(SLAB) as loop:
        for size, depth in POINTS:
            row: dict[str, Any] = {"size": size, "depth": depth}
            for state, mode in (("cold", "direct"), ("warm", "buffered")):
                with FlashFile(path, mode) as file, ReadPool(depth) as pool:
                    prepare(file, state)
                    pairs = [both(loop, pool, file, size, depth, turn) for turn in range(repeats)]
                    row[state] = summary(np.array(pairs))
            rows.append(row)
            print(
                f"{size:>7} x {depth:<4}" + "".join(f"{cells(row[state]):>46}" for state in ("cold", "warm")),
                flush=True,
            )
    return rows


def prepare(file: FlashFile, state: str) -> None:
    """Raises RuntimeError when the page cache is not in the state that the column claims."""
    if state == "warm":
        with open(file.path, "rb", buffering=0) as whole:
            while whole.read(8 << 20):
                pass
        if cached_share(file) < 0.99:
            raise RuntimeError(f"{file.path} does not stay in the page cache: no warm figures")
    elif not empty_cache(file):
        raise RuntimeError(f"{file.path} cannot be dropped from the page cache: no cold figures")


def both(loop: Loop, pool: ReadPool, file: FlashFile, size: int, depth: int, turn: int) -> tuple[float, float]:
    """Bytes per second of the bare loop and of the pool at the same places; the order alternates."""
    places = np.random.default_rng(turn).integers(0, (file.size - size) // 4096, 60_000) * 4096
    probe = loop.rate(file, places[:500], size, depth, SECONDS)
    places = places[500 : 500 + max(200, min(20_000, int(probe * SECONDS / size)))]
    runs = {
        "bare": lambda: loop.rate(file, places, size, depth, 60.0),
        "pool": lambda: pooled(loop, pool, file, places, size),
    }
    rates = {name: runs[name]() for name in (("bare", "pool") if turn % 2 else ("pool", "bare"))}
    return rates["bare"], rates["pool"]


def pooled(loop: Loop, pool: ReadPool, file: FlashFile, places: np.ndarray, size: int) -> float:
    """One batch, into as much memory as the bare loop uses: caches count when the file is in memory."""
    dests = loop.address + np.arange(len(places)) % pool.threads * size
    began = time.perf_counter()
    sizes = np.full(len(places), size)
    with pool.submit(file, places, sizes, sizes, dests) as batch:
        batch.wait()
    return len(places) * size / (time.perf_counter() - began)


def summary(pairs: np.ndarray) -> dict[str, float]:
    means, deviations = pairs.mean(0), pairs.std(0, ddof=1) if len(pairs) > 1 else pairs[0] * 0
    return {
        "bare": means[0],
        "bare_deviation": deviations[0],
        "pool": means[1],
        "pool_deviation": deviations[1],
        **share(pairs),
    }


def share(pairs: np.ndarray) -> dict[str, float]:
    """The pool's rate over the bare loop's, pair by pair [n, 2]: median and quartiles."""
    low, middle, high = np.quantile(pairs[:, 1] / pairs[:, 0], (0.25, 0.5, 0.75))
    return {"share": float(middle), "share_low": float(low), "share_high": float(high)}


def cells(found: dict[str, float]) -> str:
    both = "  ".join(f"{found[name] / 1e9:.2f} ±{found[name + '_deviation'] / 1e9:.2f}" for name in ("bare", "pool"))
    quartiles = f"({100 * found['share_low']:.0f} to {100 * found['share_high']:.0f})"
    return f"{both}  {100 * found['share']:.0f} % {quartiles}"


def plan_table(path: Path, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Time of one layer's batch with and without merging, the records at random places of it."""
    curve = load_curve(cache_dir(), path.parent)
    merging = curve.merging(args.records) if curve else Merging()
    print(
        f"\nrecords of {args.records} bytes, gaps up to {merging.gap} bytes ({'the curve' if curve else 'the default'})"
    )
    print("share of layer  one by one, ms  planned, ms    gain   requests  bytes")
    rows = []
    with FlashFile(path) as file, ReadPool(args.threads) as pool:
        slot = slot_stride(args.records, 0, file.sector, file.direct)
        slab = Buffer(RECORDS * slot)
        slab.bytes[:] = 1
        for share in SHARES:
            pairs = [
                compare(file, pool, slab, slot, args.records, merging, share, turn) for turn in range(args.repeats)
            ]
            found = np.array(pairs)
            times, deviations = found[:, :2].mean(0), found[:, :2].std(0, ddof=1)
            row = {"share": share, "separate_s": times[0], "separate_deviation": deviations[0]}
            row |= {"planned_s": times[1], "planned_deviation": deviations[1], "gain": times[0] / times[1]}
            row |= {"requests": found[:, 2].mean(), "bytes": found[:, 3].mean()}
            rows.append(row)
            cells = "".join(f"{1000 * t:>8.1f} ±{1000 * d:<5.1f}" for t, d in zip(times, deviations, strict=True))
            print(
                f"{100 * share:>12.0f} % {cells} {row['gain']:>6.2f}   {row['requests']:>5.2f}     {row['bytes']:.2f}",
                flush=True,
            )
    return rows


def compare(
    file: FlashFile, pool: ReadPool, slab: Buffer, slot: int, size: int, merging: Merging, share: float, turn: int
) -> tuple[float, float, float, float]:
    """Seconds one by one and planned; the plan's requests and bytes over those of reading one by one."""
    rng = np.random.default_rng(turn)
    base = turn * RECORDS * size % (file.size - RECORDS * size) // 4096 * 4096
    rules = {"one": SEPARATE, "plan": merging}
    spent, plans = {}, {}
    for name in ("one", "plan") if turn % 2 else ("plan", "one"):
        ids = np.flatnonzero(rng.random(RECORDS) < share)  # other places for each: the drive may keep what it read
        dests = slab.address + rng.permutation(RECORDS)[: len(ids)] * slot
        began = time.perf_counter()
        plans[name] = reads(file, base + ids * size, size, dests, rules[name])
        with plans[name].submit(pool) as batch:
            batch.wait()
        spent[name] = (time.perf_counter() - began) / len(ids)
    count = share * RECORDS
    requests = plans["plan"].requests / len(plans["plan"].reads)
    nbytes = plans["plan"].nbytes / len(plans["plan"].reads) / (plans["one"].nbytes / len(plans["one"].reads))
    return spent["one"] * count, spent["plan"] * count, requests, nbytes


if __name__ == "__main__":
    main()
