"""What a pack needs of memory, in bytes: the figures that the memory plan divides a budget by.

Upper bounds from the manifest and the options alone, decided before anything is loaded; nothing here allocates.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from flashsparse import memory
from flashsparse.cache import RECORD_BYTES, SLOT_BYTES
from flashsparse.compact import search_bytes
from flashsparse.errors import BudgetError
from flashsparse.flash.reader import STAGING_BYTES
from flashsparse.pack.codec import AT_ONCE, LENGTH_BYTES
from flashsparse.pack.safetensors import ALIGN
from flashsparse.rows import buffer_bytes, embedding_bytes
from flashsparse.sparsity.predictors import scratch_sizes
from flashsparse.weights import resident_bytes

if TYPE_CHECKING:
    from flashsparse.flash import FlashFile
    from flashsparse.memory import MemoryPlan
    from flashsparse.pack.manifest import Manifest

MAX_TILE_BYTES = 4 << 20  # larger ones leave the caches between reading and computing, and make a layer begin later
MIN_TILE_BYTES = 128 << 10
HIDDEN_WIDTH = 512  # records whose intermediate values are held at once for a full prefill chunk
MIN_CHUNK = 64  # tokens of a prompt that are computed at once, at least
PROMPT_SHARE = 16  # of what the smallest plan leaves over, that larger passes of a prompt may take
ACTIVATION_COPIES = 12  # arrays [chunk, d] alive at once in one layer of MLX modules, MLX's and ours
STAGING_SHARE = 64  # of a layer, that one request for several records brings at most
THREAD_BYTES = 16 << 10  # stack that a thread touches
KERNEL_BYTES = 200_000  # decoded rows and waiting sums, per compute thread
LAYER_BYTES = 100 << 10  # Python and MLX objects of one layer
PROCESS_BYTES = 512 << 10  # what Python, numpy and MLX allocate for themselves while running
ZSTD_BYTES = 1 << 20  # of a thread that decompresses, and its code
FLOOR_SLOTS = 64
NAMED_BYTES = 12  # its slot, its score as a hint, its place in a list, on a GPU (flashsparse.metal.walk)
LIST_BYTES = 48  # of the lists that a GPU reads, for each record in them (flashsparse.metal.places)
LOOKUP_BYTES = 64  # for each record of a layer that finds its records on the GPU, meanwhile (metal_kernels.select)
SEGMENTS = 16  # of the sums on a GPU (metal_kernels.sparse_ffn)


@dataclass(frozen=True)
class Passes:
    """How prompts are computed: `chunk` tokens at once, records streamed through two tiles of `tile_bytes`."""

    chunk: int
    tile_bytes: int


@dataclass(frozen=True)
class Sizes:
    """A pack that will run in `tier`. `files` are its open files: their sectors decide how far apart slots are.

    `unified`: on a GPU, which computes in memory of MLX's beside what the host keeps. `native`: whole layers run in
    native code, which says what it needs. `embeddings`: "memory", "flash", or "auto": on flash unless every record has
    a slot with the embedding in memory, or that would gain nothing.
    """

    manifest: Manifest
    files: list[FlashFile]
    tier: str
    threads: int
    io_threads: int
    unified: bool = False
    native: bool = False
    embeddings: str = "auto"

    def plan(
        self, runtime: int, dram: int | None, max_kv_size: int | None, slots: int | None
    ) -> tuple[MemoryPlan, Passes]:
        """The memory plan, and how prompts run in it. `slots`: that many in each layer, instead of what `dram` buys.

        Raises BudgetError and UsageError as `memory.make_plan` does.
        """
        asked = runtime, dram, max_kv_size, slots
        if self.embeddings != "auto":
            return self._plan(*asked, on_flash=self.embeddings == "flash")
        if self._rows_bytes() >= embedding_bytes(self.manifest):
            return self._plan(*asked, on_flash=False)
        try:
            plan, passes = self._plan(*asked, on_flash=False)
        except BudgetError:
            return self._plan(*asked, on_flash=True)
        if slots is not None and plan.holds_everything:
            return plan, passes
        other = self._plan(*asked, on_flash=True)
        return (replace(plan, floor=other[0].floor), passes) if plan.holds_everything else other

    def _plan(
        self, runtime: int, dram: int | None, max_kv_size: int | None, slots: int | None, on_flash: bool
    ) -> tuple[MemoryPlan, Passes]:
        needs = self._needs(runtime, max_kv_size, slots, on_flash)

        def plan_of(budget: int, passes: Passes) -> MemoryPlan:
            scratch = self.scratch_bytes(passes)
            return memory.make_plan(budget=budget, scratch=scratch, chunk=passes.chunk, **needs)

        # Unlimited once, to learn the floor with the smallest passes and what the whole model needs.
        least = plan_of(1 << 62, self.smallest_passes())
        if slots is not None:
            passes = self._passes_for(sum(least.slots) * least.slot_bytes)
            budget = least.floor + self.scratch_bytes(passes) - self.scratch_bytes(self.smallest_passes())
        else:
            most = memory.default_budget(1 << 62, runtime) if dram is None else dram
            passes = self._passes_for(max(0, most - least.floor))
            budget = memory.default_budget(plan_of(1 << 62, passes).needs_all, runtime) if dram is None else dram
        plan = plan_of(budget, passes)
        return (plan if slots is not None else replace(plan, floor=least.floor)), passes

    def _needs(self, runtime: int, max_kv_size: int | None, slots: int | None, on_flash: bool) -> dict[str, Any]:
        m, left = self.manifest, embedding_bytes(self.manifest) if on_flash else 0
        predictor = self._predictor_bytes()
        floor = 0 if self.tier == "dense" else FLOOR_SLOTS if slots is None else slots
        layers = m.predictor.layers if m.predictor is not None and self.tier == "predict" else ()
        densities = [layer.calibrated_density for layer in layers]
        if m.activity is not None:
            densities = list(m.activity.densities)
        return {
            "runtime": runtime,
            "resident": self._file_bytes("resident.safetensors", left) + predictor,
            "on_flash": left,
            "predictor": predictor,
            "kv_bytes_per_token": self._kv_bytes() + 32 * self.threads,  # and attention's scores, 8 at a time
            "max_kv_size": max_kv_size,
            "context_limit": int(m.config["max_position_embeddings"]),
            "overhead": PROCESS_BYTES
            + (LAYER_BYTES + (self._record_bytes() * m.intermediate_size if floor else 0)) * m.layers
            + self._codec_bytes()
            + (self._rows_bytes() if on_flash else 0)
            + THREAD_BYTES * (self.io_threads + self.threads)
            + self.staging_bytes() * self.io_threads
            + 64 * max(m.hidden_size, m.heads * m.head_dim) * self.threads,  # rows that the kernels decode
            "records": m.intermediate_size,
            "layers": m.layers,
            "slot_bytes": self._slot_bytes(),
            "table_bytes": SLOT_BYTES + (LIST_BYTES if self.unified else 0),
            "floor_slots": floor,
            "densities": densities if densities and None not in densities and slots is None else None,
            "whole": [index for index, layer in enumerate(layers) if layer.every],
        }

    def _codec_bytes(self) -> int:
        """Lengths of all records, and what decompressing takes: frames and values of the records of one call."""
        m = self.manifest
        lengths = LENGTH_BYTES * m.intermediate_size * m.layers
        return 0 if m.codec is None else lengths + 3 * AT_ONCE * m.record.bytes + ZSTD_BYTES * self.threads

    def staging_bytes(self) -> int:
        """Of each read thread, for requests that bring several records: little where a layer is small."""
        share = self._layer_bytes() // STAGING_SHARE // 4096 * 4096
        return min(max(share, 16 << 10), STAGING_BYTES)

    def _record_bytes(self) -> int:
        """For each record of a layer with slots: its slot; on a GPU that again, and what it takes to name it."""
        return RECORD_BYTES + (NAMED_BYTES if self.unified else 0)

    def begun_bytes(self) -> int:
        """What the read pool may have taken before anything else is allocated; a part of the plan's overhead."""
        return THREAD_BYTES * self.io_threads

    def _rows_bytes(self) -> int:
        """Of the rows in use, when the embedding stays on flash."""
        return buffer_bytes(self.manifest, max(file.sector for file in self.files))

    def _file_bytes(self, name: str, left: int = 0) -> int:
        """Memory for a file of which `left` bytes stay on flash: a matrix, and its scales and biases."""
        return resident_bytes(self.manifest.files[name].bytes - left, cuts=2 if left else 0)

    def _predictor_bytes(self) -> int:
        name = "predictor.safetensors"
        return self._file_bytes(name) if self.tier == "predict" and name in self.manifest.files else 0

    def _kv_bytes(self) -> int:
        """Keys and values of one token in all layers."""
        m = self.manifest
        return 2 * m.layers * m.kv_heads * m.head_dim * (4 if m.source_dtype == "F32" else 2)

    def _slot_bytes(self) -> int:
        from flashsparse.flash import slot_stride

        return max(slot_stride(self.manifest.record.stride, ALIGN, f.sector, f.direct) for f in self.files)

    def _layer_bytes(self) -> int:
        return self.manifest.intermediate_size * self.manifest.record.stride + ALIGN

    def smallest_passes(self) -> Passes:
        """What works in the smallest budget."""
        tile = min(self._layer_bytes(), max(MIN_TILE_BYTES, 4 * self._slot_bytes()))
        return Passes(min(MIN_CHUNK, self.manifest.prefill_chunk), tile)

    def _passes_for(self, spare: int) -> Passes:
        """Passes grow with what the floor leaves over: records in slots serve every token, passes only a prompt's."""
        least, share = self.smallest_passes(), spare // PROMPT_SHARE
        tile = max(least.tile_bytes, min(MAX_TILE_BYTES, self._layer_bytes(), share))
        chunk, most = self.manifest.prefill_chunk, self.scratch_bytes(least) + share
        while chunk > least.chunk and self.scratch_bytes(Passes(chunk, least.tile_bytes)) > most:
            chunk = max(least.chunk, chunk // 2)
        return Passes(chunk, tile)

    def hidden_floats(self, passes: Passes) -> int:
        """Intermediate values of the records that are computed at once."""
        return max(passes.chunk * HIDDEN_WIDTH, self.manifest.intermediate_size)

    def scratch_bytes(self, passes: Passes) -> int:
        """An upper bound of what one step allocates beside weights, KV cache and slots."""
        m = self.manifest
        width = max(m.hidden_size, m.heads * m.head_dim)
        floats = self.hidden_floats(passes) + passes.chunk * self._token_floats() + 12 * m.vocab_size
        kernels = 256 * (width + 512) + KERNEL_BYTES * self.threads  # 64 tokens as the products take them; their sums
        tiles = 2 * (passes.tile_bytes + 2 * ALIGN)
        return 4 * floats + passes.chunk * self._choice_bytes() + tiles + kernels + self._unified_bytes(passes)

    def _token_floats(self) -> int:
        """Activations of one token that are alive at once: of modules by MLX's count, of native layers by their own."""
        m = self.manifest
        heads, kv = m.heads * m.head_dim, m.kv_heads * m.head_dim
        if not self.native:
            return ACTIVATION_COPIES * max(m.hidden_size, heads)
        return (
            4 * m.hidden_size + 2 * (heads + kv) + m.head_dim
        )  # h, x, FFN's output, what ends a model; q, k, v; turns

    def _unified_bytes(self, passes: Passes) -> int:
        """What a step on a GPU takes beyond that, by design; no Mac has measured it.

        Lists of both tiles; a chunk's lists, masks and activations of the chosen records, which the host's kernels do
        not copy; the segments' sums, old and new.
        """
        if not self.unified:
            return 0
        m = self.manifest
        lists = 2 * LIST_BYTES * min(m.intermediate_size, passes.tile_bytes // m.record.bytes + 1)
        lists += LOOKUP_BYTES * m.intermediate_size
        choice = passes.chunk * (2 * m.intermediate_size + m.intermediate_size // 4) + 8 * m.intermediate_size
        return lists + choice + 12 * self.hidden_floats(passes) + 2 * 4 * SEGMENTS * passes.chunk * m.hidden_size

    def _choice_bytes(self) -> int:
        """Bytes per token of what decides which neurons are computed."""
        records = self.manifest.intermediate_size
        if self.tier != "predict":
            search = records + search_bytes(self.manifest.hidden_size)
            return {"full": 4 * records, "compact": search, "none": 0}[self.manifest.gate]
        extra = scratch_sizes(self.manifest)
        return (4 + 4 * extra.wide + 2) * records + 4 * extra.middle  # and two bytes: the mask, and its opposite
