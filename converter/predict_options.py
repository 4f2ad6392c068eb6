"""What the user chose for tier predict, checked against each other: predictor, sizes, selection, target, texts.

Pure decisions: files are opened elsewhere. Every choice that the pack depends on is in `choices`, so that a conversion
continues only with the same.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flashsparse.errors import UsageError
from flashsparse.sparsity.texts import file_sha256

SCORES = {
    "gate-copy": "gate_copy",
    "gate-up-copy": "gate_up_copy",
    "svd": "low_rank",
    "wsvd": "low_rank",
    "trained": "low_rank",
    "exact-gate": "gate",
}
PREDICTORS = tuple(SCORES)
IMPORTED = "imported"
COPIES, LOW_RANK = ("gate-copy", "gate-up-copy"), ("svd", "wsvd", "trained")
BITS = (1, 2, 3, 4)
AUTO = "auto"
SELECTIONS = {"threshold": "threshold", "topk": "topk", "topk-and-threshold": "topk_and_threshold"}
TARGETS = {
    "value-recall": "value_recall",
    "recall": "recall",
    "density": "density",
    "density-ratio": "density_ratio",
    "ppl-ratio": "ppl_ratio",
}
DEFAULT_TARGET = "value-recall:0.98"
DEFAULT_TOKENS = 10000
DEFAULT_BITS = 2
THRESHOLD_BITS = 4  # of copies whose scores are compared with thresholds on exact values
SIZING_RECALL = 0.98  # value recall that `auto` sizes layers for, under targets that say nothing about one layer

_ONLY_PREDICT = "is for tier predict"


@dataclass(frozen=True)
class Given:
    """The arguments as the user gave them; None and () for what was not given."""

    calibrate: tuple[Path, ...] = ()
    calibrate_tokens: int | None = None
    calibrate_window: int | None = None
    predictor: str | None = None
    predictor_bits: int | str | None = None
    predictor_rank: int | str | None = None
    select: str | None = None
    target: str | None = None
    thresholds: Path | None = None
    predictor_from: Path | None = None

    @property
    def names(self) -> list[str]:
        """The options that were given, as the command line spells them."""
        return [f"--{name.replace('_', '-')}" for name, value in vars(self).items() if value not in (None, ())]


@dataclass(frozen=True)
class PredictOptions:
    """A predictor with every choice made that needs neither the model nor the files.

    `kind` is one of PREDICTORS, IMPORTED, or None where a thresholds file decides. `bits` and `rank` are None for the
    predictor's default, `target` is None without text or with thresholds.
    """

    kind: str | None
    bits: int | str | None
    rank: int | str | None
    selection: str
    target: str | None
    target_value: float | None
    texts: tuple[Path, ...]
    tokens: int
    window: int | None
    thresholds: Path | None
    imported: Path | None

    def choices(self) -> dict[str, Any]:
        """What a resumed conversion must agree on, by the names of the options."""
        return {
            "predictor": self.kind,
            "predictor-bits": self.bits,
            "predictor-rank": self.rank,
            "select": self.selection,
            "target": None if self.target is None else f"{self.target}:{self.target_value!r}",
            "calibrate": [file_sha256(path) for path in self.texts],
            "calibrate-tokens": self.tokens if self.texts else None,
            "calibrate-window": self.window,
            "thresholds": None if self.thresholds is None else file_sha256(self.thresholds),
            "predictor-from": None if self.imported is None else file_sha256(self.imported),
        }


def given(
    calibrate: str | os.PathLike[str] | Sequence[str | os.PathLike[str]] = (),
    thresholds: str | os.PathLike[str] | None = None,
    predictor_from: str | os.PathLike[str] | None = None,
    **others: Any,
) -> Given:
    """The arguments of `convert` that are for tier predict, paths as paths."""
    texts = [calibrate] if isinstance(calibrate, str | os.PathLike) else calibrate
    return Given(
        tuple(map(Path, texts)),
        thresholds=None if thresholds is None else Path(thresholds),
        predictor_from=None if predictor_from is None else Path(predictor_from),
        **others,
    )


def predict_options(found: Given, tier: str) -> PredictOptions | None:
    """The choices for tier predict, None for other tiers. Raises UsageError naming the options that do not agree."""
    if tier != "predict":
        if found.names:
            raise UsageError(f"{found.names[0]} {_ONLY_PREDICT}, but found --tier {tier}; use --tier predict")
        return None
    _check_values(found)
    _check_pairs(found)
    target, value = _target(found)
    return PredictOptions(
        kind=_kind(found),
        bits=_size("--predictor-bits", found.predictor_bits, BITS),
        rank=_size("--predictor-rank", found.predictor_rank, None),
        selection=SELECTIONS[found.select or "threshold"],
        target=target,
        target_value=value,
        texts=found.calibrate,
        tokens=found.calibrate_tokens or DEFAULT_TOKENS,
        window=found.calibrate_window,
        thresholds=found.thresholds,
        imported=found.predictor_from,
    )


def _kind(found: Given) -> str | None:
    if found.predictor_from is not None:
        return IMPORTED
    return found.predictor or (None if found.thresholds is not None else "gate-copy")


def _check_values(found: Given) -> None:
    for option, value, allowed in (("predictor", found.predictor, PREDICTORS), ("select", found.select, SELECTIONS)):
        if value is not None and value not in allowed:
            raise UsageError(f"--{option}: found {value!r}, expected one of {', '.join(allowed)}")
    for option, number in (("tokens", found.calibrate_tokens), ("window", found.calibrate_window)):
        if number is not None and number < 2:
            raise UsageError(f"--calibrate-{option}: found {number}, expected at least 2")


def _check_pairs(found: Given) -> None:
    """Options that contradict each other, and those that need another."""
    kind, text = _kind(found), bool(found.calibrate)
    clashes = [
        ("--predictor-from", found.predictor_from, "--predictor", found.predictor),
        ("--predictor-from", found.predictor_from, "--thresholds", found.thresholds),
        ("--thresholds", found.thresholds, "--target", found.target),
        ("--thresholds", found.thresholds, "--select", found.select if found.select != "threshold" else None),
    ]
    for name, value, other, rival in clashes:
        if value is not None and rival is not None:
            raise UsageError(f"{name} and {other} {rival}: {name} decides that already; leave out one of them")
    for name in ("--predictor-bits", "--predictor-rank"):
        size = found.predictor_bits if name.endswith("bits") else found.predictor_rank
        fitting = COPIES if name.endswith("bits") else LOW_RANK
        if size is not None and kind is not None and kind not in fitting:
            what = f"--predictor {kind}" if kind != IMPORTED else "--predictor-from"
            raise UsageError(f"{name} and {what}: {name} is for {' and '.join(fitting)}")
        if size == AUTO and found.thresholds is not None:
            raise UsageError(f"{name} auto and --thresholds: sizes are chosen for a --target, which thresholds replace")
        if size == AUTO and not text:
            raise UsageError(f"{name} auto needs --calibrate FILE: sizes are chosen by what they name on a text")
    if found.predictor_rank is not None and kind is None:
        raise UsageError("--predictor-rank and --thresholds: thresholds are for copies and the exact gate")
    if not text:
        _check_without_text(found, kind)


def _check_without_text(found: Given, kind: str | None) -> None:
    needs = {
        "--target": found.target,
        "--calibrate-tokens": found.calibrate_tokens,
        "--calibrate-window": found.calibrate_window,
        "--select": found.select if found.select != "threshold" else None,
        "--predictor": kind if kind in ("wsvd", "trained") else None,
    }
    for name, value in needs.items():
        if value is not None:
            raise UsageError(f"{name} {value} needs a text to calibrate on: add --calibrate FILE")


def _size(option: str, value: int | str | None, allowed: Sequence[int] | None) -> int | str | None:
    if value is None or value == AUTO:
        return value
    number = int(value) if isinstance(value, int) or value.isdecimal() else 0
    if (allowed is not None and number not in allowed) or number < 1:
        expected = f"one of {', '.join(map(str, allowed))}" if allowed else "a whole number from 1 on"
        raise UsageError(f"{option}: found {value!r}, expected {expected}, or auto")
    return number


def _target(found: Given) -> tuple[str | None, float | None]:
    """The target and its value; None where nothing is calibrated."""
    if found.thresholds is not None or not found.calibrate:
        return None, None
    text = found.target or DEFAULT_TARGET
    name, _, number = text.partition(":")
    try:
        value = float(number)
    except ValueError:
        value = math.nan
    if name not in TARGETS:
        raise UsageError(f"--target {text!r}: expected KIND:VALUE, KIND one of {', '.join(TARGETS)}")
    share = name in ("value-recall", "recall", "density")
    low, high = (1.0, math.inf) if name == "ppl-ratio" else (0.0, 1.0 if share else math.inf)
    if not low < value <= high or not math.isfinite(value):
        expected = f"a number above {low:g}" + (f", at most {high:g}" if math.isfinite(high) else "")
        raise UsageError(f"--target {text!r}: found {number!r}, expected {expected}")
    return TARGETS[name], value
