"""What converting costs: `python -m bench.convert CHECKPOINT [--bits 16] [--tier exact] [--limit 1GB]`.

Converts under a control group's memory limit, each time anew and on a purged page cache, and deletes the pack. The
limit is reading the checkpoint and writing the pack at the drive's sequential rate. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from bench.ceilings import drive_rate
from bench.cgroup import run_limited
from bench.machine import OthersCpu, machine_name, mean_deviation, purge, record, shown
from flashsparse.memory import format_bytes, machine_memory, parse_size


def main() -> int:
    args = parse()
    files = sorted(path for path in args.checkpoint.iterdir() if path.is_file())
    rate = drive_rate([path for path in files if path.suffix == ".safetensors"], 1 << 20, 16, 1.0)
    print(f"drive     {rate / 1e9:.2f} GB/s sequential reading", flush=True)
    with OthersCpu() as others:
        runs = [run_once(args, files) for _ in range(args.repeat)]
    report = summarize(runs, sum(path.stat().st_size for path in files), rate) | {"others_cpu": others.share}
    show(report)
    if args.save:
        conditions = {"bits": args.bits, "tier": args.tier, "limit": args.limit}
        metrics = {name: report[name] for name in ("seconds", "bytes_per_s", "peak_bytes")}
        record("convert", args.checkpoint.name, conditions, metrics, others.share)
    print(json.dumps({"machine": machine_name(), **report}))
    return 0


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--work", type=Path, help="where packs are written  [default: beside the checkpoint]")
    parser.add_argument("--bits", default="16", choices=["16", "8", "4"])
    parser.add_argument("--tier", default="exact", choices=["exact", "predict", "dense"])
    parser.add_argument("--limit", default="1GB", help="memory of the control group")
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--save", action="store_true", help="append to bench/results")
    return parser.parse_args()


def run_once(args: argparse.Namespace, files: list[Path]) -> dict[str, Any]:
    """One conversion into a directory of its own, which is deleted. Exits when it fails."""
    purge(files)
    with tempfile.TemporaryDirectory(dir=args.work or args.checkpoint.parent) as work:
        pack = Path(work, "pack")
        command = [sys.executable, "-m", "flashsparse", "convert", str(args.checkpoint), str(pack)]
        command += ["--bits", args.bits, "--tier", args.tier]
        began = time.monotonic()
        done = run_limited(command, parse_size(args.limit, machine_memory()), echo=False, quiet=True)
        seconds = time.monotonic() - began
        if done.returncode:
            sys.exit(f"convert: exit {done.returncode}: {done.stderr.strip()[-300:]}")
        size = sum(path.stat().st_size for path in pack.iterdir())
        shutil.rmtree(pack)
    return {"seconds": seconds, "pack_bytes": size, "peak_bytes": done.peak_bytes}


def summarize(runs: list[dict[str, Any]], source_bytes: int, rate: float) -> dict[str, Any]:
    """`bytes_per_s` are the checkpoint's; the peak is the control group's, page cache included."""
    seconds = [run["seconds"] for run in runs]
    limit = (source_bytes + runs[0]["pack_bytes"]) / rate
    return {
        "source_bytes": source_bytes,
        "pack_bytes": runs[0]["pack_bytes"],
        "seconds": seconds,
        "bytes_per_s": [source_bytes / s for s in seconds],
        "peak_bytes": [run["peak_bytes"] for run in runs],
        "limit_s": limit,
        "share_of_limit": limit / mean_deviation(seconds)[0],
    }


def show(report: dict[str, Any]) -> None:
    gigabytes = [rate / 1e9 for rate in report["bytes_per_s"]]
    print(f"limit     {report['limit_s']:.1f} s, of which {100 * report['share_of_limit']:.0f} % is reached")
    print(f"convert   {shown(report['seconds'], 1)} s, {shown(gigabytes)} GB/s of the checkpoint")
    print(f"peak      {format_bytes(max(report['peak_bytes']))} of the control group, page cache included")


if __name__ == "__main__":
    sys.exit(main())
