"""What speed costs as one thing changes: `python -m bench.scaling WORK --against size|budget|density|context`.

    size     shapes of 1, 3, 7 and 13 billion weights, each generated, converted, measured and deleted, at one budget
    budget   one shape from just above the floor to everything in slots
    density  one shape whose predictor names 5 to 50 % of the neurons (thresholds on the synthetic scores)
    context  one shape after prompts of different lengths

Every point is `bench.decode_run` in a process of its own, `--repeat` times; a pack is made once, or taken from WORK
where it is there already (pack-SHAPE-KIND). Draws a plot (needs matplotlib) with the limit that the drive and the
memory set, and keeps the points in this machine's CSV with --save. The last line is one JSON object. Sizes need disk
for a checkpoint and its pack at a time: 52 GB for 13b.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from bench.activity import PROFILES
from bench.ceilings import measure_ceilings
from bench.decode import RunFailed, run_once, summarize
from bench.figures import draw
from bench.machine import OthersCpu, machine_name, note, purge, record, shown
from bench.packs import KINDS, make_pack, sequence_path
from bench.synthetic import SHAPES, Shape, write
from flashsparse.memory import format_bytes

SIZES = ("1b", "3b", "7b", "13b")
BUDGETS = (0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 1.0)  # shares of the way from the floor to everything in slots
DENSITIES = (0.05, 0.1, 0.2, 0.3, 0.5)
CONTEXTS = (16, 128, 512, 1024)
TOKENS = 64


@dataclass
class Point:
    """One measured value of what changes (`x`), the pack and the options that give it."""

    x: float
    pack: Path
    options: dict[str, Any]


def main() -> int:
    args = parse()
    args.work.mkdir(parents=True, exist_ok=True)
    points = [found for point in POINTS[args.against](args) if (found := measure(args, point)) is not None]
    print(table(args.against, points))
    result = {"machine": machine_name(), "against": args.against, "points": points}
    if args.plot is not None and points:
        draw(args.plot, [result])
    print(json.dumps(result))
    return 0 if points else 1


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path, help="where checkpoints and packs are made, and deleted")
    parser.add_argument("--against", choices=sorted(POINTS), required=True)
    parser.add_argument("--shape", default="1b", choices=sorted(SHAPES), help="of all but --against size")
    parser.add_argument("--sizes", default=",".join(SIZES), help="shapes of --against size")
    parser.add_argument("--profile", default="paper", choices=sorted(PROFILES))
    parser.add_argument("--kind", default="predict-16", choices=sorted(KINDS))
    parser.add_argument("--dram", default="4GB", help="budget of all but --against budget")
    parser.add_argument("--limit", default=None, help="memory of a control group  [default: none]")
    parser.add_argument("--prompt", type=int, default=32, help="of all but --against context")
    parser.add_argument("--tokens", type=int, default=TOKENS)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--plot", type=Path, help="write this picture")
    parser.add_argument("--save", action="store_true", help="append to bench/results")
    return parser.parse_args()


def sizes(args: argparse.Namespace) -> Iterator[Point]:
    for name in args.sizes.split(","):
        with synthetic_pack(args, SHAPES[name], name) as pack:
            yield Point(weights(SHAPES[name]), pack, {"dram": args.dram})


def budgets(args: argparse.Namespace) -> Iterator[Point]:
    with synthetic_pack(args, SHAPES[args.shape], args.shape) as pack:
        floor, everything = plan_ends(pack, args.prompt + args.tokens)
        for share in BUDGETS:
            budget = int(floor + share * (everything - floor))
            yield Point(budget, pack, {"dram": str(budget)})


def densities(args: argparse.Namespace) -> Iterator[Point]:
    """Profiles whose thresholds are shifted: the planted sets themselves grow."""
    for density in DENSITIES:
        with synthetic_pack(args, SHAPES[args.shape], f"{args.shape}-{density:g}", density) as pack:
            yield Point(density, pack, {"dram": args.dram})


def contexts(args: argparse.Namespace) -> Iterator[Point]:
    longest = max(CONTEXTS) + args.tokens
    with synthetic_pack(args, SHAPES[args.shape], args.shape) as pack:
        for prompt in CONTEXTS:
            yield Point(prompt, pack, {"dram": args.dram, "prompt": prompt, "max_kv_size": longest})


POINTS: dict[str, Callable[[argparse.Namespace], Iterator[Point]]] = {
    "size": sizes, "budget": budgets, "density": densities, "context": contexts,
}  # fmt: skip


@contextmanager
def synthetic_pack(args: argparse.Namespace, shape: Shape, name: str, density: float | None = None) -> Iterator[Path]:
    """A pack of a synthetic checkpoint, which is deleted once it is converted; the pack when the block ends.

    A pack that is in WORK already is taken as it is, and stays.
    """
    source, pack = args.work / f"checkpoint-{name}", args.work / f"pack-{name}-{args.kind}"
    profile = PROFILES[args.profile] if density is None else denser(args.profile, density)
    if (pack / "pack.json").exists():
        yield pack
        return
    try:
        shutil.rmtree(source, ignore_errors=True)
        write(source, shape, profile)
        make_pack(source, pack, args.kind, 0)
        shutil.rmtree(source, ignore_errors=True)
        yield pack
    finally:
        shutil.rmtree(pack, ignore_errors=True)
        shutil.rmtree(source, ignore_errors=True)
        sequence_path(pack).unlink(missing_ok=True)


def denser(name: str, density: float) -> Any:
    """A profile of another density: one normal distribution of thresholds, its other figures not asked for."""
    from statistics import NormalDist

    base = PROFILES["persistent" if name == "persistent" else name]
    spread = (1 + base.spread**2) ** 0.5  # a drive of variance 1 less a threshold
    centre = -spread * NormalDist().inv_cdf(density)
    return replace(base, hot=0.0, hot_threshold=0.0, cold_threshold=centre, asked={"density": density})


def weights(shape: Shape) -> float:
    """How many weights a shape has."""
    head = shape.hidden // shape.heads
    attention = 2 * shape.hidden * (shape.hidden + shape.kv_heads * head)
    layer = attention + 3 * shape.hidden * shape.intermediate + 2 * shape.hidden
    return shape.layers * layer + 2.0 * shape.vocab * shape.hidden + shape.hidden


def plan_ends(pack: Path, context: int) -> tuple[int, int]:
    """The smallest budget of a pack and the one with which everything has a slot, in bytes."""
    import flashsparse

    with flashsparse.load(pack, slots=64, max_kv_size=context) as engine:
        return engine.plan.floor, engine.plan.needs_all


def measure(args: argparse.Namespace, point: Point) -> dict[str, Any] | None:
    """Speed and limits of one point; None when it cannot run, with the reason in the log."""
    from flashsparse.pack.manifest import Manifest

    values = {"sequence": None, "prompt": args.prompt, "tokens": args.tokens, "max_kv_size": None, "threads": None,
              "read_mode": "auto", "io_threads": None, "embeddings": None,
              "limit": args.limit, **point.options}  # fmt: skip
    call = argparse.Namespace(pack=point.pack, **values)
    ceilings = measure_ceilings(Manifest.load(point.pack), threads=2)
    runs = []
    try:
        with OthersCpu() as others:
            for _ in range(args.repeat):
                purge(sorted(point.pack.iterdir()))
                runs.append(run_once(call, "default", "cold"))
    except RunFailed as failure:
        note(f"bench.scaling --against {args.against} at {point.x:g}", str(failure))
        print(f"{args.against} {point.x:g}: {failure}", file=sys.stderr)
        return None
    found = {"x": point.x, "options": point.options, **_kept(summarize(runs, ceilings))}
    print(f"{args.against} {point.x:g}: {shown(found['decode_tps'])} tokens/s", flush=True)
    if args.save:
        conditions = {"against": args.against, "x": point.x, "profile": args.profile, **point.options}
        record("scaling", point.pack.name, conditions, {"decode_tps": found["decode_tps"]}, others.share)
    return found


def _kept(result: dict[str, Any]) -> dict[str, Any]:
    run = result["run"]
    return {
        "decode_tps": result["decode_tps"],
        "limit_tps": 1 / result["limit_s"]["both"],
        "hit_rate": run["hit_rate"],
        "density": run["density"],
        "flash_bytes_per_token": run["flash_bytes_per_token"],
        "budget_bytes": run["budget_bytes"],
    }


def table(against: str, points: list[dict[str, Any]]) -> str:
    lines = [f"\n{against:>12}{'tok/s':>18}{'limit':>10}{'hits':>7}{'density':>9}{'MB/token':>10}{'budget':>10}"]
    for p in points:
        hits = "-" if p["hit_rate"] is None else f"{p['hit_rate']:.3f}"
        lines.append(
            f"{_label(against, p['x']):>12}{shown(p['decode_tps']):>18}{p['limit_tps']:>10.2f}{hits:>7}"
            f"{p['density']:>9.3f}{p['flash_bytes_per_token'] / 1e6:>10.1f}{format_bytes(p['budget_bytes']):>10}"
        )
    return "\n".join(lines)


def _label(against: str, x: float) -> str:
    if against == "size":
        return f"{x / 1e9:.1f}B"
    return format_bytes(int(x)) if against == "budget" else f"{x:g}"


if __name__ == "__main__":
    sys.exit(main())
