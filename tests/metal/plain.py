"""A stand-in for `mx.fast.metal_kernel` that computes what the engine's kernels compute by plain MLX operators.

Quick, and late like a GPU: operands are read when the result is evaluated, not when it is asked for. What the kernels
themselves do is the harness's to run; here the path around them is tested.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np

from metal_kernels import candidates, select, sparse_ffn
from metal_kernels.records import ACTIVATIONS, FLOATS, FORMATS, Record, vectors

Arrays = dict[str, Any]
NAMES = {dtype: name for name, dtype in FLOATS.items()}


def _named(table: dict[str, int], number: int) -> str:
    return next(name for name, value in table.items() if value == number)


def _record(inputs: Arrays, template: Arrays) -> Record:
    gate, gate_bias, up, up_bias, down, d = np.array(inputs["layout"]).tolist()
    form = _named(FORMATS, template["FORMAT"])
    return Record(
        d=d,
        format=form,
        source=NAMES[template["S"]],
        down=down,
        up=up,
        gate=gate,
        gate_bias=gate_bias,
        up_bias=up_bias,
        group=template["GROUP"] if form in ("Q8", "Q4") else 0,
        activation=_named(ACTIVATIONS, template.get("ACTIVATION", 1)),
        param=float(np.array(inputs["param"])[0]) if "param" in inputs else 0.0,
        gated=bool(template.get("GATED", True)),
    )


def _hidden(inputs: Arrays, template: Arrays, call: Arrays) -> list[mx.array]:
    record, given = _record(inputs, template), [inputs.get("activated"), inputs.get("mask")]
    return [sparse_ffn.hidden_reference(record, inputs["slab"], inputs["offsets"], inputs["x"], *given)]


def _down(inputs: Arrays, template: Arrays, call: Arrays) -> list[mx.array]:
    record, n = _record(inputs, template), inputs["offsets"].shape[0]
    rows = vectors(record, inputs["slab"], inputs["offsets"], record.down)
    hidden = inputs["hidden"][:, inputs["cols"]]
    at, bounds = mx.arange(n)[None], inputs["bounds"]
    inside = (at >= bounds[:-1, None]) & (at < bounds[1:, None])
    chosen = mx.where(inside[:, None], hidden[None], mx.zeros((1, 1, 1)))
    made = chosen @ rows
    return [made + inputs["carry"] if "carry" in inputs else made]


def _gate(inputs: Arrays, template: Arrays, call: Arrays) -> list[mx.array]:
    form, source = _named(FORMATS, template["FORMAT"]), template["S"]
    if form in ("Q8", "Q4"):
        wide = [inputs[name].astype(mx.float32) for name in ("scales", "biases")]
        bits = int(form[1:])
        weight = mx.dequantize(inputs["weight"].view(mx.uint32), *wide, group_size=template["GROUP"], bits=bits)
    else:
        weight = inputs["weight"].view(source)
    name, param = _named(ACTIVATIONS, template["ACTIVATION"]), float(np.array(inputs["param"])[0])
    activated = select.gate_reference(weight, inputs["x"], name, param, inputs.get("bias"))
    return [activated, select.bits_reference(activated != 0)]


def _score_round(inputs: Arrays, template: Arrays, call: Arrays) -> list[mx.array]:
    """The rounded values in place of the integers; steps and totals stay unused."""
    rounded = select.rounded_reference(inputs["x"], template["GROUP"])
    return [rounded, mx.zeros((1,)), mx.zeros((1,))]


def _copy(inputs: Arrays, template: Arrays, prefix: str, names: tuple[str, str, str]) -> mx.array:
    """x · copyᵀ + bias."""
    weight, scales, biases = (inputs[name] for name in names)
    wide = scales.astype(mx.float32), biases.astype(mx.float32)
    group, bits = template["GROUP"], template["BITS"]
    made = mx.quantized_matmul(inputs["q"], weight, *wide, transpose=True, group_size=group, bits=bits)
    bias = inputs.get(f"{prefix}bias")
    return made if bias is None else made + bias


def _score(inputs: Arrays, template: Arrays, call: Arrays) -> list[mx.array]:
    scores = _copy(inputs, template, "", ("weight", "scales", "biases"))
    if template["MAGNITUDE"]:
        scores = mx.abs(scores * mx.sigmoid(scores))
    return [scores, select.bits_reference(~(scores < inputs["threshold"]))]


def _value(inputs: Arrays, template: Arrays, call: Arrays) -> list[mx.array]:
    name, param = _named(ACTIVATIONS, template["ACTIVATION"]), float(np.array(inputs["param"])[0])
    scores = _copy(inputs, template, "", ("weight", "scales", "biases"))
    made = mx.abs(sparse_ffn.activate(scores, name, param)) * inputs["norms"]
    if "up" in inputs:
        lifted = _copy(inputs, template, "up_", ("up", "up_scales", "up_biases"))
        made = made * mx.abs(mx.maximum(lifted, 0) if name == "drelu" else lifted)
    return [made, select.bits_reference(~(made < inputs["threshold"]))]


def _topk(inputs: Arrays, template: Arrays, call: Arrays) -> list[mx.array]:
    k, threshold = int(np.array(inputs["limits"])[0]), float(np.array(inputs["threshold"])[0])
    return [select.bits_reference(select.topk_reference(inputs["scores"], k, threshold))]


def _compact(inputs: Arrays, template: Arrays, call: Arrays) -> list[mx.array]:
    return list(select.compact_reference(inputs["bits"], int(np.array(inputs["limits"])[0])))


def _candidates_round(inputs: Arrays, template: Arrays, call: Arrays) -> list[mx.array]:
    """The values in place of the integers; the rest stays unused."""
    return [inputs["x"], *[mx.zeros((1,))] * 4]


def _candidates(inputs: Arrays, template: Arrays, call: Arrays) -> list[mx.array]:
    """With a wider limit than the reference's, whose bound leaves out what rounding takes."""
    parts = [inputs[name] for name in ("high", "low", "scales", "errors")]
    copy, limit = candidates.CompactCopy(*parts, inputs.get("bias")), float(np.array(inputs["figures"])[3])
    return [select.bits_reference(candidates.candidates_reference(copy, inputs["q"], limit - 1e-4))]


def _lookup(inputs: Arrays, template: Arrays, call: Arrays) -> list[mx.array]:
    return list(select.lookup_reference(*(inputs[name] for name in ("ids", "count", "slot_of", "begin", "slot_bytes"))))


KERNELS: dict[str, Callable[[Arrays, Arrays, Arrays], list[mx.array]]] = {
    "fs_sparse_ffn_hidden": _hidden,
    "fs_sparse_ffn_down": _down,
    "fs_sparse_ffn_sum": lambda inputs, template, call: [inputs["partial"].sum(axis=0).astype(template["T"])],
    "fs_gate": _gate,
    "fs_score_round": _score_round,
    "fs_score": _score,
    "fs_value": _value,
    "fs_topk": _topk,
    "fs_compact": _compact,
    "fs_lookup": _lookup,
    "fs_candidates_round": _candidates_round,
    "fs_candidates": _candidates,
}


@dataclass
class PlainKernel:
    """`calls` counts the launches."""

    compute: Callable[[Arrays, Arrays, Arrays], list[mx.array]]
    input_names: Sequence[str]
    calls: int = 0

    def __call__(self, inputs: Sequence[mx.array], template: Any = (), **call: Any) -> list[mx.array]:
        self.calls += 1
        return self.compute(dict(zip(self.input_names, inputs, strict=True)), dict(template or ()), call)


def metal_kernel(name: str, input_names: Sequence[str], output_names: Sequence[str], **rest: Any) -> PlainKernel:
    """Raises KeyError for a kernel that the engine does not use."""
    found = max((known for known in KERNELS if name.startswith(known)), key=len)
    return PlainKernel(KERNELS[found], input_names)
