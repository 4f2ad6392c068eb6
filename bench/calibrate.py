"""Calibration of the 7B shape, measured on a checkpoint of few layers: seconds per layer, memory, GFLOP/s.

    python -m bench.calibrate WORK [--tokens 10000] [--layers 2] [--limit 4GB] [--predictor gate-copy|trained|...]

Writes a synthetic ReGLU checkpoint of that shape with a word tokenizer and its token sequence as text, and calibrates
it in a process of its own (under a control group of `--limit`, where one can be made). Layers are alike, so that 32 of
them take 32 times one; what is printed as an extrapolation is that product and not a run. The checkpoint was just
written, so its weights come from the system's file cache. With --predictor it is `convert --tier predict` that runs,
and the time from a layer's last token to the first window of the next is what fitting took, that window and the reading
of weights included. Needs about 2 GB of disk. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from bench.activity import PROFILES
from bench.cgroup import NoControlGroup, run_limited
from bench.synthetic import SHAPES, Shape, load_fixture, write
from flashsparse.memory import format_bytes, machine_memory, parse_size

LAYERS = 32  # of the model that is extrapolated to
WINDOW = 512
KINDS = ("gate-copy", "gate-up-copy", "svd", "wsvd", "trained")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("--tokens", type=int, default=10000)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--limit", default="4GB", help="memory of the control group that calibration runs in")
    parser.add_argument("--predictor", choices=KINDS, help="fit these too  [default: statistics alone]")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)  # the measured process itself
    args = parser.parse_args()
    if args.here:
        print(json.dumps(measure(args.work, args.tokens, args.predictor)))
        return 0
    shape = replace(SHAPES["7b"], layers=args.layers, vocab=args.tokens, positions=2 * args.tokens, tokens=args.tokens)
    if not (args.work / "tokenizer.json").exists():
        prepare(args.work, shape)
    command = [sys.executable, "-m", "bench.calibrate", str(args.work), "--tokens", str(args.tokens), "--here"]
    command += ["--predictor", args.predictor] if args.predictor else []
    found, group_peak = run(command, parse_size(args.limit, machine_memory()))
    report = summarize(found, shape, args.tokens) | {"group_peak_bytes": group_peak}
    show(report, args.limit)
    print(json.dumps(report))
    return 0


def prepare(work: Path, shape: Shape) -> None:
    """The checkpoint, a tokenizer whose words are ids, and the planted sequence as text."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    shutil.rmtree(work, ignore_errors=True)
    write(work, shape, PROFILES["paper"])
    tokens = load_fixture(work).tokens
    (work / "text.txt").write_text("\n".join(map(str, tokens)) + "\n")
    tokenizer = Tokenizer(models.WordLevel({str(n): n for n in range(shape.vocab)}, unk_token="0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(work / "tokenizer.json"))


def run(command: list[str], limit: int) -> tuple[dict[str, Any], int | None]:
    """What the measured process printed, and the control group's peak, None without a group."""
    try:
        done = run_limited(command, limit, echo=False)
        if done.returncode:
            sys.exit(f"calibration: exit {done.returncode}" + (" (out of memory)" if done.returncode == -9 else ""))
        text, peak = done.stdout, done.peak_bytes or None
    except NoControlGroup as problem:
        print(f"without a memory limit: {problem}", file=sys.stderr)
        text, peak = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout, None
    found: dict[str, Any] = json.loads(text.splitlines()[-1])
    return found, peak


class _Clock:
    """When each layer's first window and its last token were done, in seconds since the beginning."""

    def __init__(self) -> None:
        self.began = time.monotonic()
        self.starts: list[float] = []
        self.ends: list[float] = []

    def progress(self, what: str, done: int, total: int) -> None:
        layer, layers = int(what.split()[1]), int(what.rpartition(" ")[2])
        now = time.monotonic() - self.began
        if len(self.starts) < layer:
            self.starts.append(now)
        if done % (total // layers) == 0:
            self.ends.append(now)


def measure(work: Path, tokens: int, predictor: str | None) -> dict[str, Any]:
    """Calibrates, or converts with `predictor`; the layers' times and the process's peak memory."""
    from converter.calibrate import calibrate
    from converter.convert import convert

    out, text, clock = work / "out", [work / "text.txt"], _Clock()
    shutil.rmtree(out, ignore_errors=True)
    if predictor is None:
        calibrate(work, text, out=out, tokens=tokens, window=WINDOW, resume=False, progress=clock.progress)
    else:
        convert(
            work, out, tier="predict", predictor=predictor, calibrate=text, calibrate_tokens=tokens,
            calibrate_window=WINDOW, fitting=clock.progress,
        )  # fmt: skip
    scale = 1 if sys.platform == "darwin" else 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale
    size = sum(path.stat().st_size for path in out.iterdir() if path.is_file())
    total = time.monotonic() - clock.began
    shutil.rmtree(out)
    return {"starts_s": clock.starts, "ends_s": clock.ends, "total_s": total, "peak_bytes": peak, "result_bytes": size}


def flops(shape: Shape, tokens: int) -> float:
    """Floating-point operations of one layer's products; of causal attention the half that counts."""
    d, head = shape.hidden, shape.hidden // shape.heads
    weights = 2 * d * d + 2 * d * shape.kv_heads * head + 3 * d * shape.intermediate
    return tokens * (2.0 * weights + 2 * d * min(WINDOW, tokens))


def summarize(found: dict[str, Any], shape: Shape, tokens: int) -> dict[str, Any]:
    """Figures per layer; with several layers the first, which waits for the text too, is left out."""
    starts, ends = found["starts_s"], found["ends_s"]
    fits = [begun - ended for begun, ended in zip(starts[1:], ends, strict=False)]
    seconds = (ends[-1] - ends[0]) / (len(ends) - 1) if len(ends) > 1 else ends[0]
    return {
        "tokens": tokens,
        "layers_run": len(ends),
        "layer_s": seconds,
        "fit_s": max(fits, default=None),
        "gflops": flops(shape, tokens) / seconds / 1e9,
        "peak_bytes": found["peak_bytes"],
        "total_s": found["total_s"],
        "extrapolated_layers": LAYERS,
        "extrapolated_s": LAYERS * seconds,
        "result_bytes_per_layer": found["result_bytes"] // len(ends),
        "cores": os.cpu_count(),
    }


def show(report: dict[str, Any], limit: str) -> None:
    group = report["group_peak_bytes"]
    print(f"one layer    {report['layer_s']:.1f} s for {report['tokens']} tokens, {report['gflops']:.0f} GFLOP/s")
    if report["fit_s"] is not None:
        print(f"of which     {report['fit_s']:.1f} s between the last token and the next layer's first window")
    print(
        f"all layers   {report['extrapolated_s'] / 60:.1f} min for {LAYERS}: extrapolated, {report['layers_run']} ran"
    )
    print(f"peak memory  {format_bytes(report['peak_bytes'])} (process)")
    if group is not None:
        print(f"             {format_bytes(group)} (control group of {limit}, with the file cache)")


if __name__ == "__main__":
    sys.exit(main())
