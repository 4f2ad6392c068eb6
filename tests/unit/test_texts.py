"""Digests of texts, and the refusal to judge a predictor on what it was calibrated on."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from flashsparse.errors import UsageError
from flashsparse.sparsity.texts import file_sha256, read_texts, refuse_same_text, texts_sha256


def files(folder: Path, *texts: str) -> list[Path]:
    paths = [folder / f"{index}.txt" for index in range(len(texts))]
    for path, text in zip(paths, texts, strict=True):
        path.write_text(text, encoding="utf-8")
    return paths


def test_digests(tmp_path: Path) -> None:
    one, two = files(tmp_path, "one", "two")
    digests = [hashlib.sha256(text).hexdigest() for text in (b"one", b"two")]
    assert [file_sha256(one), file_sha256(two)] == digests
    joined = hashlib.sha256("\n".join(sorted(digests)).encode()).hexdigest()
    assert texts_sha256([one, two]) == texts_sha256([two, one]) == joined
    assert texts_sha256([one]) != texts_sha256([one, one])


def test_the_calibration_text_is_refused(tmp_path: Path) -> None:
    one, two, three = files(tmp_path, "one", "two", "three")
    for seen in (file_sha256(one), texts_sha256([one])):
        with pytest.raises(UsageError, match=r"0\.txt.*calibrated on this text"):
            refuse_same_text([two, one], seen)
        refuse_same_text([two, three], seen)
    with pytest.raises(UsageError, match="calibrated on them"):
        refuse_same_text([two, one], texts_sha256([one, two]))
    refuse_same_text([one, three], texts_sha256([one, two]))
    refuse_same_text([one], None)


def test_reading(tmp_path: Path) -> None:
    paths = files(tmp_path, "größe\r\n", "two")
    assert read_texts(paths) == "größe\r\ntwo"
    assert [read_texts(paths, n) for n in (1, 7, 8, 99)] == ["g", "größe\r\n", "größe\r\nt", "größe\r\ntwo"]


def test_texts_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "latin").write_bytes(b"caf\xe9 au lait")
    with pytest.raises(UsageError, match="latin: not UTF-8 text"):
        read_texts([tmp_path / "latin"])
    for use in (read_texts, texts_sha256):
        with pytest.raises(UsageError, match=r"missing\.txt: cannot be read: No such file"):
            use([tmp_path / "missing.txt"])
        with pytest.raises(UsageError, match="cannot be read: Is a directory"):
            use([tmp_path])
    (tmp_path / "empty").touch()
    with pytest.raises(UsageError, match="empty: no text"):
        read_texts([tmp_path / "empty"])
