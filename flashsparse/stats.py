"""Counters: what was read, hit, waited for and computed, and the figures derived from them.

Every published figure comes from here. Counters only grow; a phase is the difference of two copies.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields

from flashsparse import macos
from flashsparse.drive import DriveRate

# What native rounds count, in the order of fs_tally; nanoseconds of waiting and of overlap follow.
TALLY = (
    "rounds", "hits", "misses", "needed_bytes", "flash_reads", "flash_bytes", "fired",
    "prefetched", "prefetch_used", "prefetch_wasted_bytes",
)  # fmt: skip


@dataclass
class Counters:
    """Raw counts since the engine was loaded. Bytes are bytes transferred from flash, rounding and gaps included.

    `seconds` are those of whole steps: layers, language model head, sampling and text. `active` of `candidates` neurons
    were needed by some token of a step. In tier predict, and with a compact gate, `predicted` of `scored` pairs of
    token and neuron were computed, and `fired` of them were not zero. `attention_s` (with the norms around it), `ffn_s`
    (with its waiting for reads, `io_wait_s`) and `head_s` are parts of `seconds`; `compute_s` is what was spent inside
    the native kernels. `hits` count records that were in their slots, or on their way there by a read ahead
    (`prefetch_used` of the `prefetched`); `prefetch_wasted_bytes` were read for records that were not needed. `hint_s`
    are spent on naming and starting reads ahead, `overlap_s` on computing hits while misses were read. `readbacks` are
    the host's waits for the GPU. `reading_s` are seconds in which a read was in flight, `in_flight_s` those of all
    reads together, neither of a step that waits for resident weights, whose `io_wait_s` includes that. `resumed` counts
    tokens that were planned whole and had to be computed again in part.
    `embedding_reads` and `embedding_bytes` are those of the flash reads that brought rows of the embedding; the waiting
    for them is in `io_wait_s`.
    """

    tokens: int = 0
    steps: int = 0
    flash_bytes: int = 0
    flash_reads: int = 0
    needed_bytes: int = 0
    hits: int = 0
    misses: int = 0
    active: int = 0
    candidates: int = 0
    rounds: int = 0
    predicted: int = 0
    scored: int = 0
    fired: int = 0
    seconds: float = 0.0
    io_wait_s: float = 0.0
    ffn_s: float = 0.0
    attention_s: float = 0.0
    head_s: float = 0.0
    compute_s: float = 0.0
    prefetched: int = 0
    prefetch_used: int = 0
    prefetch_wasted_bytes: int = 0
    hint_s: float = 0.0
    readbacks: int = 0
    overlap_s: float = 0.0
    reading_s: float = 0.0
    in_flight_s: float = 0.0
    resumed: int = 0
    embedding_reads: int = 0
    embedding_bytes: int = 0

    def __sub__(self, other: Counters) -> Counters:
        return Counters(*(getattr(self, f.name) - getattr(other, f.name) for f in fields(self)))

    def __add__(self, other: Counters) -> Counters:
        return Counters(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    def tally(self, figures: Sequence[int]) -> None:
        """Count what native rounds tell, in TALLY's order; their times are nanoseconds."""
        *counts, waited, overlapped, hinted = figures
        for name, count in zip(TALLY, counts, strict=True):
            if count:
                setattr(self, name, getattr(self, name) + count)
        self.io_wait_s += waited / 1e9
        self.overlap_s += overlapped / 1e9
        self.hint_s += hinted / 1e9

    def copy(self) -> Counters:
        return Counters(*(getattr(self, f.name) for f in fields(self)))

    @property
    def hit_rate(self) -> float | None:
        """Hits per record needed; None when no record was looked up."""
        total = self.hits + self.misses
        return self.hits / total if total else None

    @property
    def prefetch_useful(self) -> float | None:
        """Share of the records read ahead that their step needed; None when none was read ahead."""
        return self.prefetch_used / self.prefetched if self.prefetched else None

    @property
    def layers_s(self) -> float:
        """Seconds in the layers, waiting for reads included, as far as they are measured."""
        return self.attention_s + self.ffn_s + self.hint_s

    @property
    def density(self) -> float | None:
        """Active neurons per neuron scored; None when nothing was scored."""
        return self.active / self.candidates if self.candidates else None

    @property
    def predicted_density(self) -> float | None:
        """Share of the neurons that a token was given by the predictor; None in the other tiers."""
        return self.predicted / self.scored if self.scored else None

    @property
    def predictor_precision(self) -> float | None:
        """Share of the predicted neurons whose value was not zero; None when none was predicted."""
        return self.fired / self.predicted if self.predicted else None

    @property
    def bookkeeping_s(self) -> float | None:
        """Seconds that were neither computing nor waiting for reads; None when the kernels do not count theirs."""
        return self.seconds - self.compute_s - self.io_wait_s if self.compute_s else None

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds if self.seconds else 0.0


DRIFT_TOKENS = 64  # decoded before the realised density says anything
DRIFT_RANGE = (0.75, 1.33)


@dataclass(frozen=True)
class Drift:
    """Realised density over the calibrated one, of decoded tokens: all layers not computed whole together, and each.

    A layer's is None when it is computed whole or its calibrated density is not known or zero.
    """

    ratio: float
    layers: tuple[float | None, ...]

    @property
    def warning(self) -> str | None:
        """One line when the ratio is too far from 1 for the calibrated quality to be expected."""
        if DRIFT_RANGE[0] <= self.ratio <= DRIFT_RANGE[1]:
            return None
        return (
            f"the predictor names {self.ratio:.2f} times as many neurons as on its calibration text; "
            "quality and speed may differ from what was measured: calibrate on text like this"
        )


@dataclass
class Stats:
    """The figures of one generation (or of an engine so far), prefill and decode apart.

    `flash_bytes_per_token` and `hit_rate` speak of decode alone; `flash_bytes` and `flash_reads` of both.
    """

    tier: str
    read_mode: str
    kernels: str
    load_s: float
    budget_bytes: int
    runtime_bytes: int
    embeddings: str = "memory"
    calibrated_density: float | None = None
    lookahead: Callable[[], dict[str, object]] = dict
    drive: Callable[[Counters], DriveRate | None] = lambda _: None
    start_limit: Callable[[Counters], float | None] = lambda _: None
    system: Callable[[], Mapping[str, object]] = macos.state
    peak_memory_bytes: int = 0
    time_to_first_token_s: float = 0.0
    prefill: Counters = field(default_factory=Counters)
    decode: Counters = field(default_factory=Counters)
    generation_tokens: int = 0

    def add(self, cost: Counters) -> None:
        """Count what one generated token cost; the first one's is the prompt's."""
        if self.generation_tokens == 1:
            self.prefill, self.time_to_first_token_s = cost, cost.seconds
        else:
            self.decode = self.decode + cost

    def to_dict(self) -> dict[str, object]:
        """The keys of `generate --json`, without the text."""
        both, decode = self.prefill + self.decode, self.decode
        drive = self.drive(decode)
        return {
            "prompt_tokens": self.prefill.tokens,
            "generation_tokens": self.generation_tokens,
            "prompt_tps": round(self.prefill.tokens_per_second, 3),
            "generation_tps": round(decode.tokens_per_second, 3),
            "time_to_first_token_s": round(self.time_to_first_token_s, 4),
            "load_s": round(self.load_s, 4),
            "start_limit_s": self.start_limit(self.prefill),
            "peak_memory_bytes": self.peak_memory_bytes,
            "runtime_bytes": self.runtime_bytes,
            "budget_bytes": self.budget_bytes,
            "flash_bytes": both.flash_bytes,
            "flash_reads": both.flash_reads,
            "flash_bytes_per_token": round(decode.flash_bytes / decode.tokens) if decode.tokens else 0,
            "hit_rate": decode.hit_rate,
            "active_density": decode.density,
            "predicted_density": decode.predicted_density,
            "calibrated_density": self.calibrated_density,
            "predictor_precision": decode.predictor_precision,
            "prefetch_useful": decode.prefetch_useful,
            "lookahead": self.lookahead(),
            "drive": None if drive is None else drive.to_dict(),
            "io_wait_s": round(both.io_wait_s, 4),
            "tier": self.tier,
            "read_mode": self.read_mode,
            "embeddings": self.embeddings,
            "system": dict(self.system()),
            "kernels": self.kernels,
            "prefill": asdict(self.prefill),
            "decode": asdict(self.decode),
        }
