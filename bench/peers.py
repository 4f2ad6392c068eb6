"""FlashSparse and its peers on the same shape, tokens, threads and memory limit, in one run, one after the other.

    python -m bench.peers PACK --gguf MODEL.gguf --limit 7GB [--checkpoint CHECKPOINT] [--llama-python PYTHON]

Every repetition runs all of them, so that what else the machine does strikes all: FlashSparse and llama.cpp (weights
repacked and as they are) under the control group's limit, llama.cpp with everything in memory, and with a checkpoint
transformers with accelerate's disk offload under the limit and mlx-lm in memory. Files are dropped from the page cache
before each run, and are in it for runs in memory. What fails is written to the log with the reason. Peers may live in
other Python environments. A peer that decodes slowly is stopped after `--seconds`. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.cgroup import run_limited
from bench.machine import OthersCpu, machine_name, note, purge, record, shown, warm
from bench.packs import sequence_path
from flashsparse.memory import format_bytes, machine_memory, parse_size

OURS = "flashsparse"


@dataclass
class Contender:
    """A program to time: `files` are what it reads, `limit` bytes of memory (None: all there is)."""

    name: str
    command: list[str]
    files: list[Path]
    limit: int | None
    runs: list[dict[str, Any]] = field(default_factory=list)
    failed: str | None = None

    def values(self, key: str) -> list[float]:
        return [run[key] for run in self.runs if run.get(key) is not None]


def main() -> int:
    args = parse()
    contenders = make_contenders(args)
    with OthersCpu() as others:
        for _ in range(args.repeat):
            for contender in contenders:
                run(contender)
    print(table(contenders))
    for contender in contenders:
        if contender.failed is not None:
            note(f"bench.peers {contender.name} {_limit_text(contender)}", contender.failed)
        elif args.save:
            keep(args, contender, others.share)
    rows = [{"name": c.name, "limit": c.limit, "failed": c.failed, "runs": c.runs} for c in contenders]
    print(json.dumps({"machine": machine_name(), "others_cpu": others.share, "contenders": rows}))
    return 0


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pack", type=Path)
    parser.add_argument("--gguf", type=Path, help="the same shape for llama.cpp (bench.gguf_model)")
    parser.add_argument("--checkpoint", type=Path, help="the same model for transformers and mlx-lm")
    parser.add_argument("--limit", default="7GB", help="memory of the control group")
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--peer-prompt", type=int, help="a shorter prompt for peers that would take hours")
    parser.add_argument("--seconds", type=float, default=60.0, help="at most so long is decoded by a peer")
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--llama-python", default=sys.executable, help="Python that has llama-cpp-python")
    parser.add_argument("--torch-python", default=sys.executable, help="Python that has transformers and accelerate")
    parser.add_argument("--skip", action="append", default=[], help="a contender to leave out, by its name")
    parser.add_argument("--save", action="store_true", help="append to bench/results")
    return parser.parse_args()


def make_contenders(args: argparse.Namespace) -> list[Contender]:
    """Who runs, in the order of the table."""
    limit = parse_size(args.limit, machine_memory())
    amounts = ["--prompt", str(args.prompt), "--tokens", str(args.tokens)]
    peers = ["--prompt", str(args.peer_prompt or args.prompt), "--tokens", str(args.tokens), "--seconds"]
    peers += [str(args.seconds)]
    threads = ["--threads", str(args.threads)]
    decode = [sys.executable, "-m", "bench.decode_run", str(args.pack), *amounts, *threads]
    found = [
        Contender(OURS, decode, _files(args.pack), limit),
        Contender(f"{OURS}, all in slots", [*decode, "--rung", "slots"], _files(args.pack), None),
    ]
    if args.gguf is not None:
        llama = [args.llama_python, "-m", "bench.llama", str(args.gguf), *peers, *threads]
        if (sequence := sequence_path(args.pack)).exists():
            llama += ["--sequence", str(sequence)]
        found += [
            Contender("llama.cpp", llama, [args.gguf], limit),
            Contender("llama.cpp, no repacking", [*llama, "--no-repack"], [args.gguf], limit),
            Contender("llama.cpp in memory", llama, [args.gguf], None),
        ]
    if args.checkpoint is not None:
        files, held = _files(args.checkpoint), str(limit - min(2_000_000_000, limit // 2))
        offload = [args.torch_python, "-m", "bench.offload", str(args.checkpoint), "--cpu-memory", held, *peers]
        mlx_lm = [sys.executable, "-m", "bench.mlx_lm_peer", str(args.checkpoint), *peers]
        found += [
            Contender("transformers, disk offload", [*offload, *threads], files, limit),
            Contender("mlx-lm", mlx_lm, files, limit),
            Contender("mlx-lm in memory", mlx_lm, files, None),
        ]
    return [contender for contender in found if contender.name not in args.skip]


def _files(directory: Path) -> list[Path]:
    return sorted(path for path in directory.iterdir() if path.is_file())


def run(contender: Contender) -> None:
    """One more run, unless an earlier one failed."""
    if contender.failed is not None:
        return
    purge(contender.files)
    if contender.limit is None:
        warm(contender.files)  # in memory means in memory
        done = subprocess.run(contender.command, capture_output=True, text=True)
        code, text, peak, error = done.returncode, done.stdout, 0, done.stderr
    else:
        ended = run_limited(contender.command, contender.limit, echo=False, quiet=True)
        code, text, peak, error = ended.returncode, ended.stdout, ended.peak_bytes, ended.stderr
    if code:
        last = (error.strip().splitlines() or [""])[-1]
        contender.failed = f"exit {code}" + (" (killed: out of memory)" if code == -9 else f" {last}".rstrip())
        print(f"{contender.name}: {contender.failed}", file=sys.stderr)
        return
    contender.runs.append({**json.loads(text.strip().splitlines()[-1]), "group_peak_bytes": peak})
    tps = contender.runs[-1]["decode_tps"]
    print(f"{contender.name}, {_limit_text(contender)}: {'-' if tps is None else f'{tps:.3f}'} tokens/s", flush=True)


def _limit_text(contender: Contender) -> str:
    return "no limit" if contender.limit is None else format_bytes(contender.limit)


def table(contenders: Sequence[Contender]) -> str:
    """Speeds and how many times as fast the first one is."""
    ours = contenders[0].values("decode_tps")
    lines = [f"\n{'':<28}{'memory':>10}{'decode tok/s':>18}{'prefill tok/s':>18}{'ours is times':>15}"]
    for contender in contenders:
        decode, prefill = contender.values("decode_tps"), contender.values("prefill_tps")
        times = f"{sum(ours) / len(ours) / (sum(decode) / len(decode)):.2f}" if ours and decode else "-"
        cells = (shown(decode, 3) if decode else "-", shown(prefill) if prefill else "-", times)
        text = f"{cells[0]:>18}{cells[1]:>18}{cells[2]:>15}" if contender.failed is None else f"  {contender.failed}"
        lines.append(f"{contender.name:<28}{_limit_text(contender):>10}{text}")
    return "\n".join(lines)


def keep(args: argparse.Namespace, contender: Contender, others_cpu: float | None) -> None:
    """Into this machine's CSV."""
    version = contender.runs[0].get("version") if contender.runs else None
    conditions = {"contender": contender.name, "limit": contender.limit, "prompt": args.prompt, "tokens": args.tokens,
                  "threads": args.threads}  # fmt: skip
    keys = ("decode_tps", "prefill_tps", "load_s")
    metrics: dict[str, Sequence[float]] = {key: contender.values(key) for key in keys if contender.values(key)}
    record("peers", Path(args.pack).name, conditions, metrics, others_cpu, {"peer": version} if version else None)


if __name__ == "__main__":
    sys.exit(main())
