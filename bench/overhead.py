"""What a decoded token costs beside reading and computing: per layer, natively and through mlx-lm's modules.

    python -m bench.overhead PACK --dram 7GB --tokens 64

Decodes a fixed pseudo-random sequence three times and tells the median token of the last two. "kernels" is the time
inside the native library's compute functions, "bookkeeping" what is left of the step when waiting for reads is taken
off too. Ends with one JSON line.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np

import flashsparse
from flashsparse.stats import Counters

NAMES = ("step", "attention", "ffn", "kernels", "reads", "bookkeeping")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pack", type=Path)
    parser.add_argument("--dram", default=None)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--threads", type=int, default=None)
    args = parser.parse_args()
    report = {}
    print(f"{'microseconds per layer':<24}" + "".join(f"{name:>13}" for name in NAMES))
    for layers in ("native", "modules"):
        found = report[layers] = measure(args.pack, layers, args.dram, args.tokens, args.threads)
        print(f"{layers:<24}" + "".join(f"{found[name]:>13.0f}" for name in NAMES))
        print(f"{'':<24}bookkeeping is {100 * found['share']:.1f} % of a step of {found['step_ms']:.2f} ms")
    print(json.dumps(report))


def measure(pack: Path, layers: str, dram: str | None, count: int, threads: int | None) -> dict[str, float]:
    """Medians over tokens, microseconds per layer; `share` is of the step, whose milliseconds are `step_ms`."""
    with flashsparse.load(pack, dram=dram, layers=layers, threads=threads, max_kv_size=max(256, count)) as engine:
        ids = np.random.default_rng(0).integers(3, engine.manifest.vocab_size, count)
        costs = [cost for _ in range(3) for cost in decoded(engine, ids)][count:]
        rows = [(c.seconds, c.attention_s, c.ffn_s, c.compute_s, c.io_wait_s, c.bookkeeping_s or 0.0) for c in costs]
        medians = np.median(np.array(rows), axis=0)
        found = dict(zip(NAMES, (medians * 1e6 / engine.manifest.layers).tolist(), strict=True))
    return {**found, "step_ms": float(1e3 * medians[0]), "share": found["bookkeeping"] / found["step"]}


def decoded(engine: flashsparse.Engine, ids: np.ndarray) -> Iterator[Counters]:
    """What each token cost."""
    with engine.session() as session:
        for token in ids:
            before = engine.counters.copy()
            session.logits([int(token)]).argmax()
            yield engine.counters - before


if __name__ == "__main__":
    main()
