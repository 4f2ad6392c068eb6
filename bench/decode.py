"""Decode speed on a fixed token sequence: the limits, the share of them that is reached, a table, one JSON line.

    python -m bench.decode PACK [--limit 7GB | --dram 7GB] [--prompt 128] [--tokens 256] [--repeat 5]
                                [--rung default --rung slots ...] [--cache cold --cache warm]

Every run is a process of its own (`bench.decode_run`), under a control group's memory limit with `--limit` (root on
Linux), so that all begin with empty slots. `cold`: the pack is dropped from the page cache first, and the share that
stayed is shown; `warm`: it is read through the page cache first, inside the limit. Direct reads see neither. Rungs:

"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.ceilings import Ceilings, Limit, measure_ceilings
from bench.cgroup import run_limited
from bench.decode_run import add_options
from bench.machine import OthersCpu, machine_name, mean_deviation, note, purge, record, shown
from bench.rungs import RUNGS
from flashsparse.memory import format_bytes, machine_memory, parse_size

CACHES = ("cold", "warm")
_PASSED = ("sequence", "prompt", "tokens", "dram", "max_kv_size", "read_mode", "threads", "io_threads", "embeddings")


def main() -> int:
    args = parse()
    from flashsparse.pack.manifest import Manifest

    manifest = Manifest.load(args.pack)
    ceilings = measure_ceilings(manifest, args.threads or 2)
    print(ceilings.describe(), flush=True)
    results = [measure(args, rung, cache, ceilings) for rung in args.rung for cache in args.cache]
    done = [result for result in results if "failed" not in result]
    for result in done:
        show(result)
    if len(done) > 1:
        print(table(done))
    problems = check(done)
    for problem in problems:
        print(f"VOID: {problem}", file=sys.stderr)
    if args.save:
        for result in done:
            keep(args, result, problems)
    print(json.dumps({"machine": machine_name(), "ceilings": vars(ceilings), "results": results, "void": problems}))
    return 1 if problems or len(done) < len(results) else 0


def parse() -> argparse.Namespace:
    rungs = "\n".join(f"  {rung.name:<10} {rung.text}" for rung in RUNGS.values())
    parser = argparse.ArgumentParser(
        description=(__doc__ or "") + rungs, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_options(parser)
    parser.add_argument("--limit", help="memory of the control group that each run is put in  [default: none]")
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--rung", action="append", choices=RUNGS, help="may be repeated  [default: default]")
    parser.add_argument("--cache", action="append", choices=CACHES, help="may be repeated  [default: cold]")
    parser.add_argument("--save", action="store_true", help="append to bench/results")
    args = parser.parse_args()
    args.rung, args.cache = args.rung or ["default"], args.cache or ["cold"]
    return args


def measure(args: argparse.Namespace, rung: str, cache: str, ceilings: Ceilings) -> dict[str, Any]:
    """`--repeat` runs of one rung and page cache state, with the limits for what they read and touched."""
    runs, purged = [], []
    with OthersCpu() as others:
        for _ in range(args.repeat):
            purged.append(purge(sorted(args.pack.iterdir())))
            try:
                runs.append(run_once(args, rung, cache))
            except RunFailed as failure:
                note(f"bench.decode {args.pack.name} {rung} {cache} --limit {args.limit}", str(failure))
                print(f"{rung}, {cache}: {failure}", file=sys.stderr)
                return {"rung": rung, "cache": cache, "failed": str(failure)}
    result = summarize(runs, ceilings)
    return {"rung": rung, "cache": cache, "left_after_purge": purged, "others_cpu": others.share, **result}


class RunFailed(RuntimeError):
    """A measured process did not end well."""


def run_once(args: argparse.Namespace, rung: str, cache: str) -> dict[str, Any]:
    """One measured process; what it printed, and the control group's peak. Raises RunFailed, NoControlGroup."""
    command = [sys.executable, "-m", "bench.decode_run", str(args.pack), "--rung", rung]
    for name in _PASSED:
        if getattr(args, name) is not None:
            command += [f"--{name.replace('_', '-')}", str(getattr(args, name))]
    command += ["--warm"] if cache == "warm" else []
    # Everything in slots needs more than any limit worth setting.
    if args.limit and RUNGS[rung].load.get("dram") is None:
        done = run_limited(command, parse_size(args.limit, machine_memory()), echo=False)
        code, text, peak = done.returncode, done.stdout, done.peak_bytes
    else:
        ended = subprocess.run(command, stdout=subprocess.PIPE, text=True)
        code, text, peak = ended.returncode, ended.stdout, 0
    if code:
        raise RunFailed(f"exit {code}" + (" (killed: out of memory)" if code == -9 else ""))
    return {**json.loads(text.strip().splitlines()[-1]), "group_peak_bytes": peak}


def summarize(runs: list[dict[str, Any]], ceilings: Ceilings) -> dict[str, Any]:
    """Mean and deviation of the runs' figures, the limits for them and the share of the limit that was reached."""
    first = runs[0]
    reading = mean_deviation([run["flash_bytes_per_token"] for run in runs])[0] / ceilings.drive
    memory = first["touched_bytes_per_token"] / ceilings.memory
    limit = Limit(reading, memory, overlapped=first["tier"] == "predict")
    step = mean_deviation([run["step_s"] for run in runs])[0]
    kept = (
        "step_s",
        "reading_s",
        "computing_s",
        "bookkeeping_s",
        "bookkeeping_share",
        "cpu_s",
        "prefill_tps",
        "load_s",
    )
    return {
        "decode_tps": [run["decode_tps"] for run in runs],
        "limit_s": {"reading": reading, "memory": memory, "both": limit.seconds},
        "share_of_limit": limit.seconds / step,
        "limit": limit.describe(),
        **{name: [run[name] for run in runs] for name in kept},
        "peak_over_budget": max(run["peak_memory_bytes"] - run["runtime_bytes"] - run["budget_bytes"] for run in runs),
        "group_peak_bytes": max(run["group_peak_bytes"] for run in runs),
        "logits_sha256": sorted({run["logits_sha256"] for run in runs}),
        "void": sorted({problem for run in runs for problem in run["void"]}),
        "run": {k: first[k] for k in _SHOWN},
    }


_SHOWN = (
    "flash_bytes_per_token", "flash_reads_per_token", "touched_bytes_per_token", "hit_rate", "density", "native_ms",
    "measured", "slots", "records", "budget_bytes", "tier", "read_mode", "profile", "prefill_flash_bytes",
    "cached_share",
)  # fmt: skip


def show(result: dict[str, Any]) -> None:
    """One rung's figures."""
    run, step = result["run"], mean_deviation(result["step_s"])[0]
    slots, budget = run["slots"], run["budget_bytes"]
    held = f"{min(slots)}" if min(slots) == max(slots) else f"{min(slots)} to {max(slots)}"
    print(f"\n{result['rung']}, {result['cache']}: {RUNGS[result['rung']].text}")
    print(result["limit"])
    rows = [
        ("reached", f"{100 * result['share_of_limit']:.0f} % of the limit"),
        ("decode", f"{shown(result['decode_tps'])} tokens/s"),
        ("step", ", ".join(f"{name} {1e3 * mean_deviation(result[name + '_s'])[0]:.1f} ms"
                           for name in ("reading", "computing", "bookkeeping")) + f" of {1e3 * step:.1f} ms"),
        ("processor", f"{1e3 * mean_deviation(result['cpu_s'])[0]:.0f} ms of all threads per token, waits not counted"),
        ("bookkeeping", f"{100 * mean_deviation(result['bookkeeping_share'])[0]:.1f} % of a step"),
        ("native", ", ".join(f"{name[3:]} {ms:.1f}" for name, ms in list(run["native_ms"].items())[:8])),
        ("flash", f"{format_bytes(round(run['flash_bytes_per_token']))} in {run['flash_reads_per_token']:.0f} reads"),
        ("hit rate", f"{run['hit_rate']:.3f}" if run["hit_rate"] is not None else "no lookups"),
        ("slots", f"{held} of {run['records']} records in {format_bytes(budget)}, {run['read_mode']} reads"),
        ("footprint", f"{-result['peak_over_budget'] / 1e6:.0f} MB under the budget"),
        ("page cache", _cache_note(result)),
    ]  # fmt: skip
    for name, value in rows:
        print(f"{name:<12}{value}", flush=True)


def _cache_note(result: dict[str, Any]) -> str:
    left = [share for share in result["left_after_purge"] if share is not None]
    text = f"at most {100 * max(left):.1f} % of the pack after the purge" if left else "purge cannot be checked here"
    held = result["run"]["cached_share"]
    return text if held is None else f"{text}; {100 * held:.0f} % after reading it again"


def table(results: list[dict[str, Any]]) -> str:
    """The rungs one under the other, cold and warm side by side."""
    lines = [
        f"\n{'rung':<12}" + "".join(f"{cache + ' tok/s':>18}" for cache in CACHES) + f"{'MB/token':>10}{'hits':>7}"
    ]
    for name in dict.fromkeys(result["rung"] for result in results):
        of = {result["cache"]: result for result in results if result["rung"] == name}
        run = next(iter(of.values()))["run"]
        cells = "".join(f"{shown(of[cache]['decode_tps']) if cache in of else '-':>18}" for cache in CACHES)
        hits = "-" if run["hit_rate"] is None else f"{run['hit_rate']:.3f}"
        lines.append(f"{name:<12}{cells}{run['flash_bytes_per_token'] / 1e6:>10.1f}{hits:>7}")
    return "\n".join(lines)


def check(results: list[dict[str, Any]]) -> list[str]:
    """What makes the run worthless: another activity than asked, or logits that differ where they must not."""
    problems = sorted({problem for result in results for problem in result["void"]})
    by_tier: dict[str, set[str]] = {}
    for result in results:
        by_tier.setdefault(result["run"]["tier"], set()).update(result["logits_sha256"])
    return problems + [f"tier {tier}: {len(d)} different logits" for tier, d in by_tier.items() if len(d) > 1]


def keep(args: argparse.Namespace, result: dict[str, Any], problems: list[str]) -> None:
    """Into this machine's CSV."""
    conditions = {
        "rung": result["rung"], "cache": result["cache"], "limit": args.limit, "dram": args.dram,
        "prompt": args.prompt, "tokens": args.tokens, "profile": result["run"]["profile"], "void": problems,
    }  # fmt: skip
    metrics: dict[str, Sequence[float]] = {
        "decode_tps": result["decode_tps"],
        "share_of_limit": [result["share_of_limit"]],
        "bookkeeping_share": result["bookkeeping_share"],
        "flash_bytes_per_token": [result["run"]["flash_bytes_per_token"]],
        "prefill_tps": result["prefill_tps"],
    }
    record("decode", Path(args.pack).name, conditions, metrics, result["others_cpu"])


if __name__ == "__main__":
    sys.exit(main())
