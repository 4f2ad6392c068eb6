"""`convert`: from a checkpoint to a published pack. Owns the order of things; every step has its own file.

Peak memory is a few blocks of rows plus one block of down-projection columns, whatever the size of the checkpoint.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from converter.bundles import write_records
from converter.compare import difference
from converter.density import density_options, find_densities
from converter.disk import FULL_ERRNOS, OutputFile, sync_directory
from converter.hub import find_source
from converter.journal import Journal
from converter.order import (
    Ordering,
    find_orders,
    order_activity,
    order_options,
    reordered,
    without_texts,
    write_orders,
)
from converter.plan import Options, Plan, make_plan
from converter.predict import check_texts, fit, write_predictor
from converter.predict_options import given, predict_options
from converter.publish import Staging, check_outside, check_replaceable, check_space, staging_path
from converter.resident import write_resident
from converter.source import Checkpoint, open_checkpoint
from flashsparse.errors import CheckpointError, ConvertError, PackError, UsageError
from flashsparse.pack.layout import FileDigest, FileEntry, flash_digest, flash_name, resident_digest
from flashsparse.pack.manifest import MANIFEST, PREDICTOR, RESIDENT, read_manifest
from flashsparse.pack.order import ORDER

Progress = Callable[[str, int, int], None]  # (file being written, bytes done, bytes of the whole pack)

MANIFEST_BYTES = 1 << 20  # what manifest and journal need at most, and a share of the pack for its blocks' checksums
MANIFEST_SHARE = 10_000


def convert(
    src: str | os.PathLike[str],
    dst: str | os.PathLike[str],
    *,
    bits: int = 16,
    group_size: int = 64,
    tier: str = "auto",
    gate: str = "full",
    activation: str | None = None,
    calibrate: str | os.PathLike[str] | Sequence[str | os.PathLike[str]] = (),
    calibrate_tokens: int | None = None,
    calibrate_window: int | None = None,
    predictor: str | None = None,
    predictor_bits: int | str | None = None,
    predictor_rank: int | str | None = None,
    select: str | None = None,
    target: str | None = None,
    thresholds: str | os.PathLike[str] | None = None,
    predictor_from: str | os.PathLike[str] | None = None,
    order: str = "source",
    codec: str | None = None,
    resume: bool = False,
    force: bool = False,
    progress: Progress | None = None,
    fitting: Progress | None = None,
) -> Path:
    """Converts a checkpoint directory or repository id `src` to the pack `dst` and returns its path.

    `activation` (NAME[:PARAM]) overrides the configuration's. `resume` continues a conversion that was stopped, starts
    one when there is none, and succeeds at once when the pack is complete; `force` replaces a pack at `dst`.

    `order` is that of the records on flash: source, random[:SEED], or frequency or coactivation as measured on the
    first `calibrate_tokens` (10000) of the texts `calibrate`. With `calibrate`, tier exact records how many neurons of
    each layer their tokens need, and slots are divided by that.

    `codec` "zstd" stores records of 16-bit floats compressed, without loss, each where it would lie anyway.

    Tier predict, which `progress` tells of and before it `fitting` (what, done, of how many): a `predictor`
    (gate-copy, the default, gate-up-copy, svd, wsvd, trained, exact-gate) of `predictor_bits` (1 to 4, by default 2)
    or `predictor_rank`, or "auto" of either for a size per layer, is fitted to each layer. On the first
    `calibrate_tokens` (10000) tokens of the texts `calibrate`, in windows of `calibrate_window`, the rule `select`
    (threshold, topk, topk-and-threshold) is set so that it meets `target`: value-recall:0.98, recall:V, density:V,
    density-ratio:V (times the true density) or ppl-ratio:V. `thresholds` names a file of `flashsparse sparsity
    --save-thresholds` to take in place of that, `predictor_from` imported PowerInfer predictors. Without a text,
    thresholds are where the activation's zeros begin.

    Raises UsageError, SourceUnavailableError, CheckpointError, UnsupportedModelError or ConvertError.
    """
    found = given(
        calibrate,
        thresholds,
        predictor_from,
        calibrate_tokens=calibrate_tokens,
        calibrate_window=calibrate_window,
        predictor=predictor,
        predictor_bits=predictor_bits,
        predictor_rank=predictor_rank,
        select=select,
        target=target,
    )
    ordering = order_options(order, found)
    density, found = density_options(found, tier)
    predict = predict_options(without_texts(found, ordering, tier), tier)
    options = Options(bits, group_size, tier, gate, activation, predict, ordering, codec, density)
    pack = _destination(dst)
    check_outside(pack)
    if os.path.lexists(pack) and not (resume or force):
        raise _exists(pack)
    with open_checkpoint(find_source(src)) as checkpoint:
        plan = make_plan(checkpoint, options)
        source = checkpoint.fingerprint()
        if plan.recipe is not None:
            check_texts(plan.recipe, checkpoint.directory)
        if ordering is not None:
            order_activity(ordering, plan.model.activation)  # refuses what has none
        try:
            with Staging(pack) as staging:
                journal = _begin(checkpoint, plan, source, staging, resume, force)
                if journal is not None:
                    run = _Run(checkpoint, plan, staging, journal, progress or _silent, fitting, activation)
                    run.finish(source)
                staging.remove()
        except OSError as problem:
            raise _write_error(pack, problem) from problem
    return pack


def staging_directory(dst: str | os.PathLike[str]) -> Path:
    """Where a conversion to `dst` keeps its work until it is complete."""
    return staging_path(_destination(dst))


def _destination(dst: str | os.PathLike[str]) -> Path:
    text = os.fspath(dst)
    if not text:
        raise UsageError("the destination is empty: expected a name for the pack")
    if "\0" in text:
        raise UsageError(f"{text!r}: not a path, since it holds a NUL character")
    text = os.path.abspath(os.path.expanduser(text))
    path = Path(os.path.realpath(text) if os.path.islink(text) else text)
    if not path.name:
        raise UsageError(f"{dst}: not a name for a pack")
    staging_path(path)
    return path


def _silent(file: str, done: int, total: int) -> None:
    """Progress that nobody watches."""


def _exists(dst: Path) -> ConvertError:
    return ConvertError(f"{dst}: already exists; use --force to replace it, or --resume to make sure it is complete")


def _write_error(dst: Path, problem: OSError) -> ConvertError:
    what = f"disk full ({problem.strerror})" if problem.errno in FULL_ERRNOS else problem.strerror
    staging = staging_path(dst)
    started = os.path.isdir(staging)  # False, not an error, where the path itself is the problem
    remedy = "name another destination"
    if problem.errno in (errno.EEXIST, errno.ENOTDIR):
        remedy = "a file is in the way: name another destination"
    kept = f"the work so far is kept in {staging}, run again with --resume to continue" if started else remedy
    return ConvertError(f"{problem.filename or dst}: {what}; {kept}")


def _begin(
    checkpoint: Checkpoint, plan: Plan, source: dict[str, str], staging: Staging, resume: bool, force: bool
) -> Journal | None:
    """The journal to work on, new or continued; None when the pack is already complete."""
    journal = Journal.load(staging.journal) if resume else None
    if journal is not None and journal.digest is not None and _digest(staging.dst) == journal.digest:
        journal = None  # published, but stopped before the staging directory was removed
        staging.clear()
    header = {"options": plan.choices(), "source": source}
    if journal is not None and staging.pack.is_dir():
        _check_same(staging, journal, header)
        _check_destination(staging.dst, force or bool(journal.header.get("replace")))
        return journal
    if staging.used and not (resume or force):
        raise ConvertError(
            f"{staging.path}: an unfinished conversion is here; use --resume to continue it or --force to start over"
        )
    if resume and os.path.lexists(staging.dst):
        different = difference(checkpoint, plan, staging.dst)
        if not different:
            return None
        if not force:
            raise ConvertError(f"{staging.dst}: not what would be converted: {different}; use --force to replace it")
    _check_destination(staging.dst, force)
    check_space(staging.path, _room(sum(plan.sizes.values())))
    staging.start()
    return Journal.create(staging.journal, header | {"replace": force})


def _room(pack_bytes: int) -> int:
    """Bytes of disk that writing `pack_bytes` of files takes, with manifest and journal."""
    return pack_bytes + pack_bytes // MANIFEST_SHARE + MANIFEST_BYTES


def _check_destination(dst: Path, replace: bool) -> None:
    if os.path.lexists(dst):
        if not replace:
            raise _exists(dst)
        check_replaceable(dst)


def _check_same(staging: Staging, journal: Journal, header: dict[str, Any]) -> None:
    """A conversion continues only with the options and the source that it started with."""
    for part, what in (("options", "option"), ("source", "source file")):
        old, new = journal.header.get(part, {}), header[part]
        for name in sorted(set(old) | set(new)):
            if old.get(name) != new.get(name):
                raise ConvertError(
                    f"{staging.path}: cannot resume: {what} {name}: found {new.get(name)!r}, "
                    f"expected {old.get(name)!r} as when it started; use --force without --resume to start over"
                )


def _digest(directory: Path) -> str | None:
    try:
        return read_manifest(directory).digest
    except PackError:
        return None


@dataclass
class _Run:
    """One run of a conversion, new or resumed."""

    checkpoint: Checkpoint
    plan: Plan
    staging: Staging
    journal: Journal
    progress: Progress
    fitting: Progress | None
    override: str | None = None  # the activation that the user named
    _name: str = ""  # the file being written
    _done: int = 0
    _total: int = 0

    def finish(self, source: dict[str, str]) -> None:
        """Writes what is missing and publishes. `source` is the fingerprint that was checked at the start."""
        if self.journal.digest is None or _digest(self.staging.pack) != self.journal.digest:
            self._fit()
            self._order()
            self._densities()
            self._write_files()
            self._check_unchanged(source)
            self._write_manifest()
        self.staging.publish()

    def _fit(self) -> None:
        """In tier predict: the predictor first, so that the size of every file is known."""
        if self.plan.recipe is not None:
            directory, work = self.checkpoint.directory, self.staging.calibration
            found = fit(self.plan.recipe, directory, work, self.fitting, self._ordering())
            self.plan = replace(self.plan, predictor=found)

    def _ordering(self) -> list[Ordering]:
        """The collector of an order that is measured on the texts that predictors are fitted on."""
        options = self.plan.ordering
        activity = None if options is None else order_activity(options, self.plan.model.activation)
        return [] if options is None or activity is None else [Ordering(options, activity)]

    def _order(self) -> None:
        """Records in another order than the source's: found before anything is written."""
        if self.plan.ordering is not None:
            directory, work = self.checkpoint.directory, self.staging.calibration
            orders = find_orders(self.plan, directory, work, self.override, self.fitting)
            self.plan = reordered(self.plan, orders)

    def _densities(self) -> None:
        """In tier exact with a text: how many neurons of each layer a token needs."""
        if self.plan.density is not None:
            directory, work = self.checkpoint.directory, self.staging.calibration
            self.plan = find_densities(self.plan, directory, work, self.override, self.fitting)

    def _write_files(self) -> None:
        sizes = self.plan.sizes
        finished = {name for name in sizes if name in self.journal.files and self._has(name, sizes[name])}
        self._done, self._total = sum(sizes[name] for name in finished), sum(sizes.values())
        missing = [name for name in sizes if name not in finished]
        present = sum(path.stat().st_size for name in missing if (path := self.staging.pack / name).exists())
        check_space(self.staging.path, _room(self._total - self._done) - present)
        for name in missing:
            entry = self._write(name)
            if entry.bytes != sizes[name]:
                raise CheckpointError(f"{name}: found {entry.bytes} bytes, expected {sizes[name]}: the source changed")
            sync_directory(self.staging.pack)
            self.journal.add_file(name, entry)
            self.progress(name, self._done, self._total)

    def _has(self, name: str, size: int) -> bool:
        path = self.staging.pack / name
        return path.is_file() and path.stat().st_size == size

    def _write(self, name: str) -> FileEntry:
        self._name = name
        self.progress(name, self._done, self._total)
        with OutputFile(self.staging.pack / name, self._new_digest(name)) as file:
            if name == RESIDENT:
                write_resident(self.checkpoint, self.plan, file, self._advance)
            elif small := self.plan.small_files().get(name):
                file.write(small())
                self._advance(file.digest.bytes)
            elif name == PREDICTOR:
                assert self.plan.predictor is not None
                orders = None if self.plan.orders is None else self.plan.orders.orders
                write_predictor(self.plan.predictor, file, self._advance, orders)
            elif name == ORDER:
                assert self.plan.orders is not None
                write_orders(self.plan.orders, file, self._advance)
            else:
                write_records(self.checkpoint, self.plan, self._layer(name), file, self._advance)
            return file.finish()

    def _layer(self, name: str) -> int:
        return next(layer for layer in range(self.plan.model.layers) if flash_name(layer) == name)

    def _new_digest(self, name: str) -> FileDigest:
        if name in (RESIDENT, PREDICTOR):
            return resident_digest()
        return (
            FileDigest() if name == ORDER or name in self.plan.small_files() else flash_digest(self.plan.record.stride)
        )

    def _advance(self, count: int) -> None:
        self._done += count
        self.progress(self._name, self._done, self._total)

    def _check_unchanged(self, source: dict[str, str]) -> None:
        now = self.checkpoint.fingerprint()
        changed = sorted(name for name in set(now) | set(source) if now.get(name) != source.get(name))
        if changed:
            raise CheckpointError(
                f"{self.checkpoint.directory / changed[0]}: changed while it was converted; "
                "run again with --force when the source is at rest"
            )

    def _write_manifest(self) -> None:
        manifest = self.plan.manifest(self.staging.pack, {name: self.journal.files[name] for name in self.plan.sizes})
        with OutputFile(self.staging.pack / MANIFEST, FileDigest()) as file:
            file.write(manifest.to_json().encode())
            file.finish()
        sync_directory(self.staging.pack)
        self.journal.add_digest(manifest.digest)
