"""Calibration: what it writes, that it goes on after any failure with the same bytes, and what it refuses."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zstandard
from click.testing import CliRunner

import flashsparse
from converter import states, walk
from converter.calibrate import calibrate
from converter.convert import convert
from converter.model import open_model
from converter.text import TextTokenizer, read_ids
from flashsparse.cli.calibrate import calibrate as command
from flashsparse.errors import CheckpointError, ConvertError, UsageError
from flashsparse.sparsity.calibration import DESCRIPTION, TENSORS, open_calibration, read_description
from flashsparse.sparsity.texts import file_sha256
from tests.checkpoints import write_checkpoint

DEMO = Path(flashsparse.__file__).parent / "demo_model"
TEXT = DEMO / "README.md"
WORDS = 128


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A tiny checkpoint with a tokenizer of WORDS words w0, w1, ..."""
    return tiny(tmp_path / "source")


@pytest.fixture
def text(tmp_path: Path) -> Path:
    return words(tmp_path / "text.txt", 100)


def tiny(path: Path, **options: Any) -> Path:
    from tokenizers import Tokenizer, models, pre_tokenizers

    write_checkpoint(path, **{"dtype": "F16", "intermediate": 48, "vocab": WORDS, **options})
    tokenizer = Tokenizer(models.WordLevel({f"w{n}": n for n in range(WORDS)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(path / "tokenizer.json"))
    return path


def words(path: Path, count: int, seed: int = 0) -> Path:
    path.write_text(" ".join(f"w{n}" for n in np.random.default_rng(seed).integers(0, WORDS, count)) + "\n")
    return path


def files(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return calibrate(DEMO, [TEXT], out=tmp_path_factory.mktemp("calibration"), tokens=300, window=128, covariance=True)


def test_the_files(demo: Path) -> None:
    assert sorted(path.name for path in demo.iterdir()) == [DESCRIPTION, TENSORS]
    found = open_calibration(demo)
    about = found.description
    assert (found.layers, about["tokens"], about["windows"], about["options"]["window"]) == (5, 300, 3, 128)
    assert about["texts"] == [{"name": "README.md", "sha256": file_sha256(TEXT), "tokens": 300}]
    assert about["active"] == "act(g) != 0" and about["model"]["activation"] == {"name": "relu", "param": None}
    for name, facts in about["tensors"].items():
        assert facts["meaning"], name
        for layer in range(found.layers):
            values = found.tensor(layer, name)
            assert values is not None and list(values.shape) == facts["shape"]
    assert len(found.header.tensors) == 5 * len(about["tensors"])
    assert found.tensor(0, "x_second_moment") is not None and found.tensor(0, "nothing") is None


def test_the_numbers_are_those_of_the_walk(demo: Path) -> None:
    calibration, active, first = open_calibration(demo), [], []
    with open_model(DEMO) as model:
        ids = np.array(model.tokenizer().encode(TEXT.read_text())[:300])
        windows = walk.windows_of(ids, 128)
        walk.walk(model, windows, lambda b: active.append((b.layer, b.gate > 0)) or first.append(b.before))
    for layer, summary in enumerate(calibration.description["layers"]):
        parts = [one for number, one in active if number == layer]
        sets = np.concatenate(parts)
        frequency = calibration.tensor(layer, "frequency")
        np.testing.assert_allclose(frequency, sets.mean(axis=0), rtol=1e-6)
        assert summary["density"] == pytest.approx(sets.mean()) and summary["never_active"] == (~sets.any(0)).sum()
        pairs = [(part[1:], part[:-1]) for part in parts]
        kept = sum((now & last).sum() for now, last in pairs) / sum(now.sum() for now, _ in pairs)
        assert summary["persistence"]["1"] == pytest.approx(kept, rel=1e-6)
    a, b = (np.concatenate(first[3 * n : 3 * n + 3]).astype(np.float64) for n in (2, 3))
    cosine = ((a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)).mean()
    assert calibration.description["layers"][2]["similarity"]["output"] == pytest.approx(cosine, rel=1e-5)


def test_a_pack_gives_the_same_tensors(source: Path, text: Path, tmp_path: Path) -> None:
    pack = convert(source, tmp_path / "pack")
    one, other = (
        open_calibration(calibrate(s, [text], out=tmp_path / f"of-{s.name}", window=20)) for s in (source, pack)
    )
    assert set(one.header.tensors) == set(other.header.tensors)
    for name in one.description["tensors"]:
        a, b = one.tensor(1, name), other.tensor(1, name)
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6, err_msg=name)


def test_silu_has_no_active_neurons_without_a_threshold(text: Path, tmp_path: Path) -> None:
    source = tiny(tmp_path / "source", activation="silu")
    found = open_calibration(calibrate(source, [text], out=tmp_path / "one", window=20))
    assert found.description["active"] is None and found.description["layers"][0]["density"] is None
    assert found.tensor(0, "frequency") is None and found.tensor(0, "value_mean") is not None
    found = open_calibration(calibrate(source, [text], out=tmp_path / "two", window=20, threshold=0.1))
    assert found.description["active"] == "|act(g)| > threshold"
    assert 0 < found.description["layers"][0]["density"] < 1


class Killed(Exception):
    pass


def test_a_killed_run_goes_on(source: Path, text: Path, tmp_path: Path) -> None:
    expected = files(calibrate(source, [text], out=tmp_path / "expected", window=20))
    for at in range(10):  # five windows in each of two layers
        calls: list[int] = []

        def progress(what: str, done: int, total: int, calls: list[int] = calls, at: int = at) -> None:
            calls.append(done)
            if len(calls) == at + 1:
                raise Killed

        out = tmp_path / str(at)
        with pytest.raises(Killed):
            calibrate(source, [text], out=out, window=20, progress=progress)
        assert not (out / DESCRIPTION).exists()
        first: list[int] = []
        calibrate(source, [text], out=out, window=20, progress=lambda _, done, total, to=first: to.append(done))
        assert len(first) == (10 if at < 5 else 5)
        assert files(out) == expected


def test_a_full_disk_at_every_write(source: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = files(calibrate(source, [text], out=tmp_path / "expected", window=20))
    real, at = states.write_all, 0
    while True:
        out, calls = tmp_path / f"at-{at}", []

        def fail(fd: int, data: Any, calls: list[int] = calls, at: int = at) -> None:
            calls.append(fd)
            if len(calls) == at + 1:
                real(fd, memoryview(data).cast("B")[: memoryview(data).nbytes // 2])
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            real(fd, data)

        with monkeypatch.context() as patch:
            patch.setattr("converter.states.write_all", fail)
            patch.setattr("converter.disk.write_all", fail)
            try:
                calibrate(source, [text], out=out, window=20)
                break
            except ConvertError as problem:
                assert "disk full" in str(problem) and "run again to continue" in str(problem)
        calibrate(source, [text], out=out, window=20)
        assert files(out) == expected, at
        shutil.rmtree(out)
        at += 1
    assert at > 15


def test_other_options_are_refused_by_name(source: Path, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"

    def stop(what: str, done: int, total: int) -> None:
        raise Killed

    with pytest.raises(Killed):
        calibrate(source, [text], out=out, window=20, progress=stop)
    other = words(tmp_path / "other.txt", 90, seed=1)
    for change, name in (
        ({"window": 30}, "window: found 30, expected 20"),
        ({"tokens": 50}, "tokens: found 50, expected 10000"),
        ({"covariance": True}, "collectors: "),
        ({"threshold": 0.1}, "threshold: "),
        ({"activation": "relu2"}, "activation: "),
        ({"texts": [other]}, "texts: "),
        ({"src": tiny(tmp_path / "second", seed=1)}, "model: "),
    ):
        options: dict[str, Any] = {"src": source, "texts": [text], "window": 20, "out": out, **change}
        with pytest.raises(ConvertError, match=rf"{name}.*--force"):
            calibrate(**options)
    calibrate(source, [text], out=out, window=20)
    with pytest.raises(ConvertError, match="window: found 30"):
        calibrate(source, [text], out=out, window=30)
    calibrate(source, [text], out=out, window=30, resume=False)
    assert read_description(out)["options"]["window"] == 30


def test_a_complete_calibration_is_kept(source: Path, text: Path, tmp_path: Path) -> None:
    def never(what: str, done: int, total: int) -> None:
        raise AssertionError

    out = calibrate(source, [text], out=tmp_path / "out", window=20)
    before = files(out)
    calibrate(source, [text], out=out, window=20, progress=never)
    assert files(out) == before
    with pytest.raises(AssertionError):
        calibrate(source, [text], out=out, window=20, progress=never, resume=False)


def test_a_lost_layer_and_a_second_run(source: Path, text: Path, tmp_path: Path) -> None:
    def stop(what: str, done: int, total: int) -> None:
        if what.startswith("layer 2"):
            raise Killed

    out = tmp_path / "out"
    with pytest.raises(Killed):
        calibrate(source, [text], out=out, window=20, progress=stop)
    fd = os.open(out, os.O_RDONLY)
    fcntl.flock(fd, fcntl.LOCK_EX)
    with pytest.raises(ConvertError, match="another calibration is running"):
        calibrate(source, [text], out=out, window=20)
    os.close(fd)
    (out / ".partial" / "layer-000.safetensors").unlink()
    with pytest.raises(ConvertError, match=r"layer-000\.safetensors: missing.*--force"):
        calibrate(source, [text], out=out, window=20)
    calibrate(source, [text], out=out, window=20, resume=False)


def test_collectors_see_the_same_walk(source: Path, text: Path, tmp_path: Path) -> None:
    class Largest:
        name = "largest"

        def options(self) -> dict[str, Any]:
            return {"of": "gate"}

        def begin(self, layer: int, weights: Any) -> None:
            self.most = np.full(len(weights.up), -np.inf, np.float32)

        def visit(self, block: walk.Block) -> None:
            self.most = np.maximum(self.most, block.gate.max(axis=0))

        def output(self, block: walk.Block, ffn: np.ndarray, after: np.ndarray) -> None:
            assert ffn.shape == after.shape == block.x.shape

        def end(self, layer: int) -> dict[str, np.ndarray]:
            return {"gate_most": self.most}

    found = open_calibration(calibrate(source, [text], out=tmp_path / "out", window=20, extra=[Largest()]))
    most, frequency = found.tensor(1, "gate_most"), found.tensor(1, "frequency")
    assert most is not None and frequency is not None
    assert ((most > 0) == (frequency > 0)).all()
    assert found.description["options"]["collectors"]["largest"] == {"of": "gate"}


def test_damaged_results(source: Path, text: Path, tmp_path: Path) -> None:
    out = calibrate(source, [text], out=tmp_path / "out", window=20)
    raw = bytearray((out / TENSORS).read_bytes())
    raw[-1] ^= 1
    (out / TENSORS).write_bytes(raw)
    with pytest.raises(CheckpointError, match=r"not the file that calibration\.json describes"):
        open_calibration(out)
    (out / DESCRIPTION).write_text('{"format": "flashsparse-calibration", "version": 2}')
    with pytest.raises(CheckpointError, match=r"expected .*1"):
        open_calibration(out)
    (out / DESCRIPTION).write_text("[]")
    with pytest.raises(CheckpointError, match="found 'list'"):
        open_calibration(out)
    (out / DESCRIPTION).write_text("{")
    with pytest.raises(CheckpointError, match="not JSON"):
        open_calibration(out)
    with pytest.raises(UsageError, match="flashsparse calibrate"):
        open_calibration(tmp_path)


def by_word(text: str) -> list[int]:
    return [int(word[1:]) for word in text.split()]


def test_texts_share_the_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("converter.text.PIECE_CHARS", 7)
    paths = [words(tmp_path / f"{n}.txt", count, n) for n, count in enumerate((5, 100, 40))]
    wanted = [by_word(path.read_text()) for path in paths]

    def counts(tokens: int) -> list[int]:
        found = read_ids(TextTokenizer(by_word), paths, tokens)
        for ids, expected in zip(found, wanted, strict=True):
            assert ids.tolist() == expected[: len(ids)]
        return [len(ids) for ids in found]

    assert counts(9) == [3, 3, 3]
    assert counts(60) == [5, 28, 27]
    assert counts(120) == [5, 75, 40]
    assert counts(1000) == [5, 100, 40]
    assert counts(1) == [1, 0, 0]


def test_a_text_is_read_only_as_far_as_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("converter.text.PIECE_CHARS", 100)
    path = tmp_path / "text.txt"
    path.write_bytes(b"w1 w2 w3\n" * 3000 + b"\xff\xff")
    assert len(read_ids(TextTokenizer(by_word), [path], 60)[0]) == 60
    with pytest.raises(UsageError, match=r"text\.txt: not UTF-8"):
        read_ids(TextTokenizer(by_word), [path], 10000)


@pytest.mark.parametrize("separator", ["\n", " ", ""])
def test_pieces_keep_every_character(separator: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("converter.text.PIECE_CHARS", 10)
    path = tmp_path / "text.txt"
    whole = separator.join(["größe", "x" * 33, "\r\n", "yy"] * 9)
    path.write_text(whole, encoding="utf-8", newline="")
    pieces: list[str] = []
    read_ids(TextTokenizer(lambda piece: pieces.append(piece) or [0]), [path], 10**6)
    assert "".join(pieces) == whole and max(map(len, pieces)) < 100
    assert len(pieces) > 5


def test_disk_space_is_checked_first(source: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tiny model's calibration is refused on next to no disk, and wants no more than it takes."""
    for free, enough in ((100_000, False), (2_000_000, True)):
        monkeypatch.setattr("shutil.disk_usage", lambda path, free=free: type("Usage", (), {"free": free})())
        if enough:
            calibrate(source, [text], out=tmp_path / "out", tokens=40, window=20)
        else:
            with pytest.raises(ConvertError, match=r"out: not enough space: found 100\.0 kB free"):
                calibrate(source, [text], out=tmp_path / "out", tokens=40, window=20)


def test_texts_that_cannot_be_used(source: Path, tmp_path: Path) -> None:
    (tmp_path / "empty.txt").touch()
    (tmp_path / "binary").write_bytes(b"\x7fELF\0\0\1")
    (tmp_path / "latin").write_bytes(b"caf\xe9")
    words(tmp_path / "short.txt", 11)
    for name, message in (
        ("empty.txt", r"empty\.txt: is empty"),
        ("binary", "binary: holds NUL"),
        ("latin", "latin: not UTF-8"),
        ("missing", "missing: cannot be read: No such file"),
        (".", "cannot be read: Is a directory"),
        ("short.txt", "hold 11 tokens, expected at least one window of 20"),
    ):
        with pytest.raises(UsageError, match=message):
            calibrate(source, [tmp_path / name], out=tmp_path / "out", window=20)
    with pytest.raises(UsageError, match="tokens: found 2 for 2 texts"):
        calibrate(source, [tmp_path / "short.txt", words(tmp_path / "b.txt", 12)], out=tmp_path / "out", tokens=2)
    with pytest.raises(UsageError, match=r"short\.txt: the same text as .*short\.txt, expected each text once"):
        calibrate(source, 2 * [tmp_path / "short.txt"], out=tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(UsageError, match="no text"):
        calibrate(source, [], out=tmp_path / "out")


def test_options_that_cannot_be_used(source: Path, text: Path, tmp_path: Path) -> None:
    for options, message in (
        ({"tokens": 1}, "tokens: found 1"),
        ({"window": 1}, "window: found 1"),
        ({"window": 1000}, "window: found 1000, expected at most 512"),
        ({"threshold": -1.0}, "threshold: found -1"),
        ({"threshold": float("nan")}, "threshold: found nan"),
    ):
        with pytest.raises(UsageError, match=message):
            calibrate(source, [text], out=tmp_path / "out", **options)


def test_tokenizers_that_cannot_be_used(source: Path, text: Path, tmp_path: Path) -> None:
    (source / "tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointError, match="the tokenizer cannot be loaded"):
        calibrate(source, [text], out=tmp_path / "out")
    (source / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match=r"no tokenizer.*copy the tokenizer files"):
        calibrate(source, [text], out=tmp_path / "out")


def test_a_text_that_only_claims_to_be_compressed(tmp_path: Path) -> None:
    path = tmp_path / "text.zst"
    path.write_bytes(b"plain")
    with pytest.raises(UsageError, match=r"text\.zst: not zstandard data"):
        read_ids(TextTokenizer(by_word), [path], 9)


def test_texts_compressed_by_zstandard(tmp_path: Path) -> None:
    path, tokenizer = tmp_path / "text.zst", TextTokenizer(by_word)
    plain = "".join(f"w{n}\n" for n in np.random.default_rng(0).integers(0, WORDS, 50_000)).encode()
    packed = zstandard.ZstdCompressor().compress(plain)
    path.write_bytes(packed + packed)
    assert len(read_ids(tokenizer, [path], 200_000)[0]) == 100_000
    for end in (3, len(packed) // 2, len(packed) - 1, len(packed) + 5):
        path.write_bytes((packed + packed)[:end])
        with pytest.raises(UsageError, match=r"text\.zst: ends within a zstandard frame"):
            read_ids(tokenizer, [path], 200_000)
    path.write_bytes(packed[:-1])
    assert len(read_ids(tokenizer, [path], 10)[0]) == 10  # read only as far as needed


def run(*arguments: object) -> Any:
    return CliRunner().invoke(command, [str(one) for one in arguments], catch_exceptions=False)


def test_the_command(source: Path, text: Path, tmp_path: Path) -> None:
    arguments = (source, "--text", text, "--window", 20, "--out", tmp_path / "out")
    shown = run(*arguments)
    assert shown.exit_code == 0
    lines = shown.stdout.splitlines()
    assert lines[0] == str(tmp_path / "out") and lines[1].startswith("100 tokens in windows of 20, relu")
    assert lines[2].split()[:2] == ["layer", "density"] and [line.split()[0] for line in lines[3:]] == ["0", "1"]
    density = read_description(tmp_path / "out")["layers"][1]["density"]
    assert lines[4].split()[1] == f"{100 * density:.1f}"
    assert "layer 1 of 2" in shown.stderr and "left" in shown.stderr
    assert "note: 100 tokens, as the texts hold no more of the 10000 asked" in shown.stderr
    again = run(*arguments, "--json")
    assert json.loads(again.stdout) == read_description(tmp_path / "out")
    assert "layer" not in again.stderr


def test_an_interrupted_command_says_what_stays(
    source: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    out = calibrate(source, [text], out=tmp_path / "out", tokens=40, window=20)
    monkeypatch.setattr(sys.modules["converter.calibrate"], "open_model", interrupt)
    for directory, said in ((out, f"that was in {out} stays"), (tmp_path / "new", "run again to continue")):
        done = CliRunner().invoke(command, [str(source), "--text", str(text), "--out", str(directory), "--force"])
        assert done.exit_code == 130 and said in done.stderr


def test_the_command_names_its_output_after_the_source(
    source: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(source, "--text", text, "--window", 20, "--tokens", 40).exit_code == 0
    assert read_description(tmp_path / "source-calibration")["tokens"] == 40


def test_the_command_says_what_silu_lacks(text: Path, tmp_path: Path) -> None:
    source = tiny(tmp_path / "source", activation="silu")
    shown = run(source, "--text", text, "--window", 20, "--out", tmp_path / "out")
    assert "no neuron is exactly zero; --threshold" in shown.stdout and shown.stdout.splitlines()[3].split()[1] == "-"
    shown = run(source, "--text", text, "--window", 20, "--out", tmp_path / "two", "--threshold", "0.1")
    assert "|act(g)| > 0.1" in shown.stdout


def test_an_interrupt_says_how_to_go_on(
    source: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*arguments: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("flashsparse.cli.progress.Lines.__call__", interrupt)
        stopped = run(source, "--text", text, "--window", 20, "--out", tmp_path / "out")
    assert stopped.exit_code == 130 and "run again to continue" in stopped.stderr
    assert run(source, "--text", text, "--window", 20, "--out", tmp_path / "out").exit_code == 0


def seconds_left(monkeypatch: pytest.MonkeyPatch, reports: list[tuple[float, str, int]]) -> list[str]:
    from flashsparse.cli.progress import Lines

    said: list[str] = []
    clock: Callable[[], float] = iter([now for now, _, _ in reports]).__next__
    monkeypatch.setattr("flashsparse.cli.progress.time.monotonic", clock)
    monkeypatch.setattr("flashsparse.cli.progress.click.echo", lambda line, err: said.append(line))
    lines = Lines()
    for _, what, done in reports:
        lines(what, done, 100)
    return said


def test_the_time_left_counts_from_the_first_report(monkeypatch: pytest.MonkeyPatch) -> None:
    # Resumed at 40: ten per cent took 60 s.
    said = seconds_left(monkeypatch, [(5.0, "layer 3", 40), (35.0, "layer 3", 45), (65.0, "layer 4", 50)])
    assert said == [" 40%  layer 3", " 50%  layer 4, about 5 min 00 s left"]


def test_the_last_line_says_that_all_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    reports = [(5.0, "layer 1", 10), (6.0, "layer 2", 99), (7.0, "layer 2", 100), (8.0, "layer 2", 100)]
    assert seconds_left(monkeypatch, reports)[1:] == [" 99%  layer 2, about 0 s left", "100%  layer 2"]


@pytest.mark.parametrize("resume", [True, False])
def test_a_directory_of_something_else_is_refused_and_left(source: Path, text: Path, resume: bool) -> None:
    before = sorted(source.iterdir())
    with pytest.raises(UsageError, match=r"config\.json and no calibration.*--out"):
        calibrate(source, [text], out=source, tokens=40, window=20, resume=resume)
    assert sorted(source.iterdir()) == before
