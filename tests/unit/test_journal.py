"""The conversion journal: what is read back, torn lines, and journals that cannot be resumed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from converter.journal import Journal
from flashsparse.pack.layout import FileEntry

HEADER = {"options": {"bits": 16}, "source": {"config.json": "sha256 00"}, "replace": False}
FLASH = FileEntry(bytes=20000, sha256="ab" * 32, blocks=("cd" * 32,), data_offset=16384, block_records=7)
RESIDENT = FileEntry(bytes=30000, sha256="12" * 32, blocks=("34" * 32, "56" * 32), block_bytes=4 << 20)
SMALL = FileEntry(bytes=3, sha256="78" * 32)


def written(path: Path) -> Journal:
    journal = Journal.create(path, HEADER)
    for name, entry in (("config.json", SMALL), ("flash-000.safetensors", FLASH), ("resident.safetensors", RESIDENT)):
        journal.add_file(name, entry)
    return journal


def test_round_trip(tmp_path: Path) -> None:
    journal = written(tmp_path / "journal.jsonl")
    journal.add_digest("ef" * 32)
    assert Journal.load(journal.path) == journal


def test_one_object_per_line(tmp_path: Path) -> None:
    journal = written(tmp_path / "journal.jsonl")
    lines = journal.path.read_text().splitlines()
    assert json.loads(lines[0])["options"] == {"bits": 16}
    assert len(lines) == 4


def test_every_cut_keeps_the_whole_lines(tmp_path: Path) -> None:
    whole = written(tmp_path / "whole").path.read_bytes()
    ends = [n + 1 for n, byte in enumerate(whole) if byte == ord("\n")]
    for cut in range(len(whole) + 1):
        path = tmp_path / "cut"
        path.write_bytes(whole[:cut])
        journal = Journal.load(path)
        lines = sum(end <= cut for end in ends)
        if lines == 0:
            assert journal is None
            continue
        assert journal is not None and len(journal.files) == lines - 1
        assert path.read_bytes() == whole[: ends[lines - 1]]


def test_appends_after_a_torn_line(tmp_path: Path) -> None:
    journal = written(tmp_path / "journal.jsonl")
    with journal.path.open("ab") as file:
        file.write(b'{"file": "flash-0')
    again = Journal.load(journal.path)
    assert again is not None
    again.add_digest("ef" * 32)
    assert Journal.load(journal.path) == again


@pytest.mark.parametrize("content", [b"", b"{", b"[1]\n", b"\xff\xfe\n", b'{"version": 99}\n', b'{"no": 1}\n'])
def test_nothing_to_resume(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "journal.jsonl"
    assert Journal.load(path) is None
    path.write_bytes(content)
    assert Journal.load(path) is None


def test_create_replaces(tmp_path: Path) -> None:
    path = written(tmp_path / "journal.jsonl").path
    Journal.create(path, HEADER)
    journal = Journal.load(path)
    assert journal is not None and not journal.files
