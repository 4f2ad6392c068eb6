"""The whole claim in one run: a 7B-shaped checkpoint converted and run with less memory than it needs.

    python -m bench.limited WORK [--shape 7b] [--profile paper] [--convert-limit 1GB] [--run-limit 9GB]

Generates a synthetic checkpoint, converts it under one control group, decodes a fixed token sequence under another
and without a limit, and compares every logit of the two (by SHA-256). Steps already done in WORK are not repeated.
Needs root for the limits, about twice the checkpoint's size of disk, and Linux. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

from bench.cgroup import Limited, run_limited
from flashsparse.memory import format_bytes, machine_memory, parse_size


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("--shape", default="7b")
    parser.add_argument("--profile", default="paper")
    parser.add_argument("--convert-limit", default="1GB")
    parser.add_argument("--run-limit", default="9GB")
    parser.add_argument("--prompt", type=int, default=16)
    parser.add_argument("--generate", type=int, default=32)
    parser.add_argument("--bits", default="16")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    source, pack = args.work / "checkpoint", args.work / f"pack-{args.bits}"
    report: dict[str, Any] = {"profile": args.profile, "shape": args.shape, "bits": args.bits}
    if not (source / "tokens.json").exists():
        step("generate", [*PYTHON, "bench.synthetic", str(source), "--shape", args.shape, "--profile", args.profile])
    report["checkpoint_bytes"] = sum(f.stat().st_size for f in source.iterdir())
    if not (pack / "pack.json").exists():
        command = [*PYTHON, "flashsparse", "convert", str(source), str(pack), "--bits", args.bits, "--resume"]
        done, report["convert_s"] = step("convert", command, parse_size(args.convert_limit, machine_memory()))
        report["convert_peak_bytes"] = done.peak_bytes
    decode = [*PYTHON, "bench.decode_run", str(pack), "--sequence", str(source / "tokens.json")]
    decode += ["--prompt", str(args.prompt), "--tokens", str(args.generate)]
    limit = parse_size(args.run_limit, machine_memory())
    report["limited"] = last_json(step("run, limited", decode, limit)[0])
    report["unlimited"] = last_json(step("run, unlimited", [*decode, "--dram", "100%"])[0])
    same = report["limited"]["logits_sha256"] == report["unlimited"]["logits_sha256"]
    report["outputs_equal"] = same
    print("every logit equal" if same else "LOGITS DIFFER")
    print(json.dumps(report))
    return 0 if same else 1


PYTHON = [sys.executable, "-m"]


def step(name: str, command: list[str], limit: int = 1 << 62) -> tuple[Limited, float]:
    """Run one step under a control group; a failing step ends the run."""
    shown = "no limit" if limit == 1 << 62 else format_bytes(limit)
    print(f"== {name} ({shown})", flush=True)
    began = time.monotonic()
    done = run_limited(command, limit)
    seconds = time.monotonic() - began
    if done.returncode:
        sys.exit(f"{name}: exit {done.returncode}" + (" (killed: out of memory?)" if done.returncode == -9 else ""))
    print(f"== {name}: {seconds:.1f} s, peak of the group {format_bytes(done.peak_bytes)}", flush=True)
    return done, seconds


def last_json(done: Limited) -> dict[str, Any]:
    parsed: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return parsed


if __name__ == "__main__":
    sys.exit(main())
