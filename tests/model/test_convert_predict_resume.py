"""Conversion to tier predict goes on after any failure with the same bytes, and only with the same options."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from converter.convert import convert
from flashsparse.errors import ConvertError, UsageError
from tests.model.convert_kills import CALLS
from tests.model.test_calibrate import files, tiny, words

ROOT = Path(__file__).parents[2]
WINDOW = 15


class Stopped(BaseException):
    """Stands for the end of the process: nothing in the converter catches it."""


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return tiny(tmp_path / "source", intermediate=32)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    return words(tmp_path / "text.txt", 60)


class Failing:
    """Counts the system calls that change the disk, and raises at number `last` of them."""

    def __init__(self, patch: pytest.MonkeyPatch, last: int, problem: BaseException, names: tuple[str, ...]) -> None:
        self.count, self.last, self.problem = 0, last, problem
        for name in names:
            patch.setattr(os, name, self.counted(getattr(os, name)))

    def counted(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any, **options: Any) -> Any:
            self.count += 1
            if self.count == self.last:
                raise self.problem
            return call(*arguments, **options)

        return run


def options(text: Path | None, target: str | None = None) -> dict[str, Any]:
    chosen: dict[str, Any] = {"tier": "predict"}
    return chosen if text is None else chosen | {"calibrate": text, "calibrate_window": WINDOW, "target": target}


@pytest.mark.parametrize("target", [None, "density-ratio:0.8", "ppl-ratio:1.5"])
def test_stops_at_every_few_steps(source: Path, text: Path, tmp_path: Path, target: str | None) -> None:
    chosen = options(text, target)
    with pytest.MonkeyPatch.context() as patch:
        counter = Failing(patch, 0, Stopped(), CALLS)
        expected = files(convert(source, tmp_path / "expected", **chosen))
    dst, steps = tmp_path / "pack", range(1, counter.count, max(1, counter.count // 12))
    for last in steps:
        with pytest.MonkeyPatch.context() as patch, pytest.raises(Stopped):
            Failing(patch, last, Stopped(), CALLS)
            convert(source, dst, **chosen)
        assert files(convert(source, dst, resume=True, **chosen)) == expected, last
        assert not dst.with_name(".pack.partial").exists()
        shutil.rmtree(dst)


def test_layers_that_are_finished_are_not_fitted_again(
    source: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import converter.predict as stage

    fitted: list[int] = []
    fit_layer = stage.fit_layer

    def once(recipe: Any, layer: int, *rest: Any) -> Any:
        if layer == 1 and 1 not in fitted:
            fitted.append(layer)
            raise KeyboardInterrupt
        fitted.append(layer)
        return fit_layer(recipe, layer, *rest)

    monkeypatch.setattr(stage, "fit_layer", once)
    for given in (text, None):
        fitted.clear()
        dst = tmp_path / f"pack-{given is None}"
        with pytest.raises(KeyboardInterrupt):
            convert(source, dst, **options(given))
        convert(source, dst, resume=True, **options(given))
        assert fitted == [0, 1, 1]


@pytest.mark.parametrize("share", [0.15, 0.5, 0.9])
def test_disk_full(source: Path, text: Path, tmp_path: Path, share: float) -> None:
    chosen = options(text)
    with pytest.MonkeyPatch.context() as patch:
        counter = Failing(patch, 0, Stopped(), ("write",))
        expected = files(convert(source, tmp_path / "expected", **chosen))
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    with pytest.MonkeyPatch.context() as patch, pytest.raises(ConvertError, match="disk full") as problem:
        Failing(patch, int(counter.count * share), full, ("write",))
        convert(source, tmp_path / "pack", **chosen)
    assert str(problem.value).endswith("run again with --resume to continue") and ".pack.partial" in str(problem.value)
    assert not (tmp_path / "pack").exists()
    assert files(convert(source, tmp_path / "pack", resume=True, **chosen)) == expected


def test_resume_with_other_options(source: Path, text: Path, tmp_path: Path) -> None:
    chosen = options(text)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Stopped):
        Failing(patch, 20, Stopped(), ("fsync",))
        convert(source, tmp_path / "pack", **chosen)
    other = words(tmp_path / "other.txt", 60, seed=1)
    for name, value in (
        ("calibrate", other),
        ("calibrate-tokens", 50),
        ("target", "density:0.3"),
        ("predictor-bits", 3),
        ("predictor", "svd"),
        ("select", "topk"),
    ):
        with pytest.raises(ConvertError, match=f"cannot resume: option {name}: found "):
            convert(source, tmp_path / "pack", resume=True, **{**chosen, name.replace("-", "_"): value})
    with pytest.raises(ConvertError, match="cannot resume: option "):
        convert(source, tmp_path / "pack", resume=True)
    assert convert(source, tmp_path / "pack", resume=True, **chosen) == tmp_path / "pack"


def test_mistakes_leave_nothing_behind(source: Path, text: Path, tmp_path: Path) -> None:
    (source / "tokenizer.json").unlink()
    with pytest.raises(Exception, match="no tokenizer"):
        convert(source, tmp_path / "pack", **options(text))
    with pytest.raises(UsageError, match="expected at least one window of 15"):
        convert(tiny(tmp_path / "good"), tmp_path / "pack", **options(words(tmp_path / "few.txt", 9)))
    with pytest.raises(UsageError, match="--calibrate-window: found 513, expected at most 512"):
        convert(tmp_path / "good", tmp_path / "pack", tier="predict", calibrate=text, calibrate_window=513)
    assert not (tmp_path / "pack").exists() and not (tmp_path / ".pack.partial").exists()


@pytest.mark.slow
@pytest.mark.parametrize("target", ["none", "value-recall:0.9", "ppl-ratio:1.5"])
def test_kills(tmp_path: Path, target: str) -> None:
    command = [sys.executable, "-m", "tests.model.predict_kills", str(tmp_path), target, "12"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[-2] == "12"
