"""What a streamed prompt leaves in the slots: the last tokens' records, whole, without a read more."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import flashsparse
from flashsparse import ffn
from flashsparse.choice import Choice
from flashsparse.keeping import LAST, likely_next
from tests.model.packs import make_pack
from tests.model.predict_packs import make_predict_pack

PROMPT = [int(t) for t in np.random.default_rng(7).integers(3, 160, 70)]
STEPS = [int(t) for t in np.random.default_rng(8).integers(3, 160, 6)]


@pytest.mark.parametrize("tier", ["exact", "predict", "predict, 4 bits"])
@pytest.mark.parametrize("mode", ["direct", "buffered"])
def test_a_streamed_prompt_leaves_its_window_behind(
    tmp_path: Path, tier: str, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    bits = 4 if "4" in tier else 16
    path = make_pack(tmp_path, tier="exact") if tier == "exact" else make_predict_pack(tmp_path, bits=bits)
    results, reads, hits = [], [], []
    for kept in (True, False):
        if not kept:
            monkeypatch.setattr(ffn, "likely_next", lambda *_: np.empty(0, np.int32))
        with flashsparse.load(path, slots=300, lookahead="off", read_mode=mode) as engine, engine.session() as session:
            rows = [session.logits(PROMPT)]
            reads.append(engine.counters.needed_bytes)  # a head start may read a little more
            before = engine.counters.copy()
            rows += [session.logits([token]) for token in STEPS]
            hits.append((engine.counters - before).hits)
            for layer in engine._ffns:
                assert layer.table is not None
                layer.table.check()
            results.append(np.concatenate(rows))
    assert np.array_equal(*results)
    assert reads[0] == reads[1]
    assert hits[0] > hits[1]


def test_the_last_tokens_come_first() -> None:
    mask = np.zeros((LAST + 8, 10), np.uint8)
    mask[:8, 0] = 1  # too long ago
    mask[-1, [3, 4]] = 1
    mask[-5:-1, 7] = 1
    mask[-3:-1, 2] = 1
    choice = Choice(np.arange(10, dtype=np.int32), mask=mask)
    assert likely_next(choice, len(mask), 10).tolist() == [2, 3, 4, 7]
    assert likely_next(choice, len(mask), 3).tolist() == [3, 4, 7]
    assert likely_next(choice, len(mask), 1).tolist() == [3]
    assert likely_next(Choice(choice.ids), 4, 10).tolist() == []
