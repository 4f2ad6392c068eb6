"""`convert --tier exact --calibrate`: how many neurons of each layer a token of the texts needs.

Takes one walk through the model, the one that measures an order where there is one. What follows for slots is the
memory plan's business.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from converter.order import Measured, measure_texts
from converter.plan import Plan
from converter.predict_options import DEFAULT_TOKENS, Given
from converter.walk import Progress
from flashsparse.errors import CheckpointError
from flashsparse.pack.activity import ActivitySpec
from flashsparse.pack.manifest import Manifest
from flashsparse.pack.safetensors import read_header, read_tensor
from flashsparse.sparsity.calibration import TENSORS, read_description
from flashsparse.sparsity.texts import file_sha256, text_digests


@dataclass(frozen=True)
class DensityOptions:
    """What to measure on."""

    texts: tuple[Path, ...]
    tokens: int
    window: int | None

    def choices(self) -> dict[str, Any]:
        """What a resumed conversion must agree on."""
        return {"calibrate": [[file_sha256(path) for path in self.texts], self.tokens, self.window]}


def density_options(found: Given, tier: str) -> tuple[DensityOptions | None, Given]:
    """What tier exact measures, and the options that are left for others."""
    if tier != "exact" or not found.calibrate:
        return None, found
    options = DensityOptions(found.calibrate, found.calibrate_tokens or DEFAULT_TOKENS, found.calibrate_window)
    return options, replace(found, calibrate=(), calibrate_tokens=None, calibrate_window=None)


def find_densities(plan: Plan, source: Path, work: Path, override: str | None, progress: Progress | None) -> Plan:
    """The plan with its activity; where an order was measured, `work` has it. Raises what calibration raises."""
    options = plan.density
    assert options is not None
    if plan.ordering is None or not plan.ordering.texts:
        measure_texts(Measured(options.texts, options.tokens, options.window), (), source, work, override, progress)
    header = read_header(work / TENSORS, CheckpointError)
    layers = range(plan.model.layers)
    means = [float(read_tensor(header, f"layers.{n}.frequency").mean(dtype="float64")) for n in layers]
    densities = tuple(round(mean, 6) for mean in means)
    tokens = int(read_description(work)["tokens"])
    return replace(plan, activity=ActivitySpec(text_digests(options.texts), tokens, densities))


def published_activity(plan: Plan, found: Manifest) -> tuple[str, Plan]:
    """The plan with the activity of a pack that exists, or how that differs from what was asked for."""
    asked = None if plan.density is None else text_digests(plan.density.texts)
    measured = None if found.activity is None else found.activity.texts
    if asked != measured or (found.activity and plan.density and found.activity.tokens > plan.density.tokens):
        return f"activity: found {measured} as its texts, expected {asked}", plan
    return "", replace(plan, activity=found.activity)
