"""`calibrate`: a text through the dense model, layer by layer, and what was measured on the way into two files.

Owns the order, the options, and resuming; what is measured is `statistics`' business, and that of other collectors.
Memory: one layer's weights, a block of activations, and the sums. States and finished layers wait in `.partial/`.
"""

from __future__ import annotations

import fcntl
import json
import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from converter.calibration_files import publish, write_layer
from converter.disk import FULL_ERRNOS, remove_tree
from converter.model import LayerWeights, Model, open_model
from converter.publish import check_space
from converter.states import write_file
from converter.statistics import HOTTEST, LayerStatistics, activity_rule
from converter.text import read_ids
from converter.walk import Block, Progress, walk, windows_of
from flashsparse.errors import ConvertError, UsageError
from flashsparse.sparsity.calibration import DESCRIPTION, TENSORS, read_description
from flashsparse.sparsity.texts import file_sha256, text_digests

WINDOW = 512
FILE_BYTES = 64 << 10  # a layer's small tensors and its file's header, at most about
PARTIAL = ".partial"
OPTIONS = "options.json"


class Collector(Protocol):
    """What collects something of each layer during a walk. `name` and `options` must agree when it is resumed."""

    name: str

    def options(self) -> dict[str, Any]: ...
    def begin(self, layer: int, weights: LayerWeights) -> None: ...
    def visit(self, block: Block) -> None: ...
    def output(self, block: Block, ffn: np.ndarray, after: np.ndarray) -> None: ...
    def end(self, layer: int) -> dict[str, np.ndarray]:
        """Tensors to keep as `layers.{layer}.NAME`; the collector starts over with the next `begin`."""


def calibrate(
    src: str | os.PathLike[str],
    texts: Sequence[str | os.PathLike[str]],
    *,
    out: str | os.PathLike[str],
    tokens: int = 10000,
    window: int | None = None,
    activation: str | None = None,
    threshold: float | None = None,
    covariance: bool = False,
    resume: bool = True,
    progress: Progress | None = None,
    extra: Sequence[Collector] = (),
) -> Path:
    """Measures a checkpoint's or pack's activity on the first `tokens` of the texts; returns `out`.

    Writes calibration.safetensors and calibration.json. A run that was stopped goes on with the first unfinished
    layer, and a complete one is kept, if the options are the same; `resume` False starts over and replaces. `window`
    (default: 512, or the context if that is less) cuts the texts into independent sequences. `threshold` counts as
    active what has |act(g)| above it; without one that is act(g) != 0, and nothing for silu, whose activity is then
    left out. `extra` collectors see the same walk. Raises UsageError for texts and options that cannot be used,
    ConvertError for other options on resume and a full disk, and what opening the model raises.
    """
    paths = [Path(path) for path in texts]
    _check(paths, tokens, window, threshold)
    directory = Path(out)
    with open_model(src, activation) as model:
        job = _job(model, paths, tokens, window, threshold, covariance, extra)
        try:
            with _locked(directory):
                _run(model, job, directory, resume, progress)
        except OSError as problem:
            raise _write_error(directory, problem) from problem
    return directory


@dataclass(frozen=True)
class _Job:
    """What is calibrated, with every choice made. `options` is what a resumed run must agree on."""

    windows: list[np.ndarray]
    collectors: tuple[Collector, ...]
    covariance: bool
    options: dict[str, Any]
    facts: dict[str, Any]  # for the description, beside the options


def _check(paths: list[Path], tokens: int, window: int | None, threshold: float | None) -> None:
    if not paths:
        raise UsageError("no text: give at least one file")
    for name, value in (("tokens", tokens), ("window", window)):
        if value is not None and value < 2:
            raise UsageError(f"{name}: found {value}, expected at least 2")
    if threshold is not None and not (math.isfinite(threshold) and threshold >= 0):
        raise UsageError(f"threshold: found {threshold}, expected a number >= 0")
    text_digests(paths)  # refuses a text that is given twice


def _job(
    model: Model,
    paths: list[Path],
    tokens: int,
    window: int | None,
    threshold: float | None,
    covariance: bool,
    extra: Sequence[Collector],
) -> _Job:
    length = min(WINDOW, model.context) if window is None else window
    if length > model.context:
        raise UsageError(f"window: found {length}, expected at most {model.context}, the model's context")
    ids = read_ids(model.tokenizer(), paths, tokens)
    total = sum(map(len, ids))
    if total < min(length, tokens):
        raise UsageError(f"the texts hold {total} tokens, expected at least one window of {length}; give more text")
    windows = [part for some in ids for part in windows_of(some, length)]
    if not windows:
        raise UsageError(f"tokens: found {tokens} for {len(paths)} texts, expected at least two of one text")
    activity = activity_rule(model.activation, threshold)
    walked = sum(map(len, windows))
    collectors: tuple[Collector, ...] = (LayerStatistics(activity, walked, covariance), *extra)
    options = {
        "model": model.digest,
        "activation": _activation(model),
        "tokens": tokens,
        "window": length,
        "threshold": threshold,
        "texts": [file_sha256(path) for path in paths],
        "collectors": {one.name: one.options() for one in collectors},
    }
    facts = {
        "tokens": walked,
        "windows": len(windows),
        "texts": [
            {"name": path.name, "sha256": file_sha256(path), "tokens": len(some)}
            for path, some in zip(paths, ids, strict=True)
        ],
        "active": "|act(g)| > threshold" if threshold is not None else "act(g) != 0" if activity else None,
    }
    return _Job(windows, collectors, covariance, options, facts)


def _activation(model: Model) -> dict[str, Any]:
    return {"name": model.activation.name, "param": model.activation.param}


def _model_facts(model: Model) -> dict[str, Any]:
    sizes = ("layers", "hidden_size", "intermediate_size", "heads", "kv_heads", "head_dim", "vocab_size")
    facts = {"digest": model.digest, "family": model.family, "activation": _activation(model)}
    return facts | {size: getattr(model, size) for size in sizes}


@contextmanager
def _locked(directory: Path) -> Iterator[None]:
    """The directory, made if need be, for this run alone."""
    directory.mkdir(parents=True, exist_ok=True)
    _check_own(directory)
    fd = os.open(directory, os.O_RDONLY)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError:
        raise ConvertError(f"{directory}: another calibration is running here") from None
    finally:
        os.close(fd)


def _check_own(directory: Path) -> None:
    """Raises UsageError when the directory holds other things and no calibration, finished or begun."""
    names = sorted(entry.name for entry in directory.iterdir())
    if names and not {DESCRIPTION, TENSORS, PARTIAL} & set(names):
        raise UsageError(
            f"{directory}: found {names[0]} and no calibration, expected a new or empty directory for --out"
        )


def _run(model: Model, job: _Job, directory: Path, resume: bool, progress: Progress | None) -> None:
    partial = directory / PARTIAL
    if resume and (directory / DESCRIPTION).exists():
        _check_same(directory, read_description(directory)["options"], job.options)
        remove_tree(partial)
        return
    if not resume:
        remove_tree(partial)
    if (partial / OPTIONS).exists():
        _check_same(partial, json.loads((partial / OPTIONS).read_bytes()), job.options)
    else:
        remove_tree(partial)
        states = 2 * 4 * job.facts["tokens"] * model.hidden_size
        check_space(directory, states + 2 * model.layers * _result_bytes(model, job))
        partial.mkdir()
        write_file(partial / OPTIONS, json.dumps(job.options).encode())
    _collect(model, job, partial, progress)
    publish(partial, directory, model.layers, {"model": _model_facts(model), "options": job.options, **job.facts})
    remove_tree(partial)


def _result_bytes(model: Model, job: _Job) -> int:
    """Disk for one layer's results, at most about; of another collector's a 4-bit copy of gate and up is expected."""
    d, neurons = model.hidden_size, model.intermediate_size
    numbers = HOTTEST**2 + 4 * neurons + 2 * d + (d * d if job.covariance else 0)
    return 4 * numbers + 2 * d * neurons * (len(job.collectors) - 1) + FILE_BYTES


def _check_same(where: Path, old: dict[str, Any], new: dict[str, Any]) -> None:
    """A calibration goes on, or is taken as it is, only with the options that it was made with."""
    for name in sorted(set(old) | set(new)):
        if old.get(name) != new.get(name):
            raise ConvertError(
                f"{where}: {name}: found {new.get(name)!r}, expected {old.get(name)!r} as in the calibration that is "
                "there; use --force to replace it, or another directory"
            )


def _collect(model: Model, job: _Job, partial: Path, progress: Progress | None) -> None:
    """The walk; each layer's results are in a file of their own before it counts as done."""

    def begin(layer: int, weights: LayerWeights) -> None:
        for one in job.collectors:
            one.begin(layer, weights)

    def visit(block: Block) -> None:
        for one in job.collectors:
            one.visit(block)

    def output(block: Block, ffn: np.ndarray, after: np.ndarray) -> None:
        for one in job.collectors:
            one.output(block, ffn, after)

    def done(layer: int) -> None:
        found: dict[str, np.ndarray] = {}
        for one in job.collectors:
            found |= one.end(layer)
        write_layer(partial, layer, found)

    states = walk(
        model,
        job.windows,
        visit,
        on_layer=begin,
        on_output=output,
        on_done=done,
        work=partial,
        resume=True,
        key=json.dumps(job.options, sort_keys=True),
        progress=progress,
    )
    states.close()


def _write_error(directory: Path, problem: OSError) -> ConvertError:
    what = f"disk full ({problem.strerror})" if problem.errno in FULL_ERRNOS else problem.strerror or str(problem)
    kept = "; the layers that are finished are kept, run again to continue" if (directory / PARTIAL).is_dir() else ""
    return ConvertError(f"{problem.filename or directory}: {what}{kept}")
