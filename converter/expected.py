"""What a checkpoint would be as a pack, before it is there: the manifest that converting it would write.

Owns what stands in for the checkpoint's tensors and a fitted predictor; which tensors go where is the plan's decision.
Sizes of files are exact where config.json tells the type of the weights; nothing else of the files is known.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from converter.plan import Options, Plan, check_groups, choose_tier
from converter.predict import Fitted
from converter.predict_options import DEFAULT_BITS
from converter.source import CONFIG, SourceTensor, read_json
from flashsparse.models.config import NormalizedModel, normalize_config
from flashsparse.models.tensors import expected_shapes, has_output_bias
from flashsparse.pack.layout import FileEntry, Quant
from flashsparse.pack.manifest import Manifest
from flashsparse.pack.safetensors import TensorInfo, shape_bytes, storage_order
from flashsparse.sparsity.low_bit import fitting_group
from flashsparse.sparsity.spec import LayerSpec, PredictorSpec, Shape, predictor_tensors

_DTYPES = {"float32": "F32", "bfloat16": "BF16"}


def expected_manifest(directory: Path, tier: str, bits: int) -> Manifest:
    """The manifest of the checkpoint in `directory` (its config.json) as a pack of `tier` and `bits`.

    Raises CheckpointError, UnsupportedModelError and UsageError as converting it would.
    """
    model = normalize_config(read_json(directory / CONFIG))
    options = Options(bits=bits, tier=tier)
    shapes = expected_shapes(model.family, model.config, has_output_bias(model.source_model_type))
    dtype = _DTYPES.get(str(model.config["torch_dtype"]), "F16")
    plan = Plan(
        model=model,
        tier=choose_tier(tier, model),
        quant=None if bits == 16 else Quant(bits, options.group_size),
        source_dtype=dtype,
        sources={name: _stand_in(directory, name, dtype, shape) for name, shape in shapes.items()},
        shapes=shapes,
        copies=(),
        predictor=_predictor(model, shapes) if tier == "predict" else None,
    )
    check_groups(plan)
    manifest = plan.manifest(directory, {name: FileEntry(size, "") for name, size in plan.sizes.items()})
    vars(manifest)["config"] = model.config  # which it would read from a file that is not there
    return manifest


def _stand_in(directory: Path, name: str, dtype: str, shape: tuple[int, ...]) -> SourceTensor:
    return SourceTensor(directory, TensorInfo(name, dtype, shape, 0, shape_bytes(dtype, shape)))


def _predictor(model: NormalizedModel, shapes: dict[str, Any]) -> Fitted:
    """The default one, a copy of the scoring matrix."""
    layer = LayerSpec(bits=DEFAULT_BITS, group_size=fitting_group(model.hidden_size))
    spec = PredictorSpec("gate_copy", "threshold", "zero", None, (), 0, (layer,) * model.layers)
    biased = bool(model.config.get("mlp_bias", model.config.get("enable_bias")))
    shape = Shape(
        model.layers, model.hidden_size, model.intermediate_size, model.gated, gate_bias=biased, up_bias=biased
    )
    tensors = predictor_tensors(spec, shape)
    return Fitted(spec, {name: tensors[name] for name in storage_order(tensors)}, {})
