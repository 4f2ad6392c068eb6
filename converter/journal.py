"""The journal of a conversion: what it was asked to do and which files are finished. One JSON object per line.

A line is appended and synced only after the file it names is; a line that was cut short by a crash is dropped.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from converter.disk import sync_file, write_all
from flashsparse.pack.layout import FileEntry

VERSION = 1


@dataclass
class Journal:
    """`header` is the first line; `files` the finished files; `digest` the finished pack's, or None."""

    path: Path
    header: dict[str, Any]
    files: dict[str, FileEntry] = field(default_factory=dict)
    digest: str | None = None

    @staticmethod
    def create(path: Path, header: dict[str, Any]) -> Journal:
        """Starts a new journal, replacing one that is there."""
        path.unlink(missing_ok=True)
        journal = Journal(path, {"version": VERSION} | header)
        journal._append(journal.header)
        return journal

    @staticmethod
    def load(path: Path) -> Journal | None:
        """Reads a journal and cuts off what follows its last whole line. None when there is nothing to resume."""
        try:
            raw = path.read_bytes()
        except FileNotFoundError:
            return None
        lines, good = _whole_lines(raw)
        if not lines or lines[0].get("version") != VERSION:
            return None
        if good < len(raw):
            os.truncate(path, good)
        journal = Journal(path, lines[0])
        for line in lines[1:]:
            journal._apply(line)
        return journal

    def add_file(self, name: str, entry: FileEntry) -> None:
        """Records a finished file; it must have been synced."""
        self._append({"file": name, "entry": entry.to_dict()})
        self.files[name] = entry

    def add_digest(self, digest: str) -> None:
        """Records that the pack is complete and may be published."""
        self._append({"digest": digest})
        self.digest = digest

    def _apply(self, line: dict[str, Any]) -> None:
        if "file" in line:
            entry = line["entry"]
            self.files[line["file"]] = FileEntry(**entry | {"blocks": tuple(entry.get("blocks", ()))})
        elif "digest" in line:
            self.digest = line["digest"]

    def _append(self, line: dict[str, Any]) -> None:
        fd = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        try:
            write_all(fd, json.dumps(line, sort_keys=True).encode() + b"\n")
            sync_file(fd)
        finally:
            os.close(fd)


def _whole_lines(raw: bytes) -> tuple[list[dict[str, Any]], int]:
    """The objects of the leading valid lines and how many bytes they take."""
    lines, good = [], 0
    for text in raw.split(b"\n")[:-1]:
        try:
            value = json.loads(text)
        except ValueError:
            break
        if not isinstance(value, dict):
            break
        lines.append(value)
        good += len(text) + 1
    return lines, good
