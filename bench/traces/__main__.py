"""Records the sets that a run needs, and replays them through slot policies.

    python -m bench.traces record PACK --text FILE --out T.npz [--limit 2048] [--window 512]
    python -m bench.traces record PACK --tokens TOKENS.json --out T.npz         (a synthetic checkpoint's sequence)
    python -m bench.traces replay T.npz --slots 10%,25%,50% [--warm 512] [--plot T.png]

Text is decoded token by token in windows, each a session of its own; slots keep what they hold between windows. Replay
counts the tokens after the first `--warm` (default: a quarter), which fill the slots and tell the pins what is hot.
Bytes are those of the missed records, without what direct reads round out to. Prints a table, then one JSON line.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from bench.traces.policies import misses, policies
from bench.traces.trace import Trace, record
from flashsparse.errors import UsageError
from flashsparse.memory import format_bytes

SLOTS = "10%,20%,30%,50%,70%"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    recording = commands.add_parser("record")
    recording.add_argument("pack", type=Path)
    source = recording.add_mutually_exclusive_group(required=True)
    source.add_argument("--text", type=Path, help="UTF-8, or .zst")
    source.add_argument("--tokens", type=Path, help="tokens.json of a synthetic checkpoint")
    recording.add_argument("--out", type=Path, required=True)
    recording.add_argument("--limit", type=int, default=2048, help="tokens")
    recording.add_argument("--window", type=int, default=None, help="tokens per session; default: the context")
    recording.add_argument("--dram", default=None)
    replaying = commands.add_parser("replay")
    replaying.add_argument("trace", type=Path)
    replaying.add_argument("--slots", default=SLOTS, help="per layer, numbers or shares of the records")
    replaying.add_argument("--warm", type=int, default=None, help="tokens that are not counted")
    replaying.add_argument("--plot", type=Path, default=None)
    args = parser.parse_args()
    try:
        report = _record(args) if args.command == "record" else _replay(args)
    except UsageError as problem:
        parser.error(str(problem))
    print(json.dumps(report))


def _record(args: argparse.Namespace) -> dict[str, Any]:
    import flashsparse

    with flashsparse.load(args.pack, dram=args.dram) as engine:
        length = min(args.window or engine.context_limit, engine.context_limit, engine.plan.max_kv_size)
        tokens, source = _tokens(args, engine)
        windows = [tokens[begin : begin + length] for begin in range(0, len(tokens), length)]
        trace = record(engine, windows, source)
    trace.save(args.out)
    report = {**trace.description, "tokens": len(tokens), "density": trace.density, "file": args.out.stat().st_size}
    print(f"{len(tokens)} tokens, {trace.density:.1%} of the records each, {format_bytes(report['file'])}")
    return report


def _tokens(args: argparse.Namespace, engine: Any) -> tuple[list[int], dict[str, Any]]:
    """At most `--limit` tokens, and where they come from."""
    from flashsparse.sparsity.texts import file_sha256, read_texts

    if args.tokens is not None:
        stored = json.loads(args.tokens.read_text())
        return stored["tokens"][: args.limit], {"profile": stored.get("profile")}
    if engine.tokenizer is None:
        raise UsageError(f"{args.pack}: no tokenizer, so --text cannot be used; expected --tokens FILE")
    text = read_texts([args.text], 16 * args.limit)  # characters: more than the tokens have
    ids = list(engine.tokenizer.encode(text))[: args.limit]
    return ids, {"text": {"name": args.text.name, "sha256": file_sha256(args.text)}}


def _replay(args: argparse.Namespace) -> dict[str, Any]:
    trace = Trace.load(args.trace)
    warm = len(trace.tokens) // 4 if args.warm is None else args.warm
    if not 0 <= warm < len(trace.tokens):
        raise UsageError(f"--warm: found {warm}, expected less than the trace's {len(trace.tokens)} tokens")
    rows = replay(trace, [share_of(text, trace.records) for text in args.slots.split(",")], warm)
    about = {key: trace.description[key] for key in ("pack", "tier", "bits", "layers", "records", "record_bytes")}
    report = {"trace": about, "tokens": len(trace.tokens), "warm": warm, "density": trace.density, "rows": rows}
    _show(report)
    if args.plot is not None:
        from bench.traces.draw import draw

        draw(report, args.plot)
    return report


def share_of(text: str, records: int) -> int:
    """A number of slots from `25%` or `288`. Raises UsageError."""
    try:
        slots = round(float(text[:-1]) / 100 * records) if text.endswith("%") else int(text)
    except ValueError:
        slots = 0
    if not 1 <= slots <= records:
        raise UsageError(f"--slots {text!r}: expected a number from 1 to {records}, or a share such as 25%")
    return slots


def replay(trace: Trace, slots: list[int], warm: int) -> list[dict[str, Any]]:
    """One row for each policy and number of slots, all layers together, over the tokens from `warm` on."""
    counted = len(trace.tokens) - warm
    needed = sum(len(ids) for layer in trace.sets for ids in layer[warm:])
    rows = []
    for size in slots:
        totals: dict[str, int] = {}
        for sets in trace.sets:
            for name, make in policies(sets, trace.records, size, warm).items():
                totals[name] = totals.get(name, 0) + int(misses(make(), sets, size)[warm:].sum())
        for name, missed in totals.items():
            rows.append(
                {
                    "policy": name,
                    "slots": size,
                    "share": size / trace.records,
                    "hit_rate": 1 - missed / max(needed, 1),
                    "misses_per_token": missed / counted,
                    "bytes_per_token": missed * trace.record_bytes / counted,
                }
            )
    return rows


def _show(report: dict[str, Any]) -> None:
    """Policies by slots: hit rate and bytes per token."""
    rows, about = report["rows"], report["trace"]
    counted, records = report["tokens"] - report["warm"], about["records"]
    print(f"tier {about['tier']}, {about['bits']} bits, {about['layers']} layers of {records} records")
    print(f"density {report['density']:.1%}; hit rate and flash bytes per token, over {counted} tokens")
    sizes = list(dict.fromkeys(row["slots"] for row in rows))
    print(f"{'slots per layer':<20}" + "".join(f"{f'{size} ({size / records:.0%})':>16}" for size in sizes))
    for name in dict.fromkeys(row["policy"] for row in rows):
        own = [row for row in rows if row["policy"] == name]
        cells = [f"{row['hit_rate']:.3f} {format_bytes(round(row['bytes_per_token']))}" for row in own]
        print(f"{name:<20}" + "".join(f"{cell:>16}" for cell in cells))


if __name__ == "__main__":
    main()
