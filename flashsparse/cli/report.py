"""Figures as the commands print them: one line per generation, and the summary of the demo.

Formats what Stats and MemoryPlan say; computes nothing that they do not state.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from flashsparse.cli import STDOUT
from flashsparse.memory import format_bytes

if TYPE_CHECKING:
    from flashsparse import Session


def stats_line(stats: dict[str, Any]) -> str:
    """Speed, reads and memory of one generation."""
    used = stats["peak_memory_bytes"] - stats["runtime_bytes"]
    parts = [
        f"{stats['generation_tokens']} tokens, {stats['generation_tps']:.1f} tok/s",
        f"prompt {stats['prompt_tokens']} tokens, {stats['prompt_tps']:.1f} tok/s",
        f"first token {stats['time_to_first_token_s']:.2f} s{start_part(stats)}",
        f"{format_bytes(int(stats['flash_bytes_per_token']))} from flash per token ({stats['read_mode']} reads)",
        f"hit rate {percent(stats['hit_rate'])}",
        *lookahead_parts(stats),
        *drive_parts(stats),
        f"peak memory {format_bytes(used)} of {format_bytes(stats['budget_bytes'])}"
        f" (+ {format_bytes(stats['runtime_bytes'])} runtime)",
        *system_parts(stats.get("system", {})),
    ]
    return " | ".join(parts)


def system_parts(system: dict[str, Any]) -> list[str]:
    """What macOS says of the moment: speed is not the program's alone there. Nothing on other systems."""
    named = {"memory pressure": system.get("pressure"), "heat": system.get("heat")}
    parts = [f"{name} {value}" for name, value in named.items() if value is not None]
    return [*parts, "held back by the system (App Nap or background)"] if system.get("napping") else parts


def lookahead_parts(stats: dict[str, Any]) -> list[str]:
    """Whether layers read ahead, and how much of that was needed; nothing where they never did."""
    useful = stats["prefetch_useful"]
    state = "on" if stats["lookahead"]["on"] else "off"
    return [] if useful is None else [f"lookahead {state}, {percent(useful)} of it used"]


def start_part(stats: dict[str, Any]) -> str:
    """What loading and the prompt would take together at the drive's rate in order; nothing without a curve."""
    limit, load = stats.get("start_limit_s"), stats.get("load_s", 0.0)
    return "" if limit is None else f" (and {load:.1f} s loading; at the drive's rate {limit:.1f} s)"


def drive_parts(stats: dict[str, Any]) -> list[str]:
    """When reads came much slower or faster than the drive's curve says; nothing otherwise."""
    drive = stats.get("drive")
    return [drive["note"]] if drive and drive["note"] else []


def quality_report(tier: str, quality: dict[str, Any] | None, problem: str | None) -> list[str]:
    """What a pack's quality.json says, in at most two lines; why it says nothing, where it ought to."""
    from flashsparse.quality.record import quality_lines

    if quality is not None:
        return quality_lines(quality)
    if problem is not None:
        return [f"not known: {problem}"]
    return ["not measured: run `flashsparse eval`"] if tier == "predict" else []


def full_note(session: Session) -> str:
    """Why a reply ended at the end of the context, and what helps."""
    return f"the context is full at {session.fed} tokens, so the reply ends here: {session.remedy}"


def percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f} %"


def printable(text: str) -> str:
    """`text` without lone surrogates, which no encoder accepts."""
    return text.encode("utf-8", "replace").decode("utf-8")


def write(text: str) -> None:
    """Stream text to standard output at once. Raises OSError that names it."""
    try:
        sys.stdout.write(printable(text))
        sys.stdout.flush()
    except OSError as error:
        raise OSError(error.errno, error.strerror, STDOUT) from error
