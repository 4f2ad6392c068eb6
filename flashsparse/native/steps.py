"""One token's step through all layers as one Python call; src/step.h says what happens in which order.

Owns what describes the layers to the library, and keeps what it refers to alive. Calls come back between layers when
they take long, so that an interrupt of the caller is noticed; the step can then go on. Wrong arrays: ValueError.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from ctypes import c_float, c_int32, c_int64, c_void_p
from dataclasses import dataclass

import numpy as np

from flashsparse.native.compact import Compact
from flashsparse.native.kernels import Matrix, Record, Workers, _address
from flashsparse.native.layers import CNorm, Layer, Norm
from flashsparse.native.library import lib
from flashsparse.native.rounds import FIGURES, Hint, LayerRounds, Rounds

PATIENCE_NS = 100_000_000  # a call that has taken so long comes back after the layer it is in
_ACTIVE, _SCORED, _CANDIDATES = range(3)


class CChoice(ctypes.Structure):
    """fs_choice."""

    _fields_ = [
        *((name, c_void_p) for name in ("scoring", "bias", "compact", "values", "mask")),
        ("k", c_int64),
        ("threshold", c_float),
        ("param", c_float),
        ("kind", c_int32),
        ("activation", c_int32),
    ]


class CStepLayer(ctypes.Structure):
    """fs_step_layer."""

    _fields_ = [
        *((name, c_void_p) for name in ("attention", "keys", "values", "home", "choice", "hint", "down_bias")),
        ("closing", CNorm),
        ("ids", c_void_p),
        ("chosen", c_int64),
    ]


class CStep(ctypes.Structure):
    """fs_step."""

    _fields_ = [
        ("layers", c_void_p),
        ("at", c_int64),
        ("end", c_int64),
        *((name, c_void_p) for name in ("record", "h", "x", "y", "scratch", "hidden", "turns")),
        *((name, c_int64) for name in ("width", "capacity", "offset")),
        ("residual", c_float),
        *((name, c_int32) for name in ("after_residual", "hints", "count_fired")),
        ("attention_ns", c_int64),
        ("ffn_ns", c_int64),
    ]


class Chosen:
    """How a layer's neurons are chosen for one token; made by `active`, `scored` or `candidates`."""

    def __init__(self, c: CChoice, *keep: object) -> None:
        self._c, self._keep = c, keep
        self.address = ctypes.addressof(c)

    @classmethod
    def active(
        cls, scoring: Matrix, bias: np.ndarray | None, values: np.ndarray, activation: int, param: float
    ) -> Chosen:
        """Those whose activation of scoring · x + bias is not zero; values [records] float32 is scratch."""
        c = CChoice(*_product(scoring, bias, values), kind=_ACTIVE, activation=activation, param=param)
        return cls(c, scoring, bias, values)

    @classmethod
    def scored(
        cls,
        scoring: Matrix,
        bias: np.ndarray | None,
        values: np.ndarray,
        mask: np.ndarray,
        threshold: float,
        k: int | None,
    ) -> Chosen:
        """Those that `native.select` finds in `native.score`'s scores; values and mask [records] are scratch."""
        c = CChoice(*_product(scoring, bias, values), kind=_SCORED, threshold=threshold, k=k or 0)
        c.mask = _address(mask, np.uint8, (scoring.rows,), "mask")
        return cls(c, scoring, bias, values, mask)

    @classmethod
    def candidates(cls, copy: Compact, mask: np.ndarray, activation: int, param: float) -> Chosen:
        """Those that `compact.candidates` names; mask [records] uint8 is scratch."""
        c = CChoice(compact=ctypes.addressof(copy.c), kind=_CANDIDATES, activation=activation, param=param)
        c.mask = _address(mask, np.uint8, (copy.rows,), "mask")
        return cls(c, copy, mask)


def _product(scoring: Matrix, bias: np.ndarray | None, values: np.ndarray) -> tuple[int, int | None, None, int]:
    rows = (scoring.rows,)
    bias_at = None if bias is None else _address(bias, np.float32, rows, "bias")
    return ctypes.addressof(scoring.c), bias_at, None, _address(values, np.float32, rows, "values")


@dataclass(frozen=True)
class Described:
    """One layer. hint: how its reads are begun by the layer before. down_bias [d]; closing: the norm behind it."""

    attention: Layer
    rounds: LayerRounds
    chosen: Chosen
    hint: Hint | None
    down_bias: np.ndarray | None
    closing: Norm | None


@dataclass(frozen=True)
class Shared:
    """What the layers share, float32: h, x, y [d], scratch of attention and, flat, of hidden values.

    `residual` multiplies what an FFN adds to h; after_residual: the FFN's input is h, not x. `fired`: count values that
    are not zero.
    """

    h: np.ndarray
    x: np.ndarray
    y: np.ndarray
    scratch: np.ndarray
    hidden: np.ndarray
    residual: float
    after_residual: bool
    fired: bool


class Steps:
    """The layers of a model; None: one that is none of the library's."""

    def __init__(
        self, workers: Workers, rounds: Rounds, record: Record, layers: Sequence[Described | None], of: Shared
    ) -> None:
        d, known = record.d, [layer for layer in layers if layer is not None]
        self._workers, self._rounds, self._record, self._described, self._shared = workers, rounds, record, layers, of
        self._ids = [np.empty(max(layer.rounds.records for layer in known), np.int32)] * len(layers)
        self._layers = (CStepLayer * len(layers))()
        for at, layer in enumerate(layers):
            if layer is not None:
                self._layers[at] = _describe(layer, of.h, d)
        self._c = CStep(
            ctypes.addressof(self._layers), 0, 0, ctypes.addressof(record.c),
            *(_address(getattr(of, name), np.float32, (d,), name) for name in "hxy"),
            _address(of.scratch, np.float32, of.scratch.shape, "scratch"),
            _address(of.hidden, np.float32, of.hidden.shape, "hidden"),
            width=len(of.hidden), residual=of.residual, after_residual=of.after_residual, count_fired=of.fired,
        )  # fmt: skip
        self._at, self._run = ctypes.addressof(self._c), lib().fs_step_run
        self._place_ids()

    def place(self, caches: Sequence[tuple[int, int]], capacity: int) -> None:
        """Where each layer's keys and values [kv_heads, capacity, head_dim] are from now on."""
        for layer, (keys, values) in zip(self._layers, caches, strict=True):
            layer.keys, layer.values = keys, values
        self._c.capacity = capacity

    def keep_ids(self) -> None:
        """Let each layer have numbers of its own from now on, so that `ids` tells every layer's."""
        self._ids = [np.empty_like(ids) for ids in self._ids]
        self._place_ids()

    def begin(self, first: int, end: int, offset: int, turns: int | None, hints: bool) -> None:
        """Begin at a layer, to run to `end`, at this position of the caches. hints: begin each next layer's reads."""
        self._c.at, self._c.end, self._c.offset, self._c.turns, self._c.hints = first, end, offset, turns, hints
        self._c.attention_ns = self._c.ffn_ns = 0
        for layer in self._layers[first:end]:
            layer.chosen = -1

    def go_on(self, count: Callable[[list[int]], None]) -> None:
        """Run some layers; `count` is given their figures, as of LayerRounds.run.

        Raises FlashReadError, after which the step cannot go on.
        """
        shared = self._rounds
        status = self._run(shared.handle, self._workers.handle, self._at, PATIENCE_NS, shared.tally_at)
        told = shared.tell()
        count(told[:FIGURES])
        if status:
            failed = self._described[self._c.at]
            assert failed is not None
            shared.check(status, failed.rounds, told)

    @property
    def over(self) -> bool:
        return bool(self._c.at == self._c.end)

    @property
    def seconds(self) -> tuple[float, float]:
        """In attention, and in the FFNs without hints, since `begin`."""
        return self._c.attention_ns / 1e9, self._c.ffn_ns / 1e9

    def ids(self, layer: int) -> np.ndarray | None:
        """The records of a layer that the token needed, ascending; None: it came not so far. See `keep_ids`."""
        chosen = self._layers[layer].chosen
        return None if chosen < 0 else self._ids[layer][:chosen]

    def _place_ids(self) -> None:
        for layer, ids in zip(self._layers, self._ids, strict=True):
            layer.ids = ids.ctypes.data


def _describe(layer: Described, h: np.ndarray, d: int) -> CStepLayer:
    bias = None if layer.down_bias is None else _address(layer.down_bias, np.float32, (d,), "down_bias")
    return CStepLayer(
        layer.attention.address, None, None, layer.rounds.address, layer.chosen.address,
        None if layer.hint is None else layer.hint.of(h.reshape(1, d)).address, bias,
        CNorm() if layer.closing is None else layer.closing.c,
    )  # fmt: skip
