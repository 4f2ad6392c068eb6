"""Engine: a pack loaded under a memory budget.

Owns loading and everything that conversations share: resident weights, slots, the read pool, kernels, counters. The
conversation itself (tokens, KV cache contents, sampling) is a Session's.
"""

from __future__ import annotations

import gc
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from flashsparse import memory
from flashsparse.arguments import integer, shown, whole
from flashsparse.errors import SessionError, UsageError
from flashsparse.memory import MemoryPlan
from flashsparse.stats import Counters, Stats

if TYPE_CHECKING:
    from flashsparse.ffn import Scratch, StreamedFFN
    from flashsparse.flash import ReadPool
    from flashsparse.kernels import Kernels
    from flashsparse.kvcache import KVCache
    from flashsparse.models.modules import Decoder
    from flashsparse.pack.manifest import Manifest
    from flashsparse.session import Session

READ_MODES = ("auto", "direct", "buffered")
MAX_THREADS = 1024
MAX_SLOTS = 1 << 24
MAX_TILE_BYTES = 32 << 20
MIN_TILE_BYTES = 128 << 10
HIDDEN_WIDTH = 512  # records whose intermediate values are held at once for a full prefill chunk
ACTIVATION_COPIES = 12  # arrays [chunk, d] alive at once in one layer, MLX's and ours
THREAD_BYTES = 16 << 10  # stack that a thread touches
LAYER_BYTES = 100 << 10  # Python and MLX objects of one layer
PROCESS_BYTES = 512 << 10  # what Python, numpy and MLX allocate for themselves while running


def load(
    path: str | os.PathLike[str],
    dram: str | int | None = None,
    max_kv_size: int | None = None,
    threads: int | None = None,
    io_threads: int = 16,
    read_mode: str = "auto",
    kernels: str = "auto",
    on_plan: Callable[[MemoryPlan], None] | None = None,
    slots: int | None = None,
) -> Engine:
    """Load a pack under a memory budget.

    Args:
        path: the pack's directory.
        dram: the budget, in bytes or as "7GB", "4GiB", "50%". None: half of the machine's memory or what the model
            needs, whichever is smaller, within a control group's limit.
        max_kv_size: positions (tokens) of KV cache to reserve. None: as many as leave room for one token's set.
        threads: compute threads. None: one per core. io_threads: threads that read from flash.
        read_mode: "direct" (past the operating system's cache), "buffered", or "auto": direct where it works.
        kernels: "native", "reference" (plain MLX operators, slow) or "auto".
        on_plan: called with the memory plan before anything is loaded.
        slots: slots per layer instead of what the budget buys (for tests and measurements).

    Raises:
        PackError, DamagedPackError: not a pack that this version can read.
        BudgetError: the budget cannot hold the floor; `smallest` says what would.
        UsageError: an option's value makes no sense. FlashReadError: reading the resident weights failed.
    """
    return Engine(path, _Options(dram, max_kv_size, threads, io_threads, read_mode, kernels, on_plan, slots))


class _Options:
    """The arguments of load(), checked."""

    def __init__(
        self,
        dram: str | int | None,
        max_kv_size: int | None,
        threads: int | None,
        io_threads: int,
        read_mode: str,
        kernels: str,
        on_plan: Callable[[MemoryPlan], None] | None,
        slots: int | None,
    ) -> None:
        if read_mode not in READ_MODES:
            raise UsageError(f"read_mode: {read_mode!r} is not one of {', '.join(READ_MODES)}")
        self.dram = dram if dram is None or isinstance(dram, str) else _whole_bytes(dram)
        self.max_kv_size = None if max_kv_size is None else whole("max_kv_size", max_kv_size, 1)
        self.threads = (
            min(os.cpu_count() or 1, MAX_THREADS) if threads is None else whole("threads", threads, 1, MAX_THREADS)
        )
        self.io_threads = whole("io_threads", io_threads, 1, MAX_THREADS)
        self.slots = None if slots is None else whole("slots", slots, 1, MAX_SLOTS)
        self.read_mode, self.kernels, self.on_plan = read_mode, kernels, on_plan


def _whole_bytes(dram: Any) -> int:
    size = integer(dram)
    if size is None or size < 1:
        raise UsageError(f"dram is {shown(dram)}, expected a whole number of bytes, or text such as '7GB' or '50%'")
    return size


class Engine:
    """A loaded pack. Use `session()` for a conversation; close it, or use it as a context manager."""

    def __init__(self, path: str | os.PathLike[str], options: _Options) -> None:
        from flashsparse.opening import open_pack

        self.counters = Counters()
        self._pid = os.getpid()
        self._lock = threading.Lock()  # held during a step, never between two
        self._owner: int | None = None  # the thread that holds it
        self._decoder: Decoder | None = None
        self._ffns: list[StreamedFFN] = []
        self._caches: list[KVCache] = []
        self._session: Session | None = None
        self._pool: ReadPool | None = None
        self._kernels: Kernels | None = None
        self._pack = open_pack(Path(path), options.read_mode)
        self.manifest: Manifest = self._pack.manifest
        # "direct" only when every file accepts it
        self.read_mode = "direct" if all(f.direct for f in self._pack.files) else "buffered"
        self.tokenizer = self._pack.tokenizer
        try:
            self._load(options)
        except BaseException:
            self.close()
            raise

    def _load(self, options: _Options) -> None:
        """Imports and the tokenizer came first: what they cost is `runtime`, not the engine's budget."""
        from flashsparse.flash import ReadPool
        from flashsparse.kernels import make_kernels

        self._kernels = make_kernels(options.kernels, self.manifest, options.threads)
        self.kernels = self._kernels.name
        memory.reset_peak()
        self.runtime_bytes = memory.footprint()
        began = time.perf_counter()
        self._pool = ReadPool(options.io_threads)
        self.plan = self._make_plan(options)
        if options.on_plan is not None:
            options.on_plan(self.plan)
        self._decoder = self._build()
        self.end_tokens = self._end_tokens()
        self.load_s = time.perf_counter() - began

    @property
    def context_limit(self) -> int:
        """Positions that the model was made for."""
        return int(self.manifest.config["max_position_embeddings"])

    @property
    def stats(self) -> Stats:
        """Everything since loading, counted as decode."""
        stats = self.new_stats()
        stats.decode = self.counters.copy()
        stats.peak_memory_bytes = self.peak_memory()
        return stats

    def session(self) -> Session:
        """Start a conversation. The plan reserves one KV cache, so there is one session at a time (SessionError)."""
        from flashsparse.session import Session

        with self.step():
            if self._session is not None:
                raise SessionError("this engine has a session already: close it first, the memory plan reserves one")
            for cache in self._caches:
                cache.offset = 0
            self._session = Session(self, self._caches)
            return self._session

    def release(self, session: Session) -> None:
        """Called inside `exclusive` for a session that ends."""
        session.detach()
        if self._session is session:
            self._session = None

    @contextmanager
    def step(self) -> Iterator[Decoder]:
        """Hold the engine for one step of this thread. Raises SessionError when it is in use, closed or forked."""
        if os.getpid() != self._pid:
            raise SessionError("the engine was loaded before a fork, and threads stay behind: load the pack again")
        if not self._lock.acquire(blocking=False):
            raise self._in_use()
        try:
            self._owner = threading.get_ident()
            if self._decoder is None:
                raise SessionError("the engine is closed; load the pack again")
            yield self._decoder
        finally:
            self._owner = None
            self._lock.release()

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        """Hold the engine, after the step that another thread is in. Raises SessionError inside a step of this one."""
        if self._owner == threading.get_ident():
            raise self._in_use()
        with self._lock:
            yield

    def _in_use(self) -> SessionError:
        if self._owner == threading.get_ident():
            return SessionError("the engine is in the middle of a step of this thread; wait for its result")
        return SessionError("the engine is in use by another thread; one thread at a time may use it")

    def peak_memory(self) -> int:
        """The process's peak footprint since loading began, in bytes (since its start where that cannot be reset)."""
        return memory.peak_footprint()

    def new_stats(self) -> Stats:
        return Stats(
            tier=self.manifest.tier,
            read_mode=self.read_mode,
            kernels=self.kernels,
            load_s=self.load_s,
            budget_bytes=self.plan.budget,
            runtime_bytes=self.runtime_bytes,
        )

    def observe(self, observer: Callable[[int, np.ndarray], None] | None) -> None:
        """Call `observer(layer, ids)` with the active neurons of every step of every layer (None: stop)."""
        for index, ffn in enumerate(self._ffns):
            ffn.observer = None if observer is None else lambda ids, index=index: observer(index, ids)

    def close(self) -> None:
        """Stop threads, close files, free the weights and the KV cache, after the step that another thread is in."""
        with self.exclusive():
            if self._session is not None:
                self.release(self._session)
            if self._pool is not None:
                self._pool.close()
            if self._kernels is not None:
                self._kernels.close()
            self._pack.close()
            self._decoder = self._kernels = self._pool = None
            self._ffns, self._caches = [], []
        gc.collect()  # modules and the layers inside them refer to each other

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _make_plan(self, options: _Options) -> MemoryPlan:
        from flashsparse.weights import resident_bytes

        m = self.manifest
        needs: dict[str, Any] = {
            "runtime": self.runtime_bytes,
            "resident": resident_bytes(m.files["resident.safetensors"].bytes),
            "kv_bytes_per_token": self._kv_bytes() + 32 * options.threads,  # and attention's scores, 8 at a time
            "max_kv_size": options.max_kv_size,
            "context_limit": self.context_limit,
            "overhead": PROCESS_BYTES
            + LAYER_BYTES * m.layers
            + THREAD_BYTES * (options.io_threads + options.threads)
            + 64 * max(m.hidden_size, m.heads * m.head_dim) * options.threads,  # rows that the kernels decode
            "records": m.intermediate_size,
            "layers": m.layers,
            "slot_bytes": self._slot_bytes(),
            "floor_slots": 64 if m.tier == "exact" else 0,
        }
        if options.slots is not None and m.tier == "exact":
            needs["floor_slots"] = options.slots
        # Unlimited once, to learn the floor with the smallest tiles and what the whole model needs.
        least = memory.make_plan(budget=1 << 62, scratch=self._scratch_bytes(self._smallest_tile()), **needs)
        budget = self._budget(options, least)
        self._tile_bytes = self._tile_for(max(0, budget - least.floor))
        return memory.make_plan(budget=budget, scratch=self._scratch_bytes(self._tile_bytes), **needs)

    def _budget(self, options: _Options, least: MemoryPlan) -> int:
        """The budget asked for. With `slots` given, exactly what holds them."""
        if options.slots is not None:
            return least.floor
        if options.dram is None:
            return memory.default_budget(least.needs_all, self.runtime_bytes)
        if isinstance(options.dram, int):
            return options.dram
        return memory.parse_size(options.dram, memory.machine_memory())

    def _kv_bytes(self) -> int:
        """Keys and values of one token in all layers."""
        m = self.manifest
        return 2 * m.layers * m.kv_heads * m.head_dim * (4 if m.source_dtype == "F32" else 2)

    def _slot_bytes(self) -> int:
        from flashsparse.flash import slot_stride
        from flashsparse.pack.safetensors import ALIGN

        return max(slot_stride(self.manifest.record.stride, ALIGN, f.sector, f.direct) for f in self._pack.files)

    def _smallest_tile(self) -> int:
        layer = self.manifest.intermediate_size * self.manifest.record.stride + 16384
        return min(layer, max(MIN_TILE_BYTES, 4 * self._slot_bytes()))

    def _tile_for(self, spare: int) -> int:
        """Tiles grow with what the floor leaves over; two of them take an eighth of it at most."""
        layer = self.manifest.intermediate_size * self.manifest.record.stride + 16384
        return max(self._smallest_tile(), min(MAX_TILE_BYTES, layer, spare // 16))

    def _hidden_floats(self) -> int:
        return max(self.manifest.prefill_chunk * HIDDEN_WIDTH, self.manifest.intermediate_size)

    def _scratch_bytes(self, tile_bytes: int) -> int:
        """An upper bound of what one step allocates beside weights, KV cache and slots."""
        m = self.manifest
        width = max(m.hidden_size, m.heads * m.head_dim)
        floats = self._hidden_floats() + m.prefill_chunk * width * ACTIVATION_COPIES + 12 * m.vocab_size
        if m.tier == "exact":
            floats += m.prefill_chunk * m.intermediate_size
        return 4 * floats + 2 * (tile_bytes + 2 * 16384)

    def _build(self) -> Decoder:
        import importlib

        import mlx.core as mx

        from flashsparse.kvcache import KVCache
        from flashsparse.weights import ResidentStore

        assert self._pool is not None and self._kernels is not None
        m = self.manifest
        # Freed buffers that MLX keeps for reuse count against the budget: allow one layer's activations.
        mx.set_cache_limit(4 * m.prefill_chunk * m.hidden_size * 4)
        store = ResidentStore(m, self._pack.headers[0], self._pool, self._pack.files[0])
        family = importlib.import_module(f"flashsparse.models.{m.family}")
        scratch = self._make_scratch()
        self._ffns = [self._layer(i, store, family, scratch) for i in range(m.layers)]
        self._caches = [KVCache(m.kv_heads, m.head_dim, self.plan.max_kv_size, m.source_dtype) for _ in range(m.layers)]
        decoder: Decoder = family.build(m.config, store, self._kernels, self._ffns)
        return decoder

    def _make_scratch(self) -> Scratch:
        from flashsparse.ffn import Scratch, Tiles
        from flashsparse.weights import Buffer

        m = self.manifest
        nbytes = self._tile_bytes
        return Scratch(
            scores=np.empty((m.prefill_chunk, m.intermediate_size), np.float32) if m.tier == "exact" else None,
            hidden=np.empty(self._hidden_floats(), np.float32),
            out=np.empty((m.prefill_chunk, m.hidden_size), np.float32),
            tiles=Tiles((Buffer(nbytes), Buffer(nbytes)), nbytes),
        )

    def _layer(self, index: int, store: Any, family: Any, scratch: Scratch) -> StreamedFFN:
        from flashsparse.cache import SlotTable
        from flashsparse.ffn import Flash, StreamedFFN
        from flashsparse.weights import Buffer

        assert self._pool is not None and self._kernels is not None
        m, slots = self.manifest, self.plan.slots[index]
        file, header = self._pack.files[index + 1], self._pack.headers[index + 1]
        flash = Flash(file, header.data_offset, m.intermediate_size, m.record.bytes, m.record.stride)
        ffn = StreamedFFN(self._kernels, self._pool, flash, scratch, self.counters)
        ffn.down_bias = store.vector(family.DOWN.format(index) + ".bias")
        if m.tier == "exact":
            ffn.scoring = store.weight(family.SCORING.format(index))
            ffn.scoring_bias = store.vector(family.SCORING.format(index) + ".bias")
            ffn.table = SlotTable(m.intermediate_size, slots)
            ffn.slot_bytes = self.plan.slot_bytes
            ffn.slab = Buffer(slots * ffn.slot_bytes)
        return ffn

    def _end_tokens(self) -> set[int]:
        """Tokens that end a reply: the tokenizer's, or the configuration's without one."""
        if self.tokenizer is not None:
            return set(self.tokenizer.eos_token_ids)
        stated = self.manifest.config.get("eos_token_id")
        return set(stated) if isinstance(stated, list) else set() if stated is None else {stated}
