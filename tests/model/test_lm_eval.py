"""The lm-evaluation-harness adapter on the demo model, with tasks made here; no network.

Log-likelihoods are compared with the logits of one session over the whole text.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import flashsparse
from converter.convert import convert
from flashsparse.errors import UsageError

pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed: pip install 'flashsparse[eval]'")

DEMO = Path(flashsparse.__file__).parent / "demo_model"
STORY = "Once upon a time, there was a little girl who lived in a house by the sea. Her mother said to her: come here."


@pytest.fixture(scope="module")
def pack(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return convert(DEMO, tmp_path_factory.mktemp("packs") / "demo")


@pytest.fixture(scope="module")
def model(pack: Path) -> Iterator[Any]:
    from flashsparse.lm_eval import FlashSparseLM

    made = FlashSparseLM(str(pack), max_kv_size=64, batch_size=1, device="cpu")
    yield made
    made.engine.close()


def requests(*arguments: tuple[Any, ...]) -> list[Any]:
    return [SimpleNamespace(args=one) for one in arguments]


def expected(model: Any, ids: list[int], scored: int) -> tuple[float, bool]:
    """By one session in one go, float64."""
    with model.engine.session() as session:
        logits = session.logits(ids[:-1])[-scored:].astype(np.float64)
    likely = logits - np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1, keepdims=True))
    likely -= logits.max(-1, keepdims=True)
    targets = np.array(ids[-scored:])
    return float(likely[np.arange(scored), targets].sum()), bool((logits.argmax(-1) == targets).all())


def test_loglikelihood(model: Any) -> None:
    encode, last = model.tokenizer.encode, " the sea."
    pairs = [("Once upon a time, there was", " a little girl"), ("Once upon a time, there was ", "a little girl")]
    found = model.loglikelihood(requests(*pairs, ("", "Once upon"), (STORY * 4, last)), disable_tqdm=True)
    whole, before = encode("".join(pairs[0])), encode(pairs[0][0])
    assert found[0] == found[1] == (pytest.approx(expected(model, whole, len(whole) - len(before))[0]), found[0][1])
    assert found[0][1] is expected(model, whole, len(whole) - len(before))[1]
    beginning = [model.tokenizer.bos_token_id, *encode("Once upon")]
    assert found[2] == pytest.approx(expected(model, beginning, len(beginning) - 1))
    long = encode(STORY * 4 + last)
    assert len(long) > 65
    assert found[3] == pytest.approx(expected(model, long[-65:], len(long) - len(encode(STORY * 4))))


def test_a_greedy_continuation_is_known_as_one(model: Any) -> None:
    with model.engine.session() as session:
        said = "".join(piece.text for piece in session.generate("Once upon a time", max_tokens=5))
    assert model.loglikelihood(requests(("Once upon a time", said)), disable_tqdm=True)[0][1] is True


def test_loglikelihood_rolling_scores_every_token(model: Any) -> None:
    ids = model.tokenizer.encode(STORY * 4)
    prefixed = [model.tokenizer.bos_token_id, *ids]
    total = 0.0
    for start in range(0, len(ids), 64):
        end = min(start + 64, len(ids))
        total += expected(model, prefixed[max(0, end - 64) : end + 1], end - start)[0]
    found = model.loglikelihood_rolling(requests((STORY * 4,)), disable_tqdm=True)
    assert found == [pytest.approx(total)]


def test_generate_until(model: Any) -> None:
    with model.engine.session() as session:
        free = "".join(piece.text for piece in session.generate("Once upon a time", max_tokens=20))
    stop = free.split()[4]
    options = [{"max_gen_toks": 20}, {"max_gen_toks": 20, "until": [stop]}, {"max_gen_toks": 20, "until": stop}]
    found = model.generate_until(requests(*(("Once upon a time", one) for one in options)), disable_tqdm=True)
    assert found == [free, free[: free.index(stop)], free[: free.index(stop)]]
    # What does not fit beside the reply is dropped from the left.
    long = model.generate_until(requests((STORY * 4, {"max_gen_toks": 8})), disable_tqdm=True)[0]
    with model.engine.session() as session:
        ids = model.tokenizer.encode(STORY * 4)[-56:]
        assert long == "".join(piece.text for piece in session.generate(ids, max_tokens=8))


@pytest.mark.parametrize(
    ("given", "sampling"),
    [
        ({}, (0.0, {})),
        ({"temperature": 0.7, "do_sample": False, "num_beams": 1}, (0.0, {})),
        ({"temperature": 0.7, "top_p": 0.9, "seed": 3}, (0.7, {"top_p": 0.9, "seed": 3})),
    ],
)
def test_generation_options(given: dict[str, Any], sampling: tuple[float, dict[str, Any]]) -> None:
    from flashsparse.lm_eval import generation_options

    stops, length, found = generation_options(given | {"until": "\n", "max_tokens": 7})
    assert (stops, length) == (["\n"], 7)
    assert found == {"temp": sampling[0], **sampling[1]}


def test_options_that_are_refused(model: Any, pack: Path) -> None:
    from flashsparse.lm_eval import FlashSparseLM, generation_options

    with pytest.raises(UsageError, match="repetition_penalty"):
        generation_options({"repetition_penalty": 1.2})
    with pytest.raises(UsageError, match="64 tokens to generate, but the KV cache holds 64"):
        model.generate_until(requests(("a", {"max_gen_toks": 64})), disable_tqdm=True)
    with pytest.raises(UsageError, match="batch_size is 8"):
        FlashSparseLM(str(pack), batch_size=8)


def write_tasks(folder: Path) -> None:
    """A multiple-choice task, a perplexity task and a generation task over three lines of text."""
    rows = [{"text": STORY, "choices": [" the sea.", " sea the."], "answer": 0}] * 3
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    common = f"""dataset_path: json
dataset_kwargs:
  data_files:
    test: {folder / "data.jsonl"}
test_split: test
"""
    choice = """task: tiny_choice
output_type: multiple_choice
doc_to_text: "She lived in a house by"
doc_to_choice: "{{choices}}"
doc_to_target: answer
metric_list:
  - metric: acc
"""
    rolling = """task: tiny_rolling
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list:
  - metric: bits_per_byte
"""
    generation = """task: tiny_generation
output_type: generate_until
doc_to_text: "{{text}} Once"
doc_to_target: " upon"
generation_kwargs:
  until: [","]
  max_gen_toks: 4
metric_list:
  - metric: exact_match
"""
    for name, text in (("choice", choice), ("rolling", rolling), ("generation", generation)):
        (folder / f"{name}.yaml").write_text(common + text)


@pytest.mark.slow
def test_the_command_line_runs_a_local_task_file(model: Any, pack: Path, tmp_path: Path) -> None:
    write_tasks(tmp_path)
    command = [sys.executable, "-m", "flashsparse.lm_eval", "--model_args", f"pack={pack},max_kv_size=64"]
    command += ["--tasks", "tiny_choice,tiny_rolling,tiny_generation", "--include_path", str(tmp_path)]
    command += ["--output_path", str(tmp_path / "out")]
    offline = {"HF_DATASETS_OFFLINE": "1", "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf")}
    ran = subprocess.run(command, capture_output=True, text=True, env=os.environ | offline)
    assert ran.returncode == 0, ran.stderr[-2000:]
    (report,) = (tmp_path / "out").rglob("results*.json")
    results = json.loads(report.read_text())["results"]
    assert results["tiny_choice"]["acc,none"] == 1.0
    nats = model.loglikelihood_rolling(requests((STORY,)), disable_tqdm=True)[0]
    bits = -nats / np.log(2) / len(STORY.encode())
    assert results["tiny_rolling"]["bits_per_byte,none"] == pytest.approx(bits, rel=1e-6)
    assert "exact_match,none" in results["tiny_generation"]
