"""Digests of texts, and the refusal to judge a predictor on what it was calibrated on."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import zstandard

from flashsparse.errors import UsageError
from flashsparse.sparsity.texts import file_sha256, read_texts, refuse_same_text, text_digests


def files(folder: Path, *texts: str) -> list[Path]:
    paths = [folder / f"{index}.txt" for index in range(len(texts))]
    for path, text in zip(paths, texts, strict=True):
        path.write_text(text, encoding="utf-8")
    return paths


def test_digests(tmp_path: Path) -> None:
    one, two = files(tmp_path, "one", "two")
    digests = [hashlib.sha256(text).hexdigest() for text in (b"one", b"two")]
    assert [file_sha256(one), file_sha256(two)] == digests
    assert text_digests([one, two]) == text_digests([two, one]) == tuple(sorted(digests))
    assert text_digests([]) == ()


def test_a_text_given_twice_is_refused(tmp_path: Path) -> None:
    one, two, again = files(tmp_path, "one", "two", "one")
    for given in ([one, two, one], [one, two, again]):
        with pytest.raises(UsageError, match=r"\.txt: the same text as .*0\.txt, expected each text once"):
            text_digests(given)


def test_every_calibration_text_is_refused(tmp_path: Path) -> None:
    one, two, three, four = files(tmp_path, "one", "two", "three", "four")
    seen = text_digests([one, two])
    for given, name in (([one], "0"), ([two], "1"), ([three, two], "1"), ([one, two], "0")):
        with pytest.raises(UsageError, match=rf"{name}\.txt.*calibrated on this text"):
            refuse_same_text(given, seen)
    refuse_same_text([three, four], seen)
    refuse_same_text([one], ())


def test_reading(tmp_path: Path) -> None:
    paths = files(tmp_path, "größe\r\n", "two")
    assert read_texts(paths) == "größe\r\ntwo"
    assert [read_texts(paths, n) for n in (1, 7, 8, 99, 10**30)] == [
        "g",
        "größe\r\n",
        "größe\r\nt",
        *["größe\r\ntwo"] * 2,
    ]


def test_texts_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "latin").write_bytes(b"caf\xe9 au lait")
    with pytest.raises(UsageError, match="latin: not UTF-8 text"):
        read_texts([tmp_path / "latin"])
    for use in (read_texts, text_digests):
        with pytest.raises(UsageError, match=r"missing\.txt: cannot be read: No such file"):
            use([tmp_path / "missing.txt"])
        with pytest.raises(UsageError, match="cannot be read: Is a directory"):
            use([tmp_path])
    (tmp_path / "empty").touch()
    with pytest.raises(UsageError, match="empty: no text"):
        read_texts([tmp_path / "empty"])


def test_compressed_texts_read_as_plain_ones(tmp_path: Path) -> None:
    plain, packed = tmp_path / "a.txt", tmp_path / "a.zst"
    plain.write_bytes("zwölf\r\nmice\n".encode())
    packed.write_bytes(zstandard.ZstdCompressor().compress(plain.read_bytes()))
    assert read_texts([packed]) == read_texts([plain])
    assert read_texts([packed, plain], 16) == read_texts([plain, plain], 16)
    packed.write_bytes(packed.read_bytes()[:-1])
    with pytest.raises(UsageError, match=r"a\.zst: ends within a zstandard frame"):
        read_texts([packed])
