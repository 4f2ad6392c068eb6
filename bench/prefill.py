"""Prefill speed and the time to the first token, with the limits for both: `python -m bench.prefill PACK --limit 7GB`.

Every run is a process of its own that loads the pack and evaluates `--prompt` stored tokens; its time to the first
token counts from the start of the process, imports included. What of the resident weights is read after loading counts
as the prompt's. Counters show that no chunk reads a record twice. The limits: flash bytes over the drive's sequential
rate or the products over the rate of a large matrix product, whichever is longer; to the first token, resident weights
and the prompt's records over the sequential rate and 2 s. Beside them stands what touching as much memory for the first
time takes: a virtual machine may have to fetch it from its host. With `--recent` that is done before each run. The last
line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.ceilings import drive_rate, product_rate, touch_rate
from bench.cgroup import run_limited
from bench.decode import RunFailed
from bench.decode_run import read_sequence
from bench.machine import OthersCpu, machine_name, mean_deviation, purge, record, shown
from bench.packs import sequence_path
from flashsparse.memory import format_bytes, machine_memory, parse_size

if TYPE_CHECKING:
    from flashsparse.pack.manifest import Manifest

SEQUENTIAL = (1 << 20, 16)  # bytes and depth of what is called sequential: pieces of the size that streaming reads
START_S = 2.0  # allowed for Python, imports and the first products


def main() -> int:
    args = parse()
    if args.here:
        print(json.dumps(run(args)))
        return 0
    from flashsparse.pack.manifest import Manifest

    manifest = Manifest.load(args.pack)
    paths = [manifest.flash_path(layer) for layer in range(manifest.layers)]
    sequential, products, touching = drive_rate(paths, *SEQUENTIAL, seconds=1.0), product_rate(), touch_rate()
    print(f"drive     {sequential / 1e9:.2f} GB/s sequential\nproducts  {products / 1e9:.0f} GFLOP/s", flush=True)
    print(f"memory    {touching / 1e9:.2f} GB/s touched for the first time", flush=True)
    with OthersCpu() as others:
        runs = [run_once(args) for _ in range(args.repeat)]
    report = summarize(manifest, runs, args.prompt, sequential, products) | {"others_cpu": others.share}
    report["limit_s"]["touching"] = report["run"]["touched"] / touching
    show(report)
    problems = check(runs)
    for problem in problems:
        print(f"VOID: {problem}", file=sys.stderr)
    if args.save:
        keep(args, report)
    print(json.dumps({"machine": machine_name(), **report, "void": problems}))
    return 1 if problems else 0


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pack", type=Path)
    parser.add_argument("--sequence", type=Path, help="tokens to feed  [default: PACK.tokens.json, beside the pack]")
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--dram", default=None)
    parser.add_argument("--max-kv-size", type=int, default=None, help="[default: the prompt and 64 more]")
    parser.add_argument("--limit", help="memory of the control group that each run is put in  [default: none]")
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--recent", action="store_true", help="touch as much memory before each run: its host has it")
    parser.add_argument("--save", action="store_true", help="append to bench/results")
    parser.add_argument("--here", type=float, help=argparse.SUPPRESS)  # the measured process: when it was started
    return parser.parse_args()


def run(args: argparse.Namespace) -> dict[str, Any]:
    """The measured process."""
    import flashsparse

    tokens, _ = read_sequence(args.sequence or sequence_path(args.pack), args.prompt)
    with flashsparse.load(args.pack, dram=args.dram, max_kv_size=args.max_kv_size or args.prompt + 64) as engine:
        loaded, record_bytes = time.monotonic(), engine.manifest.record.bytes
        with engine.session() as session:
            for _ in session.generate(tokens, max_tokens=1):  # not `logits`, which hands out those of every token
                pass
            ended, cost = time.monotonic(), engine.counters
            return {
                "prefill_s": ended - loaded,
                "load_s": engine.load_s,
                "first_token_s": ended - args.here,
                "chunks": cost.steps,
                "records_needed": cost.active,
                # without rows of the embedding, of which padding to sectors is counted too
                "records_read": (cost.needed_bytes - cost.embedding_bytes) / record_bytes,
                "resident": engine.plan.resident,
                "flash_bytes": cost.flash_bytes,
                "io_wait_s": cost.io_wait_s,
                "ffn_s": cost.ffn_s,
                "touched": engine.peak_memory() - engine.runtime_bytes,
                "over_budget": engine.peak_memory() - engine.runtime_bytes - engine.plan.budget,
            }


def run_once(args: argparse.Namespace) -> dict[str, Any]:
    """One measured process on a purged page cache. Raises RunFailed, NoControlGroup."""
    left = purge(sorted(args.pack.iterdir()))
    if args.recent:
        hold(parse_size(args.dram or "50%", machine_memory()))
    command = [sys.executable, "-m", "bench.prefill", str(args.pack), "--prompt", str(args.prompt)]
    for name in ("sequence", "dram", "max_kv_size"):
        if getattr(args, name) is not None:
            command += [f"--{name.replace('_', '-')}", str(getattr(args, name))]
    command += ["--here", str(time.monotonic())]
    if args.limit:
        done = run_limited(command, parse_size(args.limit, machine_memory()), echo=False)
        code, text = done.returncode, done.stdout
    else:
        ended = subprocess.run(command, stdout=subprocess.PIPE, text=True)
        code, text = ended.returncode, ended.stdout
    if code:
        raise RunFailed(f"exit {code}" + (" (killed: out of memory)" if code == -9 else ""))
    return {**json.loads(text.strip().splitlines()[-1]), "left_after_purge": left}


def hold(nbytes: int) -> None:
    """Touch and free as much memory, on two processors: the host of a virtual machine leaves it there for seconds."""
    from flashsparse import native
    from flashsparse.weights import Buffer

    buffers = [Buffer(-(-nbytes // 16)) for _ in range(16)]
    with ThreadPoolExecutor(2) as threads:
        list(threads.map(lambda buffer: native.touch(buffer.bytes), buffers))


def operations(manifest: Manifest, prompt: int, pairs: float) -> float:
    """Floating-point operations of the products of a prompt, `pairs` of token and neuron computed in the FFNs."""
    m = manifest
    attention = m.hidden_size * m.head_dim * (2 * m.heads + 2 * m.kv_heads) * m.layers
    vectors = m.record.bytes / 2 / m.hidden_size if m.quant is None else 3 if m.gated else 2
    head = m.hidden_size * m.vocab_size  # of the last token alone
    return 2.0 * (prompt * attention + head) + 2.0 * pairs * vectors * m.hidden_size


def summarize(
    manifest: Manifest, runs: list[dict[str, Any]], prompt: int, sequential: float, products: float
) -> dict[str, Any]:
    """Speeds, limits and shares of them. At least a tenth of the pairs is taken as computed: what is certain."""
    first = runs[0]
    reading = first["flash_bytes"] / sequential
    certain = 0.1 * prompt * manifest.layers * manifest.intermediate_size
    computing = operations(manifest, prompt, certain) / products
    start = START_S + (first["resident"] + first["records_needed"] * manifest.record.bytes) / sequential
    seconds = [r["prefill_s"] for r in runs]
    return {
        "prompt": prompt,
        "prefill_tps": [prompt / s for s in seconds],
        "limit_s": {"reading": reading, "computing": computing, "first_token": start},
        "share_of_limit": max(reading, computing) / mean_deviation(seconds)[0],
        "first_token_s": [r["first_token_s"] for r in runs],
        "load_s": [r["load_s"] for r in runs],
        "run": first,
    }


def show(report: dict[str, Any]) -> None:
    limit, run = report["limit_s"], report["run"]
    rows = [
        ("limit", f"reading {limit['reading']:.1f} s, products {limit['computing']:.1f} s at least"),
        ("reached", f"{100 * report['share_of_limit']:.0f} % of the larger"),
        ("prefill", f"{shown(report['prefill_tps'])} tokens/s"),
        ("first token", f"{shown(report['first_token_s'])} s after the start, limit {limit['first_token']:.1f} s"),
        ("memory", f"{format_bytes(run['touched'])} touched, {limit['touching']:.1f} s at the rate of fresh memory"),
        ("load", f"{shown(report['load_s'])} s"),
        ("flash", f"{format_bytes(run['flash_bytes'])}, {run['io_wait_s']:.1f} s waited"),
        ("records", f"{run['records_read']:.0f} read, {run['records_needed']} needed in {run['chunks']} chunks"),
        ("footprint", f"{-run['over_budget'] / 1e6:.0f} MB under the budget"),
    ]
    for name, value in rows:
        print(f"{name:<12}{value}", flush=True)


def check(runs: list[dict[str, Any]]) -> list[str]:
    """A record that was read more often than chunks needed it voids the run."""
    return sorted(
        {
            f"{run['records_read']:.0f} records were read, chunks needed {run['records_needed']}"
            for run in runs
            if run["records_read"] > run["records_needed"]
        }
    )


def keep(args: argparse.Namespace, report: dict[str, Any]) -> None:
    conditions = {"prompt": args.prompt, "limit": args.limit, "dram": args.dram, "recent": args.recent}
    metrics = {name: report[name] for name in ("prefill_tps", "first_token_s", "load_s")}
    metrics["share_of_limit"] = [report["share_of_limit"]]
    record("prefill", args.pack.name, conditions, metrics, report["others_cpu"])


if __name__ == "__main__":
    sys.exit(main())
