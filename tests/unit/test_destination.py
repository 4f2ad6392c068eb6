"""Names and paths that no file can have, as source and destination of a conversion: refused in one line."""

from __future__ import annotations

from pathlib import Path

import pytest

from converter.convert import convert
from flashsparse.errors import ConvertError, FlashSparseError, PackError, UsageError
from flashsparse.pack.manifest import Manifest
from tests.checkpoints import write_checkpoint


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "source", layers=1)


@pytest.mark.parametrize("name", ["x" * 247, "x" * 255, "é" * 124, "a\0b"])
def test_names(source: Path, tmp_path: Path, name: str) -> None:
    with pytest.raises(UsageError) as caught:
        convert(source, f"{tmp_path}/{name}")
    assert len(str(caught.value).splitlines()) == 1 and "\0" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_the_longest_name(source: Path, tmp_path: Path) -> None:
    assert Manifest.load(convert(source, tmp_path / ("x" * 246))).layers == 1


@pytest.mark.parametrize("folder", ["x" * 256, "/".join(["x" * 200] * 30)])
def test_folders(source: Path, tmp_path: Path, folder: str) -> None:
    with pytest.raises(ConvertError, match="too long"):
        convert(source, tmp_path / folder / "pack")


def test_a_file_in_the_way(source: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for folder in ("file", "file/deeper"):
        with pytest.raises(ConvertError, match="a file is in the way: name another destination"):
            convert(source, tmp_path / folder / "pack")


@pytest.mark.parametrize("force", [True, False])
@pytest.mark.parametrize("inside", ["new", "deep/er/new", "flash-000.safetensors", "config.json"])
def test_inside_another_pack(source: Path, tmp_path: Path, inside: str, force: bool) -> None:
    pack = convert(source, tmp_path / "pack")
    (tmp_path / "link").symlink_to(pack)
    before = {path: path.read_bytes() for path in pack.iterdir()}
    for folder in (pack, tmp_path / "link"):
        with pytest.raises(ConvertError, match=r"lies inside the pack .*/pack: name a destination outside"):
            convert(source, folder / inside, force=force)
    assert {path: path.read_bytes() for path in pack.iterdir()} == before


def test_a_pack_around_another_is_not_replaced(source: Path, tmp_path: Path) -> None:
    outer, inner = convert(source, tmp_path / "outer"), convert(source, tmp_path / "inner")
    inner.rename(outer / "inner")
    with pytest.raises(ConvertError, match="holds another pack, inner"):
        convert(source, outer, force=True)
    assert Manifest.load(outer / "inner").layers == 1


def test_nothing_is_no_name(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(convert(source, tmp_path / "pack"))
    with pytest.raises(UsageError, match="the destination is empty"):
        convert(source, "", force=True)
    with pytest.raises(UsageError, match="'': no such directory"):
        convert("", tmp_path / "other")


def test_a_file_system_without_folders(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:  # as /proc does
        raise FileNotFoundError

    monkeypatch.setattr("converter.publish.os.open", refuse)
    with pytest.raises(ConvertError, match="cannot be made; name a destination on another file system"):
        convert(source, tmp_path / "pack")


def test_a_loop_of_links(source: Path, tmp_path: Path) -> None:
    (tmp_path / "one").symlink_to(tmp_path / "two")
    (tmp_path / "two").symlink_to(tmp_path / "one")
    with pytest.raises(FlashSparseError):
        convert(source, tmp_path / "one")


@pytest.mark.parametrize("name", ["a\0b", "x" * 5000, "~nobody-of-this-name/a"])
def test_sources(tmp_path: Path, name: str) -> None:
    with pytest.raises(UsageError, match="no such directory"):
        convert(name, tmp_path / "pack")


def test_packs() -> None:
    with pytest.raises(PackError, match="NUL"):
        Manifest.load("a\0b")
