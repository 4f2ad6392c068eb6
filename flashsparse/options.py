"""The options of loading a pack, checked before anything is opened.

What each of them means is said where users give them (`flashsparse.load`); whether a budget can work is the plan's.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from flashsparse import memory
from flashsparse.arguments import integer, shown, whole
from flashsparse.errors import UsageError
from flashsparse.kernels import resolve
from flashsparse.models.decoder import CHOICES

if TYPE_CHECKING:
    from flashsparse.memory import MemoryPlan
    from flashsparse.pack.manifest import Manifest

READ_MODES = ("auto", "direct", "buffered")
LOOKAHEAD = ("auto", "on", "off", "token")
EMBEDDINGS = ("auto", "memory", "flash")
MAX_THREADS = max(256, os.cpu_count() or 1)  # more only wait for each other
MAX_IO_THREADS = 1024
MAX_SLOTS = 1 << 24


class LoadOptions:
    """The arguments of load(), checked."""

    def __init__(
        self,
        dram: str | int | None,
        max_kv_size: int | None,
        threads: int | None,
        io_threads: int | None,
        read_mode: str,
        kernels: str,
        on_plan: Callable[[MemoryPlan], None] | None,
        slots: int | None,
        tier: str | None,
        layers: str,
        lookahead: str,
        embeddings: str,
    ) -> None:
        if tier not in (None, "dense"):
            raise UsageError(f"tier: {shown(tier)} is not 'dense'; leave it out for the pack's own tier")
        if read_mode not in READ_MODES:
            raise UsageError(f"read_mode: {read_mode!r} is not one of {', '.join(READ_MODES)}")
        if layers not in CHOICES:
            raise UsageError(f"layers: {shown(layers)} is not one of {', '.join(CHOICES)}")
        if layers == "native" and kernels not in ("auto", "native"):
            raise UsageError(f"layers: 'native' needs the native kernels, not {shown(kernels)}")
        if lookahead not in LOOKAHEAD:
            raise UsageError(f"lookahead: {shown(lookahead)} is not one of {', '.join(LOOKAHEAD)}")
        if embeddings not in EMBEDDINGS:
            raise UsageError(f"embeddings: {shown(embeddings)} is not one of {', '.join(EMBEDDINGS)}")
        kernels = resolve(kernels, layers)
        if lookahead == "token" and kernels != "metal":
            raise UsageError(f"lookahead: 'token' saves read-backs from a GPU, kernels {kernels!r} have none; use 'on'")
        self.dram = None if dram is None else memory.budget_bytes(dram if isinstance(dram, str) else _whole_bytes(dram))
        self.max_kv_size = None if max_kv_size is None else whole("max_kv_size", max_kv_size, 1)
        self.threads = compute_threads(threads)
        self.io_threads = None if io_threads is None else whole("io_threads", io_threads, 1, MAX_IO_THREADS)
        self.slots = None if slots is None else whole("slots", slots, 1, MAX_SLOTS)
        self.read_mode, self.kernels, self.on_plan, self.tier = read_mode, kernels, on_plan, tier
        self.native_layers = layers != "modules" and kernels == "native"
        self.lookahead, self.embeddings = lookahead, embeddings

    def tier_of(self, manifest: Manifest) -> str:
        """The tier to run a pack in. Raises UsageError."""
        if self.tier == "dense" and manifest.tier == "exact":
            raise UsageError(
                f"{manifest.path}: tier exact computes the dense model's result already; leave out tier='dense'"
            )
        return self.tier or manifest.tier

    def embeddings_of(self, manifest: Manifest) -> str:
        """Where to keep a pack's embedding, or "auto". Raises UsageError."""
        if self.embeddings == "flash" and manifest.config["tie_word_embeddings"]:
            raise UsageError(
                f"{manifest.path}: the head is tied to the embedding, and every token needs the whole head: "
                "leave out embeddings='flash'"
            )
        return self.embeddings


def compute_threads(threads: int | None) -> int:
    """As asked for, or one per core. Raises UsageError."""
    return (os.cpu_count() or 1) if threads is None else whole("threads", threads, 1, MAX_THREADS)


def _whole_bytes(dram: Any) -> int:
    size = integer(dram)
    if size is None or size < 1:
        raise UsageError(f"dram is {shown(dram)}, expected a whole number of bytes, or text such as '7GB' or '50%'")
    return size
