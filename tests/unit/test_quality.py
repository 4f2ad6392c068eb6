"""Quality: sums by hand and in float64, windows, and the passes over an engine that is made here."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flashsparse.errors import NumericError, UsageError
from flashsparse.likelihood import BLOCK_FLOATS
from flashsparse.quality.evaluate import (
    PROMPT_TOKENS,
    SEED,
    _choose,
    cut_windows,
    encode,
    evaluate,
    generate,
    spelled_bytes,
)
from flashsparse.quality.measures import GenerationMeasures, SetMeasures, TokenMeasures, total
from flashsparse.quality.record import NAME, quality_lines, read_quality, write_quality
from flashsparse.sparsity.selection import Confusion
from flashsparse.stats import Counters

SHOWN = ("tokens", "perplexity", "recall", "predicted_density")

# Sums


def test_perplexity_kl_and_agreement_by_hand() -> None:
    """Two tokens: p = (1/2, 1/4, 1/4) against q = (1/4, 1/2, 1/4), then equal."""
    p, q = np.array([[2, 1, 1], [1, 1, 2]]), np.array([[1, 2, 1], [1, 1, 2]])
    measures = TokenMeasures()
    measures.add(np.log(q).astype(np.float32), [0, 2], np.log(p).astype(np.float32) + 5)
    found = measures.to_dict(utf8_bytes=3)
    assert found["tokens"] == 2
    assert found["perplexity"] == pytest.approx(math.sqrt(4 * 2), rel=1e-6)
    assert found["dense_perplexity"] == pytest.approx(math.sqrt(2 * 2), rel=1e-6)
    assert found["perplexity_ratio"] == pytest.approx(math.sqrt(2), rel=1e-6)
    assert found["bits_per_byte"] == pytest.approx((2 + 1) / 3, rel=1e-6)
    assert found["kl"] == pytest.approx((0.5 * math.log(2) - 0.25 * math.log(2)) / 2, rel=1e-6)
    assert found["top1_agreement"] == 0.5


def test_sums_do_not_depend_on_how_rows_are_blocked() -> None:
    rng = np.random.default_rng(1)
    vocabulary = BLOCK_FLOATS // 3
    logits, dense = (rng.standard_normal((8, vocabulary)).astype(np.float32) * 4 for _ in range(2))
    targets = rng.integers(0, vocabulary, 8)
    whole, parts = TokenMeasures(), TokenMeasures()
    whole.add(logits, targets, dense)
    for rows in (slice(0, 1), slice(1, 8)):
        parts.add(logits[rows], targets[rows], dense[rows])
    assert whole.to_dict(9) == pytest.approx(parts.to_dict(9), rel=1e-12)
    a, b = (x - np.log(np.exp(x).sum(-1, keepdims=True)) for x in (logits.astype(float), dense.astype(float)))
    assert whole.kl == pytest.approx((np.exp(b) * (b - a)).sum(), rel=1e-9)
    assert whole.nats == pytest.approx(-a[np.arange(8), targets].sum(), rel=1e-12)


def test_the_same_logits_lose_nothing() -> None:
    logits = np.random.default_rng(2).standard_normal((5, 7)).astype(np.float32)
    measures = TokenMeasures()
    measures.add(logits, [0, 1, 2, 3, 4], logits)
    found = measures.to_dict(None)
    assert (found["kl"], found["perplexity_ratio"], found["top1_agreement"], found["bits_per_byte"]) == (0, 1, 1, None)


def test_nothing_to_compare_with() -> None:
    measures = TokenMeasures()
    measures.add(np.zeros((2, 4), np.float32), [0, 1])
    found = measures.to_dict(4)
    assert found["perplexity"] == pytest.approx(4)
    assert found["kl"] is found["top1_agreement"] is found["dense_perplexity"] is found["perplexity_ratio"] is None


def test_numbers_that_are_not_finite_are_no_quality() -> None:
    with pytest.raises(NumericError):
        TokenMeasures().add(np.full((1, 3), np.nan, np.float32), [0])


def test_sets_by_hand() -> None:
    predicted = np.array([[True, True, False, False], [False, False, True, False]])
    active = np.array([[True, False, True, False], [False, False, True, False]])
    values = np.array([[4, 0, 1, 0], [0, 0, 3, 0]], np.float32)
    one = SetMeasures()
    one.add(predicted, active, values)
    assert one.to_dict() == {
        "recall": 2 / 3,
        "precision": 2 / 3,
        "value_recall": 7 / 8,
        "predicted_density": 3 / 8,
        "true_density": 3 / 8,
    }
    other = SetMeasures(Confusion(hits=1, active=1, predicted=8, pairs=8), 1.0, 1.0)
    both = total([one, other]).to_dict()
    assert (both["recall"], both["precision"]) == (3 / 4, 3 / 11)
    assert (both["value_recall"], both["predicted_density"], both["true_density"]) == (8 / 9, 11 / 16, 4 / 16)


def test_no_active_neuron_is_full_recall() -> None:
    none = SetMeasures()
    none.add(np.zeros((1, 4), bool), np.zeros((1, 4), bool), np.zeros((1, 4), np.float32))
    assert (none.to_dict()["recall"], none.to_dict()["value_recall"], none.to_dict()["precision"]) == (1, 1, 1)


def test_greedy_continuations_side_by_side() -> None:
    measures = GenerationMeasures()
    measures.add_greedy([1, 2, 3, 4], [1, 2, 9, 4])  # differs in place 2, three of four equal
    measures.add_greedy([1, 2], [1, 2])  # both ended
    measures.add_greedy([1], [1, 2, 3, 4])  # one ended early
    for part in (measures.sampled, measures.dense_sampled):
        part.add(np.zeros((1, 2), np.float32), [0])
    found = measures.to_dict()
    assert (found["prompts"], found["tokens"]) == (3, 10)
    assert found["equal_share"] == 6 / 10
    assert found["mean_divergence"] == (2 + 2 + 1) / 3


# Windows


@given(st.integers(2, 60), st.integers(1, 13))
def test_windows_predict_each_token_but_the_first_once(count: int, window: int) -> None:
    windows = cut_windows(range(count), window)
    assert [token for one in windows for token in one[1:]] == list(range(1, count))
    assert all(2 <= len(one) <= window + 1 for one in windows)
    assert all(one[0] == before[-1] for before, one in itertools.pairwise(windows))


# An engine of tables


class FakeEngine:
    """A bigram model: logits depend on the last token. Sparse logits are the dense ones times `quality`."""

    def __init__(self, tier: str = "predict", quality: float = 0.5, layers: int = 2) -> None:
        rng = np.random.default_rng(5)
        self.table = rng.standard_normal((11, 11)).astype(np.float32) * 3
        record = SimpleNamespace(bytes=100)
        self.manifest = SimpleNamespace(
            tier=tier, vocab_size=11, layers=layers, prefill_chunk=4, record=record, intermediate_size=6
        )
        self.tokenizer = SimpleNamespace(
            encode=lambda text, add_special_tokens, verbose: [ord(one) % 11 for one in text],
            decode=lambda ids: "é" * len(ids),
        )
        self.counters = Counters()
        self.quality, self.dense = quality, False
        self.observer: Any = None
        self.histories: list[int] = []

    def set_dense(self, flag: bool) -> None:
        self.dense = flag

    def judge(self, observer: Any) -> None:
        self.observer = observer

    @contextmanager
    def session(self) -> Iterator[FakeSession]:
        session = FakeSession(self)
        yield session
        self.histories.append(session.fed)


class FakeSession:
    def __init__(self, engine: FakeEngine) -> None:
        self.engine, self.fed, self.last = engine, 0, 0

    def logits(self, ids: list[int]) -> np.ndarray:
        engine = self.engine
        self.fed += len(ids)
        engine.counters.tokens += len(ids)
        if engine.observer is not None:
            assert not engine.dense
            for layer in range(engine.manifest.layers):
                sets = np.zeros((len(ids), 6), bool)
                sets[:, : layer + 1] = True
                active = np.ones((len(ids), 6), bool)
                values = np.ones((len(ids), 6), np.float32)
                engine.observer(SimpleNamespace(layer=layer, predicted=sets, active=active, values=values))
        return engine.table[ids] * (1 if engine.dense else engine.quality)


IDS = np.random.default_rng(6).integers(0, 11, 41).tolist()


def losses(logits: np.ndarray, targets: list[int]) -> float:
    wide = logits.astype(float)
    likely = wide - np.log(np.exp(wide).sum(-1, keepdims=True))
    return float(-likely[np.arange(len(targets)), targets].sum())


def test_a_predicting_pack_is_compared_with_itself() -> None:
    engine = FakeEngine()
    found = evaluate(engine, cut_windows(IDS, 10)).to_dict()  # type: ignore[arg-type]
    assert found["tokens"] == 40 and engine.histories == [10] * 8  # dense, then sparse, and no history
    table = engine.table[IDS[:-1]]
    assert found["perplexity"] == pytest.approx(math.exp(losses(table / 2, IDS[1:]) / 40), rel=1e-6)
    assert found["dense_perplexity"] == pytest.approx(math.exp(losses(table, IDS[1:]) / 40), rel=1e-6)
    assert found["top1_agreement"] == 1 and found["kl"] > 0
    assert found["bits_per_byte"] == pytest.approx(losses(table / 2, IDS[1:]) / math.log(2) / (2 * 40), rel=1e-6)
    assert [layer["recall"] for layer in found["layers"]] == [1 / 6, 2 / 6]
    assert found["recall"] == found["predicted_density"] == 3 / 12
    assert (found["selected_bytes_per_token"], found["ffn_bytes"]) == (300, 1200)
    assert engine.observer is None and engine.dense is False


def test_a_reference_is_asked_for_rows_of_windows() -> None:
    engine, asked = FakeEngine("exact"), []
    windows = cut_windows(IDS, 10)

    def reference(window: int, rows: slice) -> np.ndarray:
        asked.append((window, rows.start, rows.stop))
        return engine.table[windows[window][:-1]][rows]

    found = evaluate(engine, windows, reference).to_dict()  # type: ignore[arg-type]
    assert asked[:4] == [(0, 0, 4), (0, 4, 8), (0, 8, 10), (1, 0, 4)]
    assert found == evaluate(FakeEngine(), windows).to_dict()  # type: ignore[arg-type]
    assert engine.histories == [10] * 4


def test_an_exact_pack_is_not_compared_with_itself() -> None:
    found = evaluate(FakeEngine("exact"), cut_windows(IDS, 10)).to_dict()  # type: ignore[arg-type]
    assert found["kl"] is None and found["perplexity"] > 1


def test_a_dense_pack_is_not_judged() -> None:
    engine = FakeEngine("dense")
    engine.judge = None  # type: ignore[method-assign, assignment]
    found = evaluate(engine, cut_windows(IDS, 10)).to_dict()  # type: ignore[arg-type]
    assert (found["recall"], found["predicted_density"], found["true_density"], found["layers"]) == (1, 1, None, [])
    assert found["selected_bytes_per_token"] == found["ffn_bytes"] == 1200


def test_the_engine_is_left_as_it_was_when_a_step_fails() -> None:
    engine = FakeEngine(quality=float("nan"))
    with pytest.raises(NumericError):
        evaluate(engine, cut_windows(IDS, 10))  # type: ignore[arg-type]
    assert engine.observer is None and engine.dense is False


def test_generating() -> None:
    windows = cut_windows(IDS, PROMPT_TOKENS)
    found = generate(FakeEngine(), windows, prompts=3, length=5)  # type: ignore[arg-type]
    assert found is not None
    # Halved logits have the same maximum, and samples that the dense model finds less likely than its own.
    assert (found.prompts, found.tokens, found.equal, found.diverged_at) == (1, 5, 5, 5)
    assert (found.sampled.tokens, found.dense_sampled.tokens) == (5, 5)
    many = generate(FakeEngine(quality=0.2), [[i % 11] * 40 for i in range(11)], 11, 60)  # type: ignore[arg-type]
    assert many is not None and many.prompts == 11
    assert many.sampled.perplexity > many.dense_sampled.perplexity
    assert generate(FakeEngine(), cut_windows(IDS, 20), 3, 5) is None  # type: ignore[arg-type]


def test_samples_are_scored_after_their_prompt() -> None:
    engine = FakeEngine(quality=1.0)
    prompt = IDS[:PROMPT_TOKENS]
    found = generate(engine, [IDS], prompts=1, length=7)  # type: ignore[arg-type]
    assert found is not None
    rng, last, sample = np.random.default_rng(SEED), prompt[-1], []
    for _ in range(7):
        last = int((engine.table[last].astype(float) + rng.gumbel(size=11)).argmax())
        sample.append(last)
    expected = losses(engine.table[[prompt[-1], *sample[:-1]]], sample)
    assert found.sampled.nats == pytest.approx(expected) == found.dense_sampled.nats


def test_samples_are_drawn_from_the_distribution() -> None:
    rng, logits = np.random.default_rng(7), np.log(np.array([[1, 2, 5]], np.float32))
    drawn = np.bincount([_choose(logits, rng) for _ in range(8000)], minlength=3) / 8000
    assert drawn == pytest.approx([1 / 8, 2 / 8, 5 / 8], abs=0.02)
    assert _choose(logits, None) == 2


def test_texts_that_cannot_be_judged() -> None:
    engine = FakeEngine()
    assert encode(engine, "abcdef", 3) == [97 % 11, 98 % 11, 99 % 11, 100 % 11]  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="1 tokens, expected at least 2"):
        encode(engine, "a", 3)  # type: ignore[arg-type]
    engine.tokenizer = None  # type: ignore[assignment]
    with pytest.raises(UsageError, match="no tokenizer"):
        encode(engine, "abc", 3)  # type: ignore[arg-type]


@pytest.mark.parametrize(("text", "count"), [("hé", 2), ("é", None), ("éa", None), ("ab", 1)])
def test_bytes_of_the_predicted_tokens(text: str, count: int | None) -> None:
    """One token a byte. Half a character is spelled as three bytes: where that leaves nothing, there is no count."""
    engine: Any = SimpleNamespace(tokenizer=SimpleNamespace(decode=lambda ids: bytes(ids).decode(errors="replace")))
    assert spelled_bytes(engine, [list(text.encode())]) == count


# The file


def record(**changes: Any) -> dict[str, Any]:
    found = evaluate(FakeEngine(), cut_windows(IDS, 10)).to_dict()  # type: ignore[arg-type]
    return found | {"pack": "d" * 64, "texts": ["e" * 64], "window": 10} | changes


def test_the_record_is_the_same_for_the_same_figures(tmp_path: Path) -> None:
    path = write_quality(tmp_path, record())
    before = path.read_bytes()
    assert read_quality(tmp_path, "d" * 64) == (json.loads(before), None)
    write_quality(tmp_path, record())
    assert path.read_bytes() == before
    assert [one.name for one in tmp_path.iterdir()] == [NAME]


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("{", "cannot be read"),
        ("[]", "cannot be read"),
        ("[" * 100_000, "cannot be read"),
        ("{}", "cannot be read"),
        ('{"version": 2}', "of version 2"),
        ('{"version": 1, "pack": "other"}', "of another pack"),
        ('{"version": 1, "pack": "d", "tokens": 1}', "KeyError"),
        (json.dumps({"version": 1, "pack": "d"} | dict.fromkeys(SHOWN, "1")), "not a number"),
        (json.dumps({"version": 1, "pack": "d"} | dict.fromkeys(SHOWN, 1)), "texts is missing"),
    ],
)
def test_records_that_are_not_used(text: str, problem: str, tmp_path: Path) -> None:
    (tmp_path / NAME).write_text(text)
    found, reason = read_quality(tmp_path, "d")
    assert found is None and reason is not None and problem in reason


@pytest.mark.parametrize("name", [*SHOWN, "dense_perplexity", "perplexity_ratio", "kl", "top1_agreement", "ffn_bytes"])
@pytest.mark.parametrize("value", ["1", [], 10**400, 1e999])
def test_figures_that_cannot_be_shown_are_not_used(name: str, value: Any, tmp_path: Path) -> None:
    (tmp_path / NAME).write_text(json.dumps(record(version=1, **{name: value})))
    found, reason = read_quality(tmp_path, "d" * 64)
    assert found is None and reason is not None and reason.startswith(f"{NAME} cannot be read")


def test_a_record_of_figures_that_are_missing_is_not_used(tmp_path: Path) -> None:
    """Without what is compared with, nothing of it is needed."""
    whole = record(version=1)
    for name in ("perplexity_ratio", "kl", "top1_agreement"):
        left = {key: value for key, value in whole.items() if key != name}
        (tmp_path / NAME).write_text(json.dumps(left))
        assert read_quality(tmp_path, "d" * 64)[0] is None
        (tmp_path / NAME).write_text(json.dumps(left | {"dense_perplexity": None}))
        assert quality_lines(read_quality(tmp_path, "d" * 64)[0] or {})


def test_no_record(tmp_path: Path) -> None:
    assert read_quality(tmp_path, "d") == (None, None)


def test_a_failed_write_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / NAME).mkdir()
    with pytest.raises(OSError):
        write_quality(tmp_path, record())
    assert [one.name for one in tmp_path.iterdir()] == [NAME]


def test_lines() -> None:
    lost, sets = quality_lines(record())
    assert "of the dense model" in lost and "top-1 agreement 100.00 %" in lost
    assert sets == "recall 25.00 %, 25.00 % of the neurons loaded, 100.00 % truly active; measured on 40 tokens"
    assert "dense" not in quality_lines(record(dense_perplexity=None))[0]
