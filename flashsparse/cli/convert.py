"""`flashsparse convert`: options, progress and the summary at the end. The work is `converter.convert`."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from flashsparse.cli.convert_predict import predict_options, predictor_summary, tokens_note

if TYPE_CHECKING:
    from converter.convert import Progress
    from flashsparse.pack.activity import ActivitySpec
    from flashsparse.pack.manifest import Manifest

SECTORS = (512, 4096)
INTERRUPTED = 130  # 128 + SIGINT, as shells report it


@click.command()
@click.argument("src")
@click.argument("dst", type=click.Path(path_type=Path))
@click.option(
    "--bits",
    type=click.Choice(["4", "8", "16"]),
    default="16",
    show_default=True,
    help="Bits per weight; 16 keeps the source's type, float32 included.",
)
@click.option(
    "--group-size",
    type=click.Choice(["32", "64", "128"]),
    default="64",
    show_default=True,
    help="Weights per scale, at 4 and 8 bits.",
)
@click.option(
    "--tier",
    type=click.Choice(["auto", "exact", "predict", "dense"]),
    default="auto",
    show_default=True,
    help="How layers decide what to read; auto: exact for relu activations, dense for silu; predict: some neurons.",
)
@click.option(
    "--gate",
    type=click.Choice(["full", "compact"]),
    default="full",
    show_default=True,
    help="How tier exact keeps the scoring matrix in memory: full, or compact: a copy of 12.25 bits (with --bits 16).",
)
@click.option(
    "--activation",
    metavar="NAME[:PARAM]",
    default=None,
    help="silu, relu, relu2, fatrelu:THRESHOLD or drelu, in place of the configuration's.  [default: config.json's]",
)
@predict_options
@click.option(
    "--order",
    metavar="ORDER",
    default="source",
    show_default=True,
    help="Order of the records on flash: source, frequency, coactivation (neurons that fire together lie together; "
    "both measured on --calibrate FILE) or random[:SEED].",
)
@click.option(
    "--codec",
    type=click.Choice(["zstd"]),
    help="Compress records of 16-bit floats without loss, for slow drives (doctor says when it pays).  [default: none]",
)
@click.option("--resume", is_flag=True, help="Continue a conversion that was stopped, if any.  [default: off]")
@click.option("--force", is_flag=True, help="Replace a pack that is there, at the end.  [default: off]")
def convert(
    src: str,
    dst: Path,
    bits: str,
    group_size: str,
    tier: str,
    gate: str,
    activation: str | None,
    order: str,
    codec: str | None,
    resume: bool,
    force: bool,
    **predict: Any,
) -> None:
    """Convert a checkpoint to a pack.

    SRC is a checkpoint directory or a Hugging Face repository id (OWNER/NAME), DST the pack to make.
    """
    from converter.convert import convert as run
    from flashsparse.pack.manifest import Manifest

    try:
        with _Stages() as stages:
            pack = run(
                src,
                dst,
                bits=int(bits),
                group_size=int(group_size),
                tier=tier,
                gate=gate,
                activation=activation,
                order=order,
                codec=codec,
                resume=resume,
                force=force,
                progress=stages.writing,
                fitting=stages.fitting,
                **predict,
            )
    except KeyboardInterrupt:
        _interrupted(dst)
    manifest = Manifest.load(pack)
    if predict["calibrate"] and (note := tokens_note(manifest, predict["calibrate_tokens"])):
        click.echo(note, err=True)
    for line in summary(manifest):
        click.echo(line)


def _interrupted(dst: Path) -> None:
    from converter.convert import staging_directory

    staging = staging_directory(dst)
    kept = f"; the work so far is kept in {staging}, run again with --resume to continue" if staging.exists() else ""
    click.echo(f"Interrupted{kept}.", err=True)
    sys.exit(INTERRUPTED)


class _Stages:
    """Progress of both stages, one shown at a time: fitting a predictor, by tokens, and writing files, by bytes."""

    def __init__(self) -> None:
        self._shown = ExitStack()
        self._stage = ""
        self._tell: Progress | None = None

    def __enter__(self) -> _Stages:
        self._show("writing")
        return self

    def __exit__(self, *exc: object) -> None:
        self._shown.close()

    def fitting(self, what: str, done: int, total: int) -> None:
        self._show("fitting")(what, done, total)

    def writing(self, file: str, done: int, total: int) -> None:
        self._show("writing")(file, done, total)

    def _show(self, stage: str) -> Progress:
        from flashsparse.cli.progress import walk_progress

        if self._tell is None or stage != self._stage:
            self._shown.close()
            self._tell = self._shown.enter_context(walk_progress() if stage == "fitting" else _progress())
            self._stage = stage
        return self._tell


@contextmanager
def _progress() -> Iterator[Progress]:
    """A bar on a terminal, one line per file otherwise; both on standard error."""
    if not sys.stderr.isatty():
        yield _Lines()
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn, TransferSpeedColumn
    from rich.progress import Progress as Bar

    columns = BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn()
    with Bar(TextColumn("{task.description}"), *columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("reading the checkpoint", total=None)

        def show(file: str, done: int, total: int) -> None:
            bar.update(task, description=file, completed=done, total=total)

        yield show


class _Lines:
    """Progress as plain lines: one when a file begins, and one at the end."""

    def __init__(self) -> None:
        self.said: tuple[str, bool] | None = None

    def __call__(self, file: str, done: int, total: int) -> None:
        from flashsparse.cli.progress import percent_done
        from flashsparse.memory import format_bytes

        if self.said != (file, done >= total):
            self.said = file, done >= total
            click.echo(f"{percent_done(done, total)} of {format_bytes(total)}  {file}", err=True)


def summary(manifest: Manifest) -> list[str]:
    """What was made, as lines: tier, size, activation and its origin, and what direct reads of records cost."""
    from flashsparse.memory import format_bytes
    from flashsparse.pack.codec import compression

    quant, activation, record = manifest.quant, manifest.activation, manifest.record
    size = sum(entry.bytes for entry in manifest.files.values())
    codec = f"{manifest.source_dtype}, as in the source"
    if quant:
        codec = f"{quant.bits} bits in groups of {quant.group_size}, from {manifest.source_dtype}"
    origin = "config.json" if activation.source == "config" else "--activation"
    param = "" if activation.param is None else f":{activation.param:g}"
    files = (manifest.resident_path, manifest.predictor_path)
    resident = sum(manifest.files[path.name].bytes for path in files if path.name in manifest.files)
    return [
        f"{manifest.path}",
        f"tier        {manifest.tier}" + ("" if manifest.gate == "none" else f", gate {manifest.gate}"),
        f"activation  {activation.name}{param} (from {origin})",
        f"weights     {codec}",
        f"size        {format_bytes(size)}, of which resident {format_bytes(resident)}",
        f"record      {record.bytes} bytes, stride {record.stride}",
        *([] if manifest.order is None else [f"order       {manifest.order.kind}"]),
        *([] if manifest.activity is None else [f"slots       by density, {_densities(manifest.activity)}"]),
        *([] if manifest.codec is None else [f"codec       {manifest.codec}, {compression(manifest):.2f} to 1"]),
        *predictor_summary(manifest),
        *(_direct_reads(manifest, sector) for sector in SECTORS),
    ]


def _densities(activity: ActivitySpec) -> str:
    """The range of the layers' densities, and what they were measured on."""
    least, most = min(activity.densities), max(activity.densities)
    return f"{100 * least:.1f} to {100 * most:.1f} % of a layer, measured on {activity.tokens} tokens"


def _direct_reads(manifest: Manifest, sector: int) -> str:
    """What a direct read of a record costs as stored, and with records padded to whole sectors."""
    from flashsparse.pack.inspect import read_amplification

    record = manifest.record
    padded = -(-record.stride // sector) * sector
    stored, aligned = (read_amplification(replace(record, stride=stride), sector) for stride in (record.stride, padded))
    more = padded / record.stride - 1
    return (
        f"direct read {stored:.2f} times a record at {sector}-byte sectors "
        f"({aligned:.2f} with a stride of {padded}, {more:.1%} more disk)"
    )
