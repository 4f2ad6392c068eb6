"""Counters: what was read, hit, waited for and computed, and the figures derived from them.

Every published figure comes from here. Counters only grow; a phase is the difference of two copies.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields


@dataclass
class Counters:
    """Raw counts since the engine was loaded. Bytes are bytes transferred from flash, rounding and gaps included.

    `seconds` are those of whole steps: layers, language model head, sampling and text.
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
    seconds: float = 0.0
    io_wait_s: float = 0.0
    ffn_s: float = 0.0

    def __sub__(self, other: Counters) -> Counters:
        return Counters(*(getattr(self, f.name) - getattr(other, f.name) for f in fields(self)))

    def __add__(self, other: Counters) -> Counters:
        return Counters(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    def copy(self) -> Counters:
        return Counters(*(getattr(self, f.name) for f in fields(self)))

    @property
    def hit_rate(self) -> float | None:
        """Hits per record needed; None when no record was looked up."""
        total = self.hits + self.misses
        return self.hits / total if total else None

    @property
    def density(self) -> float | None:
        """Active neurons per neuron scored; None when nothing was scored."""
        return self.active / self.candidates if self.candidates else None

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds if self.seconds else 0.0


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
        return {
            "prompt_tokens": self.prefill.tokens,
            "generation_tokens": self.generation_tokens,
            "prompt_tps": round(self.prefill.tokens_per_second, 3),
            "generation_tps": round(decode.tokens_per_second, 3),
            "time_to_first_token_s": round(self.time_to_first_token_s, 4),
            "load_s": round(self.load_s, 4),
            "peak_memory_bytes": self.peak_memory_bytes,
            "runtime_bytes": self.runtime_bytes,
            "budget_bytes": self.budget_bytes,
            "flash_bytes": both.flash_bytes,
            "flash_reads": both.flash_reads,
            "flash_bytes_per_token": round(decode.flash_bytes / decode.tokens) if decode.tokens else 0,
            "hit_rate": decode.hit_rate,
            "active_density": decode.density,
            "io_wait_s": round(both.io_wait_s, 4),
            "tier": self.tier,
            "read_mode": self.read_mode,
            "kernels": self.kernels,
            "prefill": asdict(self.prefill),
            "decode": asdict(self.decode),
        }
