"""Decode speed on a fixed token sequence, with the activation statistics of the very run that is timed.

    python -m bench.decode PACK --tokens TOKENS.json --prompt 16 --generate 32 --dram 7GB

Feeds stored tokens, never the model's own output: random models fall into loops in which any cache looks perfect.
Prints a table, then one JSON line. For a synthetic checkpoint's pack the measured density and persistence are
compared with the asked profile; more than 10 % off voids the run (exit 1).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

import flashsparse
from bench.activity import check_profile, measure
from flashsparse.memory import format_bytes
from flashsparse.stats import Counters


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pack", type=Path)
    parser.add_argument("--tokens", type=Path, required=True, help="tokens.json of the synthetic checkpoint")
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--generate", type=int, default=256)
    parser.add_argument("--dram", default=None)
    parser.add_argument("--max-kv-size", type=int, default=None)
    parser.add_argument("--read-mode", default="auto", choices=["auto", "direct", "buffered"])
    args = parser.parse_args()
    stored = json.loads(args.tokens.read_text())
    tokens = stored["tokens"][: args.prompt + args.generate]
    if len(tokens) < args.prompt + args.generate:
        parser.error(f"{args.tokens} holds {len(tokens)} tokens, {args.prompt + args.generate} are asked")
    kv_size = args.max_kv_size or args.prompt + args.generate
    with flashsparse.load(args.pack, dram=args.dram, max_kv_size=kv_size, read_mode=args.read_mode) as engine:
        print(engine.plan.describe(), flush=True)
        report = decode(engine, tokens, args.prompt, stored.get("hot"))
    problems = check_profile(report["measured"], stored["profile"]) if "profile" in stored else []
    report["profile"], report["void"] = stored.get("profile"), problems
    show(report)
    print(json.dumps(report))
    return 1 if problems else 0


def decode(engine: flashsparse.Engine, tokens: list[int], prompt: int, hot: list[list[int]] | None) -> dict[str, Any]:
    """Prefill `prompt` tokens, then decode the rest one by one; the first decoded token is not timed apart."""
    sets: list[list[np.ndarray]] = []
    digest = hashlib.sha256()

    def observe(layer: int, ids: np.ndarray) -> None:
        if layer == 0:
            sets.append([])
        sets[-1].append(ids.astype(np.uint16 if ids.size == 0 or ids[-1] < 65536 else np.int32))

    with engine.session() as session:
        began = time.perf_counter()
        before = engine.counters.copy()
        digest.update(session.logits(tokens[:prompt])[-1].tobytes())
        prefill_s, prefill = time.perf_counter() - began, engine.counters - before
        engine.observe(observe)
        best, before, began = [], engine.counters.copy(), time.perf_counter()
        for token in tokens[prompt:]:
            row = session.logits([token])[0]
            digest.update(row.tobytes())
            best.append(int(row.argmax()))
        seconds, cost = time.perf_counter() - began, engine.counters - before
        engine.observe(None)
        peak = engine.peak_memory()  # before the figures below take memory of their own
    by_layer = [list(layer) for layer in zip(*sets, strict=True)]
    return {
        "decode_tps": len(best) / seconds,
        "prefill_tps": prompt / prefill_s,
        "load_s": engine.load_s,
        "measured": measure(by_layer, engine.manifest.intermediate_size, hot),
        **figures(cost, len(best)),
        "prefill_flash_bytes": prefill.flash_bytes,
        "peak_memory_bytes": peak,
        "runtime_bytes": engine.runtime_bytes,
        "budget_bytes": engine.plan.budget,
        "slots": engine.plan.slots[0],
        "read_mode": engine.read_mode,
        "greedy": best,
        "logits_sha256": digest.hexdigest(),
    }


def figures(cost: Counters, tokens: int) -> dict[str, Any]:
    return {
        "flash_bytes_per_token": cost.flash_bytes / tokens,
        "flash_reads_per_token": cost.flash_reads / tokens,
        "hit_rate": cost.hit_rate,
        "io_wait_s_per_token": cost.io_wait_s / tokens,
        "ffn_s_per_token": cost.ffn_s / tokens,
    }


def show(report: dict[str, Any]) -> None:
    used = report["peak_memory_bytes"] - report["runtime_bytes"]
    rows = [
        ("decode", f"{report['decode_tps']:.2f} tokens/s"),
        ("prefill", f"{report['prefill_tps']:.2f} tokens/s"),
        ("flash per token", format_bytes(round(report["flash_bytes_per_token"]))),
        ("hit rate", f"{report['hit_rate']:.3f}" if report["hit_rate"] is not None else "no lookups"),
        ("waiting for reads", f"{1000 * report['io_wait_s_per_token']:.0f} ms per token"),
        ("peak memory", f"{format_bytes(used)} of a budget of {format_bytes(report['budget_bytes'])}"),
        ("measured", ", ".join(f"{k} {v:.3g}" for k, v in report["measured"].items() if isinstance(v, float))),
    ]
    for name, value in rows:
        print(f"{name:<18}{value}")
    for problem in report["void"]:
        print(f"VOID: {problem}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
