"""`flashsparse selftest`: every kernel against its reference, the drive, the demo; one report to paste.

Owns the report's text and the exit status: 1 when a kernel failed or the demo did not run.
"""

from __future__ import annotations

import json
import os
import time
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from flashsparse.machine import Curve
    from flashsparse.selftest.cases import Case, Outcome

DEMO_TOKENS = 64
NO_METAL = "not run: MLX finds no Metal device here, so nothing below says anything about a GPU"


@click.command()
@click.option("--threads", type=click.IntRange(1), help="Compute threads of the native kernels.  [default: one a core]")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@click.pass_context
def selftest(ctx: click.Context, threads: int | None, as_json: bool) -> None:
    """Test every kernel on this machine, in under a minute, and print a report to paste into a bug report.

    Errors are in units of the sum of the products' magnitudes, or wrong elements where the result is exact. Exits with
    1 when a kernel is outside its tolerance.
    """
    from dataclasses import asdict

    from flashsparse.machine import memory_rate
    from flashsparse.selftest.machine import facts

    began = time.perf_counter()
    found = facts()
    outcomes = run_kernels(threads or os.cpu_count() or 1, found["metal"] is not None)
    curve, drive_problem = attempt(_drive)
    demo, demo_problem = attempt(_demo)
    ok = all(outcome.ok for outcome in outcomes) and demo is not None
    report: dict[str, Any] = {
        "ok": ok,
        "machine": found,
        "memory_bytes_per_s": memory_rate(threads),
        "kernels": [asdict(outcome) for outcome in outcomes],
        "metal_ran": found["metal"] is not None,
        "drive": curve.to_dict() if curve else {"problem": drive_problem},
        "demo": demo or {"problem": demo_problem},
        "seconds": round(time.perf_counter() - began, 1),
    }
    click.echo(json.dumps(report) if as_json else "\n".join(lines(report, outcomes, curve)))
    ctx.exit(0 if ok else 1)


def run_kernels(threads: int, metal: bool) -> list[Outcome]:
    """Judge the native kernels, and the Metal ones where there is a GPU."""
    from flashsparse import native
    from flashsparse.selftest import on_cpu, on_gpu
    from flashsparse.selftest.cases import judge

    def listed(workers: native.Workers) -> Iterator[Case]:
        yield from on_cpu.cases(workers)
        if metal:
            yield from on_gpu.cases(workers)

    with native.Workers(threads) as workers:
        return [judge(case) for case in listed(workers)]


def attempt(part: Callable[[], Any]) -> tuple[Any, str | None]:
    """The part's result, or one line that says why there is none: a report is wanted most where something fails."""
    from flashsparse.cli import explain

    try:
        return part(), None
    except Exception as problem:
        return None, explain(problem)[0]


def _drive() -> Curve:
    from flashsparse.cli.demo import demo_pack
    from flashsparse.machine import find_curve

    return find_curve(demo_pack(), False, lambda problem: click.echo(problem, err=True))[0]


def _demo() -> dict[str, Any]:
    """The figures of a short story from the embedded model, under the demo's budget."""
    import flashsparse
    from flashsparse.cli.demo import BUDGET_SHARE, CONTEXT, PROMPT, at_least, demo_pack

    pack = demo_pack()
    size = sum(file.stat().st_size for file in pack.glob("*.safetensors"))

    def story(dram: int) -> dict[str, Any]:
        with flashsparse.load(pack, dram=dram, max_kv_size=CONTEXT) as engine, engine.session() as session:
            *_, last = session.generate(PROMPT, max_tokens=DEMO_TOKENS, temp=0.0)
            return last.stats.to_dict()

    return at_least(int(BUDGET_SHARE * size), story)


def lines(report: dict[str, Any], outcomes: list[Outcome], curve: Curve | None) -> list[str]:
    """What the terminal shows."""
    from flashsparse.cli.doctor import _table

    text = [*_machine(report), "", f"{'kernel':<18}{'on':<8}{'error':>10}{'allowed':>10}{'GB/s':>8}"]
    text += [_row(outcome) for outcome in outcomes]
    text += ["", f"memory       {report['memory_bytes_per_s'] / 1e9:.1f} GB/s"]
    if curve is None:
        text.append(f"drive        not measured: {report['drive']['problem']}")
    else:
        rates = curve.direct if curve.mode == "direct" else curve.buffered
        text += [f"drive        {curve.device}", *_table(curve.mode, rates)]
    text.append(f"demo         {_story(report['demo'])}")
    failed = [outcome.name for outcome in outcomes if not outcome.ok]
    verdict = "passed" if report["ok"] else f"FAILED: {', '.join(failed) or 'the demo'}"
    return [*text, f"{verdict} in {report['seconds']:.0f} s"]


def _machine(report: dict[str, Any]) -> list[str]:
    from flashsparse.memory import format_bytes

    found = report["machine"]
    libraries = ", ".join(f"{name} {number}" for name, number in found["versions"].items())
    metal = found["metal"]
    device = f"{metal.get('device_name', metal)} ({metal.get('architecture', 'unknown')})" if metal else NO_METAL
    size = format_bytes(found["memory"])
    return [
        f"flashsparse  {found['flashsparse']}, Python {found['python']}, {libraries}",
        f"processor    {found['processor']}, {found['cores']} cores, {size}; kernels: {found['isa']}",
        f"system       {found['system']}",
        f"Metal        {device}",
    ]


def _row(outcome: Outcome) -> str:
    error = "-" if outcome.error is None else f"{outcome.error:.2g}"
    rate = "" if outcome.bytes_per_s is None else f"{outcome.bytes_per_s / 1e9:.1f}"
    mark = "" if outcome.ok else f"  FAILED {outcome.problem or ''}".rstrip()
    return f"{outcome.name:<18}{outcome.backend:<8}{error:>10}{outcome.tolerance:>10.2g}{rate:>8}{mark}"


def _story(demo: dict[str, Any]) -> str:
    if "problem" in demo:
        return f"did not run: {demo['problem']}"
    return (
        f"{demo['generation_tps']:.1f} tokens/s, {demo['flash_bytes_per_token']} bytes from flash per token, "
        f"{demo['read_mode']} reads, {demo['kernels']} kernels"
    )
