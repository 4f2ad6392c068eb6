"""PowerInfer's trained predictors: `model_{i}.pt` files into one safetensors file, and that file into predictors.

    python -m converter.predictors.powerinfer SRC OUT

is the one place that reads pickled files: offline, with torch's weights-only reader (the extra `train`). Everything
else reads OUT: `layers.{i}.fc1.weight` F16 [r, d] and `layers.{i}.fc2.weight` F16 [I, r] of a network with ReLU between
and no bias, and the threshold in the file's metadata.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np

from converter.predictors.low_rank import LowRank, balanced
from flashsparse.errors import CheckpointError, ConvertError, FlashSparseError, UsageError
from flashsparse.pack.safetensors import Header, header_bytes, read_header, read_tensor

KIND = "powerinfer predictors"
_NAMES = ("fc1.weight", "fc2.weight")
_FLOATS = ("torch.float16", "torch.bfloat16", "torch.float32")
Shapes = dict[str, tuple[int, int]]  # of fc1.weight and fc2.weight


class Imported:
    """A converted file: `threshold` on the logits (0: PowerInfer's default), and one predictor per layer on demand."""

    def __init__(self, header: Header, threshold: float, layers: int) -> None:
        self.header, self.threshold, self.layers = header, threshold, layers

    def layer(self, index: int, gain: np.ndarray) -> LowRank:
        """The layer's predictor for FFN inputs x after the norm with weight `gain` [d]; see `fold_norm`."""
        fc1, fc2 = (read_tensor(self.header, f"layers.{index}.{name}").astype(np.float32) for name in _NAMES)
        return LowRank(*balanced(fold_norm(fc1, gain), fc2), relu=True)


def fold_norm(fc1: np.ndarray, gain: np.ndarray) -> np.ndarray:
    """fc1 [r, d] for the input after RMSNorm, from one for the residual before it, which PowerInfer's predictors take.

    x = gain * residual / rms, so fc1 residual = rms * (fc1 / gain) x: a positive factor per token, which ReLU and the
    second matrix, without biases, pass on. At threshold 0 the decisions are the same; any other threshold is one on
    logit / rms, so that it scales per token and should be calibrated anew. Inputs with gain 0 are lost after the norm:
    their columns become 0, and decisions that used them may differ. LayerNorm (OPT) subtracts a mean and cannot be
    folded.
    """
    return np.divide(fc1, gain, out=np.zeros_like(fc1), where=gain != 0)


def load_imported(path: str | os.PathLike[str], layers: int, hidden: int, intermediate: int) -> Imported:
    """Opens a converted file and checks it against the model: number of layers, d and I. Never unpickles.

    Raises CheckpointError naming the tensor, what was found and what is expected.
    """
    if Path(path).is_dir() or Path(path).suffix == ".pt":
        raise UsageError(f"{path}: found pickled predictors, expected the file that `{_COMMAND} SRC OUT` writes")
    header = read_header(path)
    if header.metadata.get("kind") != KIND:
        raise CheckpointError(f"{path}: found kind {header.metadata.get('kind')!r}, expected {KIND!r}")
    expected = {f"layers.{index}.{name}" for index in range(layers) for name in _NAMES}
    for name in sorted(expected ^ header.tensors.keys()):
        found = "no such tensor" if name in expected else "a tensor that the model has no layer for"
        raise CheckpointError(f"{path}: tensor {name!r}: found {found}, expected fc1 and fc2 of {layers} layers")
    for index in range(layers):
        infos = {name: header.tensors[f"layers.{index}.{name}"] for name in _NAMES}
        for info in infos.values():
            if info.dtype != "F16" or len(info.shape) != 2:
                raise CheckpointError(
                    f"{path}: tensor {info.name!r}: found {info.dtype} {list(info.shape)}, expected F16"
                )
        shapes = {name: (info.shape[0], info.shape[1]) for name, info in infos.items()}
        _check_shapes(f"{path}: layer {index}", shapes, hidden, intermediate)
    return Imported(header, _number(path, header.metadata.get("threshold", "")), layers)


def convert(src: str | os.PathLike[str], out: str | os.PathLike[str]) -> None:
    """Writes the predictors of directory `src` to the new file `out`, one layer in memory at a time.

    Reads `model_{i}.pt`, i from 0 without a gap, and `sparse_threshold` of `config.json` if there is one. Raises
    UsageError, CheckpointError for files that are not such predictors, ConvertError without torch or for weights
    beyond float16.
    """
    source, target = Path(src), Path(out)
    if os.path.lexists(target):
        raise ConvertError(f"{target}: exists; remove it or name another file")
    files, threshold = _files(source), _threshold(source / "config.json")
    shapes = [_shapes(file) for file in files]
    for file, found in zip(files, shapes, strict=True):
        _check_shapes(str(file), found, shapes[0]["fc1.weight"][1], shapes[0]["fc2.weight"][0])
    stored = {f"layers.{i}.{name}": ("F16", found[name]) for i, found in enumerate(shapes) for name in _NAMES}
    head = header_bytes(stored, metadata={"kind": KIND, "threshold": repr(threshold)})
    partial = target.with_name(f".{target.name}.partial")
    try:
        _write(partial, head, files)
        os.replace(partial, target)
    finally:
        partial.unlink(missing_ok=True)


def _write(partial: Path, head: bytes, files: list[Path]) -> None:
    with open(partial, "wb") as out:
        out.write(head)
        for path in files:
            state = _load(path)
            for name in _NAMES:
                out.write(_half(path, name, state[name]).data)


def _files(source: Path) -> list[Path]:
    if not source.is_dir():
        raise UsageError(f"{source}: expected a directory with model_0.pt, model_1.pt and so on")
    count = sum(1 for _ in source.glob("model_*.pt"))
    files = [source / f"model_{index}.pt" for index in range(count)]
    missing = [file.name for file in files if not file.is_file()] or ([] if files else ["model_0.pt"])
    if missing:
        raise CheckpointError(f"{source}: found {count} predictor files, expected {missing[0]} among them")
    return files


def _threshold(config: Path) -> float:
    if not config.is_file():
        return 0.0
    try:
        fields = json.loads(config.read_bytes())
    except ValueError as problem:
        raise CheckpointError(f"{config}: found no JSON ({problem}), expected an object") from None
    if not isinstance(fields, dict):
        raise CheckpointError(f"{config}: found {type(fields).__name__}, expected an object")
    return _number(config, fields.get("sparse_threshold", 0.0))


def _number(path: str | os.PathLike[str], value: Any) -> float:
    """Raises CheckpointError for what is not a finite number."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if isinstance(value, bool) or not math.isfinite(number):
        raise CheckpointError(f"{path}: found the threshold {value!r}, expected a finite number")
    return number


def _load(path: Path) -> dict[str, Any]:
    """The file's tensors by name, mapped rather than read where the file's format allows."""
    try:
        import torch
    except ImportError:
        raise ConvertError("reading .pt files needs torch: pip install 'flashsparse[train]'") from None
    try:
        try:
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError:  # written before torch 1.6: not a zip file, cannot be mapped
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as problem:  # torch raises many kinds for a malformed file; all mean that it is one
        reason = str(problem).splitlines()[0] if str(problem) else type(problem).__name__
        raise CheckpointError(f"{path}: cannot be read as weights: {reason}") from None
    if not isinstance(state, dict) or set(state) != set(_NAMES):
        found = sorted(map(str, state)) if isinstance(state, dict) else type(state).__name__
        raise CheckpointError(f"{path}: found {found}, expected the tensors {' and '.join(_NAMES)}")
    return state


def _shapes(path: Path) -> Shapes:
    state = _load(path)
    for name in _NAMES:
        shape, dtype = tuple(getattr(state[name], "shape", ())), str(getattr(state[name], "dtype", "no tensor"))
        if len(shape) != 2 or dtype not in _FLOATS:
            raise CheckpointError(f"{path}: {name}: found {dtype} {list(shape)}, expected a matrix of floats")
    return {name: (int(state[name].shape[0]), int(state[name].shape[1])) for name in _NAMES}


def _check_shapes(where: str, shapes: Shapes, hidden: int, intermediate: int) -> None:
    (rank, inputs), (outputs, inner) = shapes["fc1.weight"], shapes["fc2.weight"]
    if rank != inner or rank == 0 or (inputs, outputs) != (hidden, intermediate):
        raise CheckpointError(
            f"{where}: found fc1 {[rank, inputs]} and fc2 {[outputs, inner]}, "
            f"expected [rank, {hidden}] and [{intermediate}, rank]"
        )


def _half(path: Path, name: str, tensor: Any) -> np.ndarray:
    values = tensor.float().numpy()
    largest = float(np.abs(values).max())
    if not largest <= 65504:  # NaN fails too
        raise ConvertError(f"{path}: {name}: found a weight of {largest}, expected at most float16's 65504")
    return np.ascontiguousarray(values, "<f2")


_COMMAND = "python -m converter.predictors.powerinfer"


def main(arguments: list[str] | None = None) -> int:
    """The command. Prints an error on one line; 2 for a wrong request, 1 for what went wrong."""
    parser = argparse.ArgumentParser(prog=_COMMAND, description="Converts PowerInfer's predictors to safetensors.")
    parser.add_argument("src", help="directory with model_0.pt, model_1.pt, ... and perhaps config.json")
    parser.add_argument("out", help="the safetensors file to write; must not exist")
    given = parser.parse_args(arguments)
    try:
        convert(given.src, given.out)
    except (FlashSparseError, OSError) as problem:
        print(f"error: {problem}", file=sys.stderr)
        return 2 if isinstance(problem, UsageError) else 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
