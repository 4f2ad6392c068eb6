"""`flashsparse convert --tier predict`: its options, and what the summary says of a predictor.

Which options agree with each other is checked by the converter, so that the command and the function refuse the same.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

if TYPE_CHECKING:
    from flashsparse.pack.manifest import Manifest
    from flashsparse.sparsity.spec import PredictorSpec

F = TypeVar("F", bound=Callable[..., Any])
DEFAULT_TOKENS = 10000
PREDICTORS = ("gate-copy", "gate-up-copy", "svd", "wsvd", "trained", "exact-gate")
_OPTIONS = (
    click.option(
        "--calibrate",
        type=click.Path(path_type=Path),
        multiple=True,
        metavar="FILE",
        help="A text (UTF-8, or .zst; may be repeated): tier predict fits predictors and thresholds on it, tier exact "
        "measures what slots are divided by.",
    ),
    click.option(
        "--calibrate-tokens",
        type=click.IntRange(2),
        help=f"Tokens to take of the texts.  [default: {DEFAULT_TOKENS}]",
    ),
    click.option(
        "--calibrate-window",
        type=click.IntRange(2),
        help="Tokens per independent sequence.  [default: 512, or the context if that is less]",
    ),
    click.option(
        "--predictor",
        type=click.Choice(PREDICTORS),
        help="What names the neurons: low-bit copies of the gate, or of gate and up; a low-rank one from the gate's "
        "singular vectors, plain, weighted by the inputs or trained; or the gate itself, resident.  "
        "[default: gate-copy, or what --thresholds calls for]",
    ),
    click.option(
        "--predictor-bits",
        metavar="N|auto",
        help="Bits of copies: 1, 2, 3, 4, or auto for what each layer needs.  [default: 2; 4 with --thresholds on "
        "values]",
    ),
    click.option(
        "--predictor-rank",
        metavar="N|auto",
        help="Rank of low-rank predictors, or auto for what each layer needs.  [default: the size of a 2-bit copy]",
    ),
    click.option(
        "--select",
        type=click.Choice(["threshold", "topk", "topk-and-threshold"]),
        help="Which scores count.  [default: threshold]",
    ),
    click.option(
        "--target",
        metavar="KIND:VALUE",
        help="What the selection keeps of the text: value-recall, recall, density, density-ratio (times the true "
        "density) or ppl-ratio.  [default: value-recall:0.98]",
    ),
    click.option(
        "--thresholds",
        type=click.Path(path_type=Path),
        metavar="FILE",
        help="Thresholds that `flashsparse sparsity --save-thresholds` wrote, in place of --target.",
    ),
    click.option(
        "--predictor-from",
        type=click.Path(path_type=Path),
        metavar="FILE",
        help="PowerInfer's predictors, as `python -m converter.predictors.powerinfer` wrote them.",
    ),
)


def predict_options(command: F) -> F:
    """Adds the options of tier predict to a command, in the order of the list above."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


def predictor_summary(manifest: Manifest) -> list[str]:
    """Lines on the predictor of a pack: kind, size, what it selects, and that nobody judged it yet."""
    spec = manifest.predictor
    if spec is None:
        return []
    return [
        f"predictor   {_kind(spec)}, {_bytes(manifest, spec)}",
        f"selection   {_selection(spec)}",
        "quality     not measured: run `flashsparse eval PACK --text FILE` with another text",
    ]


def tokens_note(manifest: Manifest, asked: int | None) -> str | None:
    """A remark when the texts held less than what was asked for."""
    measured = manifest.predictor or manifest.activity
    found, wanted = 0 if measured is None else measured.tokens, asked or DEFAULT_TOKENS
    return f"note: {found} tokens, as the texts hold no more of the {wanted} asked" if 0 < found < wanted else None


def _kind(spec: PredictorSpec) -> str:
    sizes = sorted({layer.bits or layer.rank or 0 for layer in spec.layers if not layer.every} - {0})
    what = "rank" if spec.score == "low_rank" else "bits"
    whole = sum(layer.every for layer in spec.layers)
    size = f" {what} {'/'.join(map(str, sizes))}" if sizes else ""
    return spec.score.replace("_", "-") + size + (f", {whole} layers computed whole" if whole else "")


def _bytes(manifest: Manifest, spec: PredictorSpec) -> str:
    from flashsparse.memory import format_bytes
    from flashsparse.pack.manifest import PREDICTOR

    if spec.score == "gate":
        return "resident with the model"
    entry = manifest.files.get(PREDICTOR)
    if entry is None:
        return "no bytes"
    matrices = 3 if manifest.gated else 2
    ffn = 2 * matrices * manifest.layers * manifest.hidden_size * manifest.intermediate_size
    return f"{format_bytes(entry.bytes)}, {entry.bytes / ffn:.1%} of the FFN in 16 bits"


def _selection(spec: PredictorSpec) -> str:
    rule = spec.selection.replace("_", " ")
    target = spec.target.replace("_", " ") + ("" if spec.target_value is None else f" {spec.target_value:g}")
    if spec.calibrated_density is None:
        why = "as the file says" if spec.target == "thresholds" else "where the activation's zeros begin"
        return f"{rule}, {why}; not calibrated"
    recalls = [layer.value_recall for layer in spec.layers if layer.value_recall is not None]
    kept = f", value recall {sum(recalls) / len(recalls):.2%}" if recalls else ""
    return f"{rule} for {target}: {spec.calibrated_density:.1%} of the neurons{kept}, on {spec.tokens} tokens"
