"""One timed decode in a process of its own: what `bench.decode` repeats and `bench.limited` compares.

    python -m bench.decode_run PACK --sequence TOKENS.json --prompt 16 --tokens 32 --dram 7GB [--rung default]

Feeds stored tokens, never the model's own output: random models fall into loops in which any cache looks perfect. For
a synthetic checkpoint's pack the measured density and persistence are compared with the asked profile; figures more
than 10 % off are listed as `void`. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import IO, Any

import numpy as np

import flashsparse
from bench.activity import LAGS, PROFILES, check_profile, measure
from bench.ceilings import touched_bytes
from bench.machine import warm
from bench.native_time import NativeTime, native_time
from bench.packs import sequence_path
from bench.rungs import RUNGS, Rung, Sets, forget
from flashsparse.stats import Counters


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser)
    parser.add_argument("--rung", default="default", choices=RUNGS)
    parser.add_argument("--warm", action="store_true", help="read the pack through the page cache first")
    args = parser.parse_args()
    tokens, stored = read_sequence(args.sequence or sequence_path(args.pack), args.prompt + args.tokens)
    cached = warm(sorted(args.pack.iterdir())) if args.warm else None
    report = run(args, RUNGS[args.rung], tokens, stored.get("hot"))
    problems = off_profile(report, stored["profile"]) if "profile" in stored and report["measured"] else []
    report |= {"rung": args.rung, "profile": stored.get("profile"), "void": problems, "cached_share": cached}
    print(json.dumps(report))
    return 0


def add_options(parser: argparse.ArgumentParser) -> None:
    """What both this program and `bench.decode` understand."""
    parser.add_argument("pack", type=Path)
    parser.add_argument("--sequence", type=Path, help="tokens to feed  [default: PACK.tokens.json, beside the pack]")
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--tokens", type=int, default=256, help="tokens decoded after the prompt")
    parser.add_argument("--dram", default=None)
    parser.add_argument("--max-kv-size", type=int, default=None, help="[default: prompt and tokens]")
    parser.add_argument("--read-mode", default="auto", choices=["auto", "direct", "buffered"])
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--io-threads", type=int, default=None, help="[default: the engine's]")
    parser.add_argument("--embeddings", default="auto", choices=["auto", "memory", "flash"])


def read_sequence(path: Path, count: int) -> tuple[list[int], dict[str, Any]]:
    """The first `count` stored tokens and the whole file. Exits when it holds fewer."""
    stored: dict[str, Any] = json.loads(path.read_text())
    if len(stored["tokens"]) < count:
        sys.exit(f"{path} holds {len(stored['tokens'])} tokens, {count} are asked")
    return stored["tokens"][:count], stored


def off_profile(report: dict[str, Any], profile: str) -> list[str]:
    """Figures that differ from what the profile asks; of predicted sets, which are larger, only those in our favour."""
    measured, asked = report["measured"], PROFILES[profile].asked
    if report["tier"] != "predict":
        return check_profile(measured, profile)
    lazy = ("density", "union_4", "new")  # less of these is less to read
    kinder = {k: min(v, asked[k]) if k in lazy else max(v, asked[k]) for k, v in measured.items() if k in asked}
    return check_profile({**measured, **kinder, "hot_share": asked["hot_share"]}, profile)


def run(args: argparse.Namespace, rung: Rung, tokens: list[int], hot: list[list[int]] | None) -> dict[str, Any]:
    """Load, prefill the prompt, decode the rest one by one; the first decoded token is not timed apart."""
    options = {"dram": args.dram, "max_kv_size": args.max_kv_size or len(tokens), "read_mode": args.read_mode,
               "threads": args.threads, "io_threads": args.io_threads, "embeddings": args.embeddings,
               **rung.load}  # fmt: skip
    with native_time() as native, flashsparse.load(args.pack, **options) as engine:
        if engine.manifest.tier not in rung.tiers:
            sys.exit(f"rung {rung.name} needs a pack of tier {' or '.join(rung.tiers)}, not {engine.manifest.tier}")
        sets: Sets | None = None
        if rung.replayed:
            sets = Decode(engine, tokens, args.prompt, native).run().sets
            if rung.forgets:
                forget(engine)
        decode = Decode(engine, tokens, args.prompt, native, rung, sets).run()
        found = decode.report()
    # What this takes comes after the engine's memory, not on top of it.
    telling = rung.load.get("tier") != "dense" and len(decode.steps) > max(LAGS)
    return {**found, "measured": decode.measured(hot) if telling else {}}


class Decode:
    """One pass over the tokens in a session of its own, and what it cost."""

    def __init__(
        self,
        engine: flashsparse.Engine,
        tokens: list[int],
        prompt: int,
        native: NativeTime,
        rung: Rung | None = None,
        recorded: Sets | None = None,
    ) -> None:
        self.engine, self.tokens, self.prompt = engine, tokens, prompt
        self.native, self.rung, self.recorded = native, rung, recorded
        # Of hundreds of tokens they take tens of megabytes, which would count as the engine's.
        self._recorded: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115
        self._sizes: list[tuple[int, int]] = []  # layer, bytes
        self._dtype = np.uint16 if engine.manifest.intermediate_size <= 65536 else np.int32
        self.best: list[int] = []
        self.steps: list[float] = []
        self.digest = hashlib.sha256()

    def run(self) -> Decode:
        with self.engine.session() as session:
            began, before = time.perf_counter(), self.engine.counters.copy()
            self.digest.update(session.logits(self.tokens[: self.prompt], last=True)[-1].tobytes())
            self.prefill_s, self.prefill = time.perf_counter() - began, self.engine.counters - before
            if self.rung is not None and self.rung.start is not None:
                self.rung.start(self.engine, self.recorded)
            self.engine.observe(self._observe)
            before, reads, cpu = self.engine.counters.copy(), self._reads(), time.process_time()
            self.native.clear()
            for token in self.tokens[self.prompt :]:
                self.steps.append(self._step(session, token))
            self.cost, self.reads = self.engine.counters - before, self._reads() - reads
            self.cpu_s = time.process_time() - cpu
            self.engine.observe(None)
        self.peak = self.engine.peak_memory()  # before the figures below take memory of their own
        return self

    def _step(self, session: flashsparse.Session, token: int) -> float:
        each = None if self.rung is None else self.rung.each
        began = time.perf_counter()
        if each is not None:
            each(self.engine)
            if self.rung is not None and not self.rung.counted:
                began = time.perf_counter()
        row = session.logits([token])[0]
        seconds = time.perf_counter() - began
        self.digest.update(row.tobytes())
        self.best.append(int(row.argmax()))
        return seconds

    def _reads(self) -> int:
        """Reads made so far, each piece of a record counted."""
        assert self.engine._pool is not None
        return self.engine._pool.counters.reads

    def _observe(self, layer: int, ids: np.ndarray) -> None:
        data = ids.astype(self._dtype).tobytes()
        self._recorded.write(data)
        self._sizes.append((layer, len(data)))

    @property
    def sets(self) -> Sets:
        """The neurons that each token needed in each layer."""
        self._recorded.seek(0)
        found: Sets = []
        for layer, nbytes in self._sizes:
            if layer == 0:
                found.append([])
            found[-1].append(np.frombuffer(self._recorded.read(nbytes), self._dtype))
        return found

    def measured(self, hot: list[list[int]] | None) -> dict[str, float]:
        """The activity of the recorded sets."""
        by_layer = [list(layer) for layer in zip(*self.sets, strict=True)]
        return measure(by_layer, self.engine.manifest.intermediate_size, hot)

    def report(self) -> dict[str, Any]:
        """What decoding cost."""
        engine, count = self.engine, len(self.steps)
        context = self.prompt + count / 2
        return {
            "decode_tps": count / sum(self.steps),
            "prefill_tps": self.prompt / self.prefill_s,
            "load_s": engine.load_s,
            "median_step_s": float(np.median(self.steps)),
            "slowest_step_s": max(self.steps),
            **figures(self.cost, self.native, count, sum(self.steps)),
            "flash_reads_per_token": self.reads / count,
            "cpu_s": self.cpu_s / count,
            "touched_bytes_per_token": touched_bytes(engine.manifest, self.cost, count, context),
            "prefill_flash_bytes": self.prefill.flash_bytes,
            "peak_memory_bytes": self.peak,
            "runtime_bytes": engine.runtime_bytes,
            "budget_bytes": engine.plan.budget,
            "slots": list(engine.plan.slots),
            "records": engine.manifest.intermediate_size,
            "tier": engine.tier,
            "read_mode": engine.read_mode,
            "greedy": self.best,
            "logits_sha256": self.digest.hexdigest(),
        }


def figures(cost: Counters, native: NativeTime, tokens: int, seconds: float) -> dict[str, Any]:
    """Counters per token. Reading is waiting for reads, computing is what the kernels take; bookkeeping is all else."""
    bookkeeping = seconds - cost.io_wait_s - cost.compute_s
    return {
        "flash_bytes_per_token": cost.flash_bytes / tokens,
        "hit_rate": cost.hit_rate,
        "density": cost.density,
        "step_s": seconds / tokens,
        "reading_s": cost.io_wait_s / tokens,
        "computing_s": cost.compute_s / tokens,
        "bookkeeping_s": bookkeeping / tokens,
        "bookkeeping_share": bookkeeping / seconds,
        "ffn_s": cost.ffn_s / tokens,
        "native_ms": native.per(tokens),
    }


if __name__ == "__main__":
    sys.exit(main())
