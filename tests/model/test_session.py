"""Sessions in awkward hands: stale generators, threads, damaged saved files, odd arguments, honest times."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import flashsparse
from flashsparse import SessionError, UsageError
from flashsparse.pack.safetensors import read_header
from tests.model.packs import make_pack

IDS = [int(t) for t in np.random.default_rng(7).integers(3, 160, 40)]


@pytest.fixture(scope="module")
def pack(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_pack(tmp_path_factory.mktemp("session"))


@pytest.fixture
def engine(pack: Path) -> Iterator[flashsparse.Engine]:
    with flashsparse.load(pack, slots=64, threads=1, io_threads=2, max_kv_size=64) as engine:
        yield engine


CHANGES: dict[str, Callable[[Any, Path], object]] = {
    "clear": lambda session, file: session.clear(),
    "load": lambda session, file: session.load(file),
    "logits": lambda session, file: session.logits([5]),
    "generate": lambda session, file: session.generate([5]),
    "close": lambda session, file: session.close(),
    "engine.close": lambda session, file: session._engine.close(),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_suspended_generation_ends_when_the_conversation_is_changed(
    engine: flashsparse.Engine, tmp_path: Path, change: str
) -> None:
    session = engine.session()
    session.logits(IDS[:9])
    session.save(tmp_path / "saved")
    pieces = session.generate(IDS[9:12])
    next(pieces)
    CHANGES[change](session, tmp_path / "saved")
    before = session.tokens, session.fed
    with pytest.raises(SessionError):
        next(pieces)
    assert (session.tokens, session.fed) == before


def test_a_closed_sessions_generation_does_not_touch_the_next_one(engine: flashsparse.Engine) -> None:
    with engine.session() as session:
        expected = session.logits(IDS)
        session.clear()
        pieces = session.generate(IDS[:3])
        next(pieces)
    with engine.session() as other:
        first = other.logits(IDS[:20])
        with pytest.raises(SessionError, match="closed"):
            next(pieces)
        assert np.array_equal(np.concatenate([first, other.logits(IDS[20:])]), expected)


def in_step(engine: flashsparse.Engine, session: flashsparse.Session, during: Callable[[], object]) -> list[Any]:
    """Run `during` while another thread is in the middle of a step; what that thread's step gave."""
    inside, go, result = threading.Event(), threading.Event(), []

    def observer(layer: int, ids: np.ndarray) -> None:
        inside.set()
        go.wait(30)

    def work() -> None:
        result.append(session.logits(IDS[:4]))

    engine.observe(observer)
    thread = threading.Thread(target=work)
    thread.start()
    inside.wait(30)
    try:
        during()
    finally:
        go.set()
        thread.join(30)
        engine.observe(None)
    return result


def test_another_thread_is_refused_and_changes_nothing(engine: flashsparse.Engine, tmp_path: Path) -> None:
    session = engine.session()
    expected = session.logits(IDS[:4])
    session.clear()

    def during() -> None:
        for call in (
            lambda: session.logits([1]),
            lambda: session.generate([1]),
            session.clear,
            lambda: session.save(tmp_path / "x"),
            lambda: session.load(tmp_path / "x"),
            engine.session,
        ):
            with pytest.raises(SessionError, match="another thread"):
                call()

    assert np.array_equal(in_step(engine, session, during)[0], expected)
    assert session.tokens == IDS[:4]


def test_close_waits_for_the_step_of_another_thread(engine: flashsparse.Engine) -> None:
    session = engine.session()
    closer = threading.Thread(target=engine.close)

    def during() -> None:
        closer.start()
        closer.join(0.2)
        assert closer.is_alive()

    assert in_step(engine, session, during)[0].shape == (4, 160)
    closer.join(30)
    with pytest.raises(SessionError):
        session.logits([1])


def test_a_step_cannot_be_entered_from_inside(engine: flashsparse.Engine) -> None:
    session, errors = engine.session(), []

    def observer(layer: int, ids: np.ndarray) -> None:
        for call in (engine.close, session.close, session.clear):
            with pytest.raises(SessionError, match="this thread") as refused:
                call()
            errors.append(refused.value)

    engine.observe(observer)
    session.logits([1])
    assert len(errors) == 9


def test_a_closed_engine_still_tells_its_figures(pack: Path) -> None:
    engine = flashsparse.load(pack, slots=64, read_mode="buffered")
    engine.session().logits(IDS)
    engine.close()
    engine.close()
    figures = engine.stats.to_dict()
    assert figures["read_mode"] == "buffered" and figures["kernels"] == "native"
    assert engine.stats.decode.tokens == len(IDS) and engine.stats.decode.steps == 1
    assert engine.stats.decode.seconds > 0


def test_seconds_hold_the_whole_step(engine: flashsparse.Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that moves only in sampling: its time belongs to the step that asked for the token."""
    from flashsparse import sampling, session

    now = [0.0]
    original = sampling.Sampler.__call__

    def slow(self: sampling.Sampler, logits: np.ndarray) -> int:
        now[0] += 1
        return original(self, logits)

    monkeypatch.setattr(sampling.Sampler, "__call__", slow)
    monkeypatch.setattr(session.time, "perf_counter", lambda: now[0])
    with engine.session() as talk:
        pieces = []
        for piece in talk.generate(IDS[:8], max_tokens=5):
            pieces.append(piece)
            now[0] += 100  # the caller's time between two tokens does not count
        stats = pieces[-1].stats
    assert stats.prefill.seconds == stats.time_to_first_token_s == 1
    assert stats.decode.seconds == stats.decode.tokens == stats.decode.steps == 4
    assert (stats.prefill.tokens, stats.generation_tokens) == (8, 5)
    assert engine.counters.seconds == 5 and engine.counters.tokens == 12


# Saved files


@pytest.fixture
def saved(engine: flashsparse.Engine, tmp_path: Path) -> tuple[flashsparse.Session, Path]:
    session = engine.session()
    list(session.generate(IDS[:20], max_tokens=2))
    session.save(tmp_path / "saved")
    return session, tmp_path / "saved"


def rewrite(path: Path, changed: dict[str, tuple[str, np.ndarray]], drop: str = "") -> None:
    """The saved file again, with other tensors."""
    header, data = read_header(path), path.read_bytes()
    tensors = {n: (t.dtype, list(t.shape), data[t.begin : t.end]) for n, t in header.tensors.items() if n != drop}
    tensors |= {name: (dtype, list(a.shape), a.tobytes()) for name, (dtype, a) in changed.items()}
    entries: dict[str, Any] = {"__metadata__": header.metadata}
    position = 0
    for name, (dtype, shape, raw) in tensors.items():
        entries[name] = {"dtype": dtype, "shape": shape, "data_offsets": [position, position + len(raw)]}
        position += len(raw)
    text = json.dumps(entries).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + b"".join(raw for _, _, raw in tensors.values()))


DAMAGE: dict[str, dict[str, tuple[str, np.ndarray]]] = {
    "tokens of floats": {"tokens": ("F64", np.full(22, np.nan))},
    "one token": {"tokens": ("I64", np.array(3, np.int64))},
    "tokens in two dimensions": {"tokens": ("I64", np.zeros((22, 2), np.int64))},
    "a token outside the vocabulary": {"tokens": ("I64", np.full(22, 160, np.int64))},
    "a negative token": {"tokens": ("I64", np.full(22, -1, np.int64))},
    "fewer tokens than positions": {"tokens": ("I64", np.zeros(20, np.int64))},
    "more tokens than fit": {"tokens": ("I64", np.zeros(65, np.int64))},
    "keys of another type": {"keys.0": ("I16", np.zeros((2, 21, 16), np.int16))},
    "bfloat16 keys": {"keys.0": ("BF16", np.zeros((2, 21, 16), np.int16))},
    "bytes for keys": {"keys.1": ("U8", np.zeros((2, 21, 16, 2), np.uint8))},
    "fewer positions in a layer": {"values.2": ("F16", np.zeros((2, 20, 16), np.float16))},
    "another tensor": {"more": ("U8", np.zeros(3, np.uint8))},
}


@pytest.mark.parametrize("name", [*DAMAGE, "no tokens", "no values", "not a header", "empty"])
def test_a_damaged_saved_file_changes_nothing(saved: tuple[flashsparse.Session, Path], name: str) -> None:
    session, path = saved
    session.clear()
    session.logits(IDS[:5])
    held = [(c.keys.copy(), c.values.copy()) for c in session._caches]
    if name in DAMAGE:
        rewrite(path, DAMAGE[name])
    elif name.startswith("no "):
        rewrite(path, {}, drop={"no tokens": "tokens", "no values": "values.1"}[name])
    else:
        path.write_bytes(b"" if name == "empty" else b"x" * 100)
    with pytest.raises(SessionError) as refused:
        session.load(path)
    assert str(path) in str(refused.value) and "\n" not in str(refused.value)
    assert (session.tokens, session.fed) == (IDS[:5], 5)
    for cache, (keys, values) in zip(session._caches, held, strict=True):
        assert np.array_equal(cache.keys, keys) and np.array_equal(cache.values, values)


def test_tokens_beyond_the_positions_are_fed_later(saved: tuple[flashsparse.Session, Path]) -> None:
    session, path = saved
    tokens = session.tokens + IDS[:30]
    session.clear()
    expected = session.logits([*tokens, 9])[-1]
    rewrite(path, {"tokens": ("I64", np.array(tokens, np.int64))})
    session.load(path)
    assert (session.tokens, session.fed) == (tokens, 21)
    assert np.array_equal(session.logits([9])[-1], expected)


def test_a_full_cache_and_an_empty_session_are_saved_and_loaded(engine: flashsparse.Engine, tmp_path: Path) -> None:
    with engine.session() as session:
        session.save(tmp_path / "empty")
        list(session.generate([1] * 64, max_tokens=1))
        session.save(tmp_path / "full")
        session.load(tmp_path / "empty")
        assert (session.tokens, session.fed) == ([], 0)
        session.load(tmp_path / "full")
        assert (len(session.tokens), session.fed) == (65, 64)


def test_a_read_that_fails_midway_leaves_a_session_that_is_fed_again(
    saved: tuple[flashsparse.Session, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from flashsparse import saved as module

    session, path = saved
    tokens = session.tokens
    expected = session.logits([9])[-1]
    session.clear()
    session.load(path)

    def fails(self: module.SavedSession) -> None:
        self._caches[0].keys[:] = 7
        raise SessionError("cannot be read")

    monkeypatch.setattr(module.SavedSession, "read_cache", fails)
    with pytest.raises(SessionError):
        session.load(path)
    assert (session.tokens, session.fed) == (tokens, 0)
    assert np.array_equal(session.logits([9])[-1], expected)


@pytest.mark.parametrize("name", ["missing/x", "a\0b", "n" * 300, "directory"])
def test_a_place_that_cannot_be_written_is_one_line_and_leaves_no_file(
    saved: tuple[flashsparse.Session, Path], tmp_path: Path, name: str
) -> None:
    (tmp_path / "directory").mkdir()
    with pytest.raises(SessionError, match="could not be saved"):
        saved[0].save(tmp_path / name)
    assert sorted(os.listdir(tmp_path)) == ["directory", "saved"]


def test_a_full_disk_leaves_the_old_file(
    saved: tuple[flashsparse.Session, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = saved[1].read_bytes()

    def full(fd: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(SessionError, match="No space left"):
        saved[0].save(saved[1])
    assert os.listdir(tmp_path) == ["saved"] and saved[1].read_bytes() == before


@pytest.mark.parametrize("dtype", ["BF16", "F32"])
def test_other_types_of_cache(tmp_path: Path, dtype: str) -> None:
    with flashsparse.load(make_pack(tmp_path, dtype=dtype), slots=64) as engine, engine.session() as session:
        session.logits(IDS)
        session.save(tmp_path / "saved")
        info = read_header(tmp_path / "saved").tensors["keys.0"]
        expected = session.logits([3])
        session.load(tmp_path / "saved")
        assert info.dtype == dtype
        assert np.array_equal(session.logits([3]), expected)
        if dtype == "BF16":  # as it was once written
            path = tmp_path / "saved"
            raw = np.frombuffer(path.read_bytes()[info.begin : info.end], np.uint16).reshape(info.shape)
            rewrite(path, {"keys.0": ("U16", raw)})
            session.load(path)
            assert np.array_equal(session.logits([3]), expected)


MEMORY = """
import sys, flashsparse
from flashsparse import memory
engine = flashsparse.load(sys.argv[1], slots=64, threads=1, io_threads=2, max_kv_size=8192)
session = engine.session()
for cache in session._caches:
    cache.keys[:] = cache.values[:] = 1
    cache.offset = 8000
session._tokens = [1] * 8000
memory.reset_peak()
before = memory.footprint()
session.save(sys.argv[2]); session.load(sys.argv[2])
grown = memory.peak_footprint() - before
del cache
held = memory.footprint()
engine.close()
print(engine.plan.kv, grown, held - memory.footprint())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="resets VmHWM")
def test_saving_and_loading_need_no_second_cache_and_close_frees_the_first(tmp_path: Path) -> None:
    path = make_pack(tmp_path, dtype="F32", heads=8, kv_heads=8, max_position_embeddings=8192)
    command = [sys.executable, "-c", MEMORY, str(path), str(tmp_path / "saved")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    kv, grown, freed = map(int, done.stdout.split())
    assert grown < kv / 8
    assert freed > 0.9 * kv


# Arguments


@pytest.mark.parametrize("prompt", [[1.9], b"hi", ["1"], [None], [True], [160], [-1], None, 3, "text"])
def test_prompts_that_are_no_token_ids(engine: flashsparse.Engine, prompt: Any) -> None:
    with engine.session() as session:
        with pytest.raises(UsageError):
            session.generate(prompt)
        assert session.tokens == []
        assert len(list(session.generate(np.array([1, 2]), max_tokens=1))) == 1  # type: ignore[arg-type]


def test_a_prompt_that_the_tokenizer_refuses(engine: flashsparse.Engine) -> None:
    class Refusing:
        def encode(self, text: str, **_: object) -> list[int]:
            raise TypeError("TextInputSequence must be str")

    engine.tokenizer = Refusing()
    with engine.session() as session:
        for prompt in ("\ud800", "text"):
            with pytest.raises(UsageError, match="refuses the prompt"):
                session.generate(prompt)


@pytest.mark.parametrize(
    "options",
    [
        {"dram": 7e9}, {"dram": True}, {"dram": 0}, {"dram": b"7GB"}, {"dram": "9" * 5000}, {"dram": "9" * 400 + ".5"},
        {"max_kv_size": 0}, {"max_kv_size": 1.5}, {"max_kv_size": True}, {"max_kv_size": "9"}, {"slots": 0},
        {"threads": 0}, {"threads": True}, {"io_threads": 2.0}, {"io_threads": 0},
    ],
)  # fmt: skip
def test_load_refuses(pack: Path, options: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=next(iter(options)).replace("dram", "dram|size")):
        flashsparse.load(pack, **options)


def test_load_states_the_range_and_takes_numpy_integers(pack: Path) -> None:
    with pytest.raises(UsageError, match="threads is 2000, expected a whole number, 1 to "):
        flashsparse.load(pack, threads=2000)
    with flashsparse.load(pack, dram=np.int64(64_000_000), max_kv_size=np.int32(64)) as engine:  # type: ignore[arg-type]
        assert (engine.plan.budget, engine.plan.max_kv_size) == (64_000_000, 64)


# Chat


def test_a_chat_survives_ordinary_mistakes(
    engine: flashsparse.Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import io

    from flashsparse.cli import chat
    from flashsparse.cli.options import Sampling

    (tmp_path / "bad").write_bytes(b"x" * 100)
    mistakes = [
        f"/save {tmp_path}/missing/x", "/save ~nosuchuser/x", "/save", "/save .", f"/load {tmp_path}/bad",
        f"/load {'n' * 300}", "/load ~nosuchuser", "/set seed -1", "/set top-p 2", "/set temp nan",
        "/set max-tokens 0", "/set top-k -1", "/set seed " + "9" * 5000, "200", "words",
    ]  # fmt: skip
    lines = ["1 2 3", *mistakes, "/set top-k 1000", "/set temp 1", "/set seed 5", "4 5", "/bye"]
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(lines)))
    chat.talk(engine, Sampling(max_tokens=4))
    output = capsys.readouterr()
    errors = output.err.splitlines()
    assert len(errors) == len(mistakes) and all(line.startswith("flashsparse: ") for line in errors)
    assert [len(line.split()) for line in output.out.splitlines() if line.strip()] == [4, 4]


def test_an_unexpected_error_is_one_line_too(
    engine: flashsparse.Engine, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import io

    from flashsparse.cli import chat
    from flashsparse.cli.options import Sampling

    def broken(self: flashsparse.Session) -> None:
        raise ZeroDivisionError("in\ntwo lines")

    monkeypatch.setattr(flashsparse.Session, "clear", broken)
    monkeypatch.setattr(sys, "stdin", io.StringIO("/clear\n1 2\n"))
    chat.talk(engine, Sampling(max_tokens=2))
    output = capsys.readouterr()
    assert output.err == "flashsparse: ZeroDivisionError: in two lines\n"
    assert len(output.out.split()) == 2


def test_a_chat_ends_when_the_engine_had_to_close(
    engine: flashsparse.Engine, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import io

    from flashsparse.cli import chat
    from flashsparse.cli.options import Sampling

    def lost(self: flashsparse.Session, *_: object, **__: object) -> None:  # as when resident weights cannot be read
        engine.close()
        raise flashsparse.FlashReadError("resident.safetensors: the file ends", "resident.safetensors", 0, 4096, 0)

    monkeypatch.setattr(flashsparse.Session, "generate", lost)
    monkeypatch.setattr(sys, "stdin", io.StringIO("1 2\n3\n4\n"))
    with pytest.raises(flashsparse.FlashReadError, match="the file ends"):
        chat.talk(engine, Sampling(max_tokens=2))
    assert capsys.readouterr().err == ""


def test_logits_after_the_last_token_alone(pack: Path) -> None:
    ids = list(range(1, 90))
    with flashsparse.load(pack, slots=64) as engine:
        with engine.session() as session:
            every = session.logits(ids)
        with engine.session() as session:
            assert np.array_equal(session.logits(ids, last=True), every[-1:])
            token = next(iter(session.generate([5], max_tokens=1, temp=0))).token  # which waits to be fed
            row = session.logits([7, 9], last=True)
            assert session.tokens == [*ids, 5, token, 7, 9]
        with engine.session() as session:
            assert np.array_equal(session.logits([*ids, 5, token, 7, 9])[-1:], row)
