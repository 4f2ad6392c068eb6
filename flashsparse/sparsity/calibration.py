"""A calibration as it is kept: one safetensors file and the JSON that describes it. Owns their names and their reading.

Who makes them is `converter.calibrate`; what the tensors are is in the description itself.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from flashsparse.errors import CheckpointError, UsageError
from flashsparse.pack.safetensors import Header, read_header, read_tensor
from flashsparse.sparsity.texts import file_sha256

FORMAT = "flashsparse-calibration"
VERSION = 1
DESCRIPTION = "calibration.json"
TENSORS = "calibration.safetensors"
MAX_BYTES = 64 << 20  # of the description


@dataclass(frozen=True)
class Calibration:
    """An opened calibration. `description` is the JSON: model, options, texts, meanings, a summary of each layer."""

    description: dict[str, Any]
    header: Header

    @property
    def layers(self) -> int:
        return int(self.description["model"]["layers"])

    def tensor(self, layer: int, name: str) -> np.ndarray | None:
        """A tensor of a layer, such as `frequency`; None where the calibration has none of that name."""
        key = f"layers.{layer}.{name}"
        return read_tensor(self.header, key) if key in self.header.tensors else None


def read_description(directory: str | os.PathLike[str]) -> dict[str, Any]:
    """The description of a calibration. Raises UsageError when there is none, CheckpointError when it is another's."""
    path = Path(directory) / DESCRIPTION
    try:
        with open(path, "rb") as file:
            value = json.loads(file.read(MAX_BYTES))
    except OSError as problem:
        raise UsageError(f"{path}: cannot be read: {problem.strerror}; make it with `flashsparse calibrate`") from None
    except (ValueError, RecursionError) as problem:
        raise CheckpointError(f"{path}: not JSON ({problem}); calibrate again") from problem
    found = (value.get("format"), value.get("version")) if isinstance(value, dict) else type(value).__name__
    if found != (FORMAT, VERSION):
        raise CheckpointError(f"{path}: found {found!r}, expected {(FORMAT, VERSION)}; calibrate again")
    return dict(value)


def open_calibration(directory: str | os.PathLike[str]) -> Calibration:
    """Opens a calibration and checks that its two files belong together; raises as `read_description` does."""
    description = read_description(directory)
    path = Path(directory) / TENSORS
    header = read_header(path, CheckpointError)
    if file_sha256(path) != description.get("tensors_sha256"):
        raise CheckpointError(f"{path}: not the file that {DESCRIPTION} describes; calibrate again")
    return Calibration(description, header)
