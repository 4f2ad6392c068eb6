"""Engine: a pack loaded under a memory budget.

Owns loading and everything that conversations share: resident weights, slots, the read pool, kernels, counters. How
its parts are built is building.py's; the conversation itself (tokens, KV cache contents, sampling) is a Session's.
"""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from flashsparse import macos, memory
from flashsparse.building import Building, end_tokens, make_kernels
from flashsparse.drive import drive_rate, start_limit
from flashsparse.errors import FlashReadError, SessionError, UsageError
from flashsparse.memory import MemoryPlan
from flashsparse.options import LoadOptions
from flashsparse.stats import DRIFT_TOKENS, Counters, Drift, Stats
from flashsparse.turns import Turns

if TYPE_CHECKING:
    from flashsparse.ffn import StreamedFFN
    from flashsparse.flash import ReadPool
    from flashsparse.flash.curve import Curve
    from flashsparse.judging import Judging
    from flashsparse.kernels import Kernels
    from flashsparse.kvcache import KVCache
    from flashsparse.models.decoder import Decoder
    from flashsparse.opening import OpenPack
    from flashsparse.pack.manifest import Manifest, Quant
    from flashsparse.session import Session
    from flashsparse.sizes import Passes
    from flashsparse.sparsity.judgement import LayerJudgement
    from flashsparse.touching import Touching
    from flashsparse.weights import Buffer


def load(
    path: str | os.PathLike[str],
    dram: str | int | None = None,
    max_kv_size: int | None = None,
    threads: int | None = None,
    io_threads: int | None = None,
    read_mode: str = "auto",
    kernels: str = "auto",
    on_plan: Callable[[MemoryPlan], None] | None = None,
    slots: int | None = None,
    tier: str | None = None,
    layers: str = "auto",
    lookahead: str = "auto",
    embeddings: str = "auto",
) -> Engine:
    """Load a pack under a memory budget.

    Args:
        path: the pack's directory.
        dram: the budget, in bytes or as "7GB", "4GiB", "50%". None: half of the machine's memory or what the model
            needs, whichever is smaller, within a control group's limit.
        max_kv_size: positions (tokens) of KV cache to reserve. None: as many as leave room for one token's set.
        threads: compute threads. None: one per core.
        io_threads: threads that read from flash; direct reads on Linux are begun by a quarter as many, twice as many in
            flight. None: what the drive's curve asks for, 16 where it has none.
        read_mode: "direct" (past the operating system's cache), "buffered", or "auto": direct where it works,
            unless the drive's curve finds buffered reads faster.
        kernels: "native" (CPU), "metal" (Apple GPU), "reference" (plain MLX operators, slow) or "auto": metal where
            MLX's default device is an Apple GPU, else native.
        on_plan: called with the memory plan before anything but the resident weights is loaded.
        slots: slots per layer instead of what the budget buys (for tests and measurements).
        layers: "native" runs whole decoder layers in native code, "modules" mlx-lm's model with our parts in it (what
            the reference kernels take part in); "auto" is native where the kernels are.
        lookahead: "on" starts a layer's reads before its attention, from a state before it; "auto" does when that
            measures faster, "off" never; "token" (Metal) plans all layers at once and reads back once a token. Results
            are the same.
        embeddings: "flash" reads a token's row of the embedding when it is needed, "memory" keeps all rows in memory;
            "auto" does that where every record has a slot with it, and where the head is tied to the embedding. Results
            are the same.
        tier: "dense" runs a pack of tier predict without its predictor: every layer streamed, the dense model's result.

    Raises:
        PackError, DamagedPackError: not a pack that this version can read.
        BudgetError: the budget cannot hold the floor; `smallest` says what would.
        UsageError: an option's value makes no sense. FlashReadError: reading the resident weights failed, as far as
            they had been read; of native layers the later ones are read while the first step computes, which raises it.
    """
    asked = (dram, max_kv_size, threads, io_threads, read_mode, kernels, on_plan, slots, tier, layers, lookahead)
    return Engine(path, LoadOptions(*asked, embeddings))


class Engine:
    """A loaded pack. Use `session()` for a conversation; close it, or use it as a context manager."""

    def __init__(self, path: str | os.PathLike[str], options: LoadOptions) -> None:
        from flashsparse.machine import curve_notes, known_curve, read_mode
        from flashsparse.opening import open_pack

        self._began = time.perf_counter()
        self.counters = Counters()
        self._turns = Turns()
        self._decoder: Decoder | None = None
        self._ffns: list[StreamedFFN] = []
        self._caches: list[KVCache] = []
        self._session: Session | None = None
        self._pool: ReadPool | None = None
        self._kernels: Kernels | None = None
        self._judging: Judging | None = None
        self._relief = macos.Relief(self._hold)
        self._touching: Touching | None = None
        self._slabs: list[Buffer | None] = []
        self._threads = options.threads
        self.layers = "native" if options.native_layers else "modules"
        self.kernels = options.kernels
        self._pack: OpenPack | None = None
        self._curve = curve = known_curve(Path(path))
        self.notes = curve_notes(curve)  # what a user should know about this machine before it reads
        try:
            self._pack = open_pack(
                Path(path),
                read_mode(options.read_mode, curve),
                not options.native_layers,
                lambda pack: self._begin(pack, options, curve),
            )
            # "direct" only when every file accepts it
            self.read_mode = "direct" if all(f.direct for f in self._pack.files) else "buffered"
            self.tokenizer = self._pack.tokenizer
            self._load(self._pack, options)
        except BaseException:
            self.close()
            raise

    def _begin(self, pack: OpenPack, options: LoadOptions, curve: Curve | None) -> None:
        """Start reading what stays in memory, which needs none of the libraries and takes longest."""
        from flashsparse.flash import ReadPool
        from flashsparse.loading import Loading
        from flashsparse.machine import read_threads
        from flashsparse.models.tensors import embedding_tensors
        from flashsparse.pack.predictor import predictor_quant
        from flashsparse.sizes import Sizes
        from flashsparse.weights import Buffer, ResidentStore

        self.manifest: Manifest = pack.manifest
        self.tier = options.tier_of(self.manifest)
        record = self.manifest.record
        if self.kernels == "metal" and self.manifest.codec is not None:
            raise UsageError(
                "compressed records are read on the CPU only: use kernels='native', or convert without codec"
            )
        io_threads = read_threads(
            options.io_threads, curve, record.bytes, record.stride * self.manifest.intermediate_size
        )
        unified = self.kernels == "metal"
        embeddings, native = options.embeddings_of(self.manifest), options.native_layers and not unified
        sizes = Sizes(self.manifest, pack.files, self.tier, options.threads, io_threads, unified, native, embeddings)
        # The plan that counts is made when `runtime` is known; a budget that cannot work is refused before reading.
        plan, _ = sizes.plan(memory.footprint(), options.dram, options.max_kv_size, options.slots)
        self.embeddings = "flash" if plan.on_flash else "memory"
        self._sizes = replace(sizes, embeddings=self.embeddings)
        if self._pool is None:
            self._pool = ReadPool(io_threads, self._sizes.staging_bytes())
        quants: dict[int, Mapping[str, Quant]] = {0: self.manifest.resident_quant}
        if self.tier == "predict" and pack.predictor is not None:
            quants[pack.predictor] = predictor_quant(self.manifest)
        for at, quant in quants.items():
            left = embedding_tensors(self.manifest) if plan.on_flash and at == 0 else ()
            pack.stores.append(ResidentStore(pack.headers[at], pack.files[at], quant, unified, left))
        pack.loading = Loading(self._pool, pack.stores, self.manifest.layers)
        if options.dram is not None:  # else the budget may depend on what the libraries take
            self._touch([Buffer(slots * plan.slot_bytes) if slots else None for slots in plan.slots])

    def _load(self, pack: OpenPack, options: LoadOptions) -> None:
        """Plan and build. `runtime` is what imports and the tokenizer cost, the footprint less what was read then."""
        from flashsparse.loading import FIRST
        from flashsparse.prefetch import Switch

        assert pack.loading is not None
        self._kernels = make_kernels(self.kernels, self.manifest, options.threads, self.counters)
        pack.loading.wait(FIRST if self._sizes.native else None)
        begun = self._sizes.begun_bytes() + (0 if self._touching is None else self._touching.close())
        with pack.loading.still() as taken:
            memory.reset_peak()
            self.runtime_bytes = memory.footprint() - begun - taken
        self.plan, passes = self._sizes.plan(self.runtime_bytes, options.dram, options.max_kv_size, options.slots)
        if options.on_plan is not None:
            options.on_plan(self.plan)
        macos.wire(self.plan.budget)
        self._relief.open()
        self._switch = Switch(options.lookahead, self.counters)
        self._decoder = self._build(pack, passes)
        self._touch([ffn.slab for ffn in self._ffns])
        self.end_tokens = end_tokens(self.tokenizer, self.manifest)
        self.load_s = time.perf_counter() - self._began

    def _touch(self, slabs: list[Buffer | None]) -> None:
        """Take the memory of all layers' slots from the system, beside whatever else is done."""
        from flashsparse.touching import Touching, for_this_system

        if self._touching is not None:
            self._touching.close()
        if self.kernels == "native" and for_this_system():
            self._slabs, self._touching = slabs, Touching([slab.bytes for slab in slabs if slab is not None])

    @property
    def drive_measured(self) -> bool:
        """Whether reading follows a measured curve of the pack's drive."""
        return self._curve is not None

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
        """Hold the engine for one step of this thread. Raises SessionError when it is in use, closed or forked.

        And FlashReadError when resident weights could not be read: the engine is closed then.
        """
        try:
            with self._step() as decoder:
                yield decoder
        except FlashReadError:
            if self._pack is not None and self._pack.loading is not None and self._pack.loading.failed:
                self.close()
            raise

    @contextmanager
    def _step(self) -> Iterator[Decoder]:
        with self._turns.take():
            if self._decoder is None:
                raise SessionError("the engine is closed; load the pack again")
            self._relief.step()
            computed, reading, loaded = self._computed(), self._reading(), self._loaded()
            yield self._decoder
            self.counters.compute_s += self._computed() - computed
            if loaded:  # else the pool reads weights too, which `flash_bytes` leaves out
                self._count_reading(reading)

    def _loaded(self) -> bool:
        """Whether all resident weights are there."""
        return self._pack is None or self._pack.loading is None or self._pack.loading.over

    def _computed(self) -> float:
        """Seconds that this thread has spent in kernels that count them."""
        from flashsparse.native.layers import compute_seconds

        return compute_seconds() if self.kernels == "native" else 0.0

    def _reading(self) -> tuple[float, float]:
        """Seconds in which the pool was reading, and of all of its reads together."""
        done = None if self._pool is None else self._pool.counters
        return (0.0, 0.0) if done is None else (done.active_s, done.busy_s)

    def _count_reading(self, before: tuple[float, float]) -> None:
        reading_s, in_flight_s = self._reading()
        self.counters.reading_s += reading_s - before[0]
        self.counters.in_flight_s += in_flight_s - before[1]

    def exclusive(self) -> AbstractContextManager[None]:
        """Hold the engine, after the step that another thread is in. Raises SessionError inside a step of this one."""
        return self._turns.wait()

    def _hold(self, on: bool) -> None:
        for ffn in self._ffns:
            ffn.hold(on)

    def peak_memory(self) -> int:
        """The process's peak footprint since loading began, in bytes (since its start where that cannot be reset)."""
        return memory.peak_footprint()

    def new_stats(self) -> Stats:
        spec = self.manifest.predictor if self.tier == "predict" else None
        return Stats(
            tier=self.tier,
            read_mode=self.read_mode,
            kernels=self.kernels,
            load_s=self.load_s,
            budget_bytes=self.plan.budget,
            runtime_bytes=self.runtime_bytes,
            embeddings=self.embeddings,
            calibrated_density=None if spec is None else spec.calibrated_density,
            lookahead=self._switch.to_dict,
            start_limit=lambda cost: start_limit(self.plan.resident, cost, self._curve),
            drive=lambda cost: drive_rate(cost, self._curve, self.read_mode),
        )

    def observe(self, observer: Callable[[int, np.ndarray], None] | None) -> None:
        """Call `observer(layer, ids)` with the neurons that each step of each layer computes (None: stop)."""
        for index, ffn in enumerate(self._ffns):
            ffn.observer = None if observer is None else lambda ids, index=index: observer(index, ids)

    def set_dense(self, flag: bool) -> None:
        """While on, every layer of tier predict is streamed whole: the dense model's result, in the same sessions.

        The other tiers give that anyway. Raises SessionError inside a step of this thread.
        """
        with self.exclusive():
            for ffn in self._ffns:
                ffn.dense = flag and self.tier == "predict"

    def judge(self, observer: Callable[[LayerJudgement], None] | None) -> None:
        """Call `observer` with what each step of each layer predicted and what was true (None: stop).

        Every record of every layer is streamed meanwhile; results are the same bits as without. In tier exact what is
        predicted is what is active, or with a compact gate the candidates. What judging allocates (a few arrays [T, I],
        compute threads, decoded tiles) is outside the memory budget and is freed with it. Raises UsageError in tier
        dense, where nothing is predicted, and with kernels metal, SessionError inside a step of this thread.
        """
        from flashsparse.judging import Judging

        if self.kernels == "metal":
            raise UsageError("judging computes on the CPU: load the pack with kernels='native'")
        if self.tier == "dense":
            raise UsageError("tier dense computes every neuron: there is no prediction to judge")
        with self.exclusive():
            if self._judging is not None:
                self._judging.close()
            self._judging = None
            if observer is not None and self._kernels is not None:
                self._judging = Judging(self.manifest, self._kernels, self._threads, observer)
            for ffn in self._ffns:
                ffn.judging = self._judging

    def drift(self) -> Drift | None:
        """Realised over calibrated density of the tokens decoded so far.

        Of the layers that are not computed whole. None in other tiers than predict, without calibration, and before 64
        tokens.
        """
        spec = self.manifest.predictor if self.tier == "predict" else None
        decoded = max((ffn.decoded for ffn in self._ffns), default=0)
        if spec is None or not spec.calibrated_density or decoded < DRIFT_TOKENS:
            return None
        pairs = decoded * self.manifest.intermediate_size
        realised = [ffn.decoded_neurons / pairs for ffn in self._ffns]
        # A layer that is computed whole cannot drift: counted, it would hide that the others do.
        expected = [0.0 if layer.every else layer.density or 0.0 for layer in spec.layers]
        if not any(expected):
            return None
        counted = sum(found for found, layer in zip(realised, spec.layers, strict=True) if not layer.every)
        layers = tuple(found / share if share else None for found, share in zip(realised, expected, strict=True))
        return Drift(counted / sum(expected), layers)

    def close(self) -> None:
        """Stop threads, close files, free the weights and the KV cache, after the step that another thread is in."""
        with self.exclusive():
            self._relief.close()
            if self._touching is not None:
                self._touching.close()
            if self._session is not None:
                self.release(self._session)
            if self._pool is not None:
                self._pool.close()
            if self._kernels is not None:
                self._kernels.close()
            if self._judging is not None:
                self._judging.close()
            if self._pack is not None:
                self._pack.close()
            self._decoder = self._kernels = self._pool = self._judging = None
            self._ffns, self._caches, self._slabs = [], [], []
        gc.collect()  # modules and the layers inside them refer to each other

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _build(self, pack: OpenPack, passes: Passes) -> Decoder:
        assert self._pool is not None and self._kernels is not None
        slabs, self._slabs = self._slabs, []
        building = Building(
            pack, self._sizes, self.plan, passes, self._pool, self._kernels, self.kernels, self._switch, self.counters,
            slabs,
        )  # fmt: skip
        self._ffns = building.ffns()
        self._caches = building.caches()
        return building.decoder(self._ffns, self.layers == "modules")
