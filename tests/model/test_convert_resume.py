"""Conversions that stop: killed, interrupted, out of disk, with other options, beside others; and replacing a pack."""

from __future__ import annotations

import errno
import os
import resource
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import converter.publish
from converter.convert import convert, staging_directory
from converter.disk import swap
from converter.journal import Journal
from converter.publish import Staging
from flashsparse.errors import CheckpointError, ConvertError, PackError, UsageError
from flashsparse.pack.layout import FileDigest
from flashsparse.pack.manifest import Manifest, read_manifest
from flashsparse.pack.verify import verify
from tests.checkpoints import write_checkpoint
from tests.model.convert_kills import check_same

ROOT = Path(__file__).parents[2]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "source", dtype="F16", shards=2)


class Stop(Exception):
    """Stops a conversion from its progress callback."""


def stop_at(file: str, then: type[BaseException] = Stop) -> Callable[[str, int, int], None]:
    def progress(name: str, done: int, total: int) -> None:
        if name == file:
            raise then

    return progress


def stopped(source: Path, dst: Path, file: str = "flash-001.safetensors", **options: Any) -> Path:
    """Leaves an unfinished conversion to `dst` that stopped when `file` began; returns its staging directory."""
    with pytest.raises(Stop):
        convert(source, dst, progress=stop_at(file), **options)
    return staging_directory(dst)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("bits", "scenario", "least"),
    [(16, "new", 60), (16, "replace", 60), (16, "no-swap", 25), (16, "zstd", 60), (4, "new", 15)],
)
def test_killed_at_every_step(tmp_path: Path, bits: int, scenario: str, least: int) -> None:
    command = [sys.executable, "-m", "tests.model.convert_kills", str(tmp_path), str(bits), scenario]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[-1]) >= least


def test_resume_writes_only_what_is_missing(source: Path, tmp_path: Path) -> None:
    staging = stopped(source, tmp_path / "pack")
    assert not (tmp_path / "pack").exists()
    first = (staging / "pack" / "flash-000.safetensors").stat()
    begun: list[str] = []
    convert(source, tmp_path / "pack", resume=True, progress=lambda name, done, total: begun.append(name))
    assert {*begun} == {"flash-001.safetensors", "resident.safetensors"}
    assert (tmp_path / "pack" / "flash-000.safetensors").stat().st_mtime_ns == first.st_mtime_ns
    check_same(tmp_path / "pack", convert(source, tmp_path / "whole"))


def test_progress_counts_every_byte(source: Path, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    pack = convert(source, tmp_path / "pack", bits=8, progress=lambda name, done, total: seen.append((done, total)))
    size = sum(entry.bytes for entry in Manifest.load(pack).files.values())
    assert seen == sorted(seen) and seen[0] == (0, size) and seen[-1] == (size, size)


def test_a_file_that_changed_in_staging_is_written_again(source: Path, tmp_path: Path) -> None:
    staging = stopped(source, tmp_path / "pack")
    (staging / "pack" / "flash-000.safetensors").write_bytes(b"short")
    check_same(convert(source, tmp_path / "pack", resume=True), convert(source, tmp_path / "whole"))


def test_resume_with_nothing_to_resume(source: Path, tmp_path: Path) -> None:
    check_same(convert(source, tmp_path / "pack", resume=True), convert(source, tmp_path / "whole"))


def test_resume_of_a_complete_pack(source: Path, tmp_path: Path) -> None:
    pack = convert(source, tmp_path / "pack")
    before = {path: path.stat().st_mtime_ns for path in pack.iterdir()}
    assert convert(source, pack, resume=True) == pack
    assert convert(source, pack, resume=True, force=True) == pack
    assert convert(source, pack, resume=True, tier="exact") == pack
    assert {path: path.stat().st_mtime_ns for path in pack.iterdir()} == before


@pytest.mark.parametrize("bits", [16, 4])
def test_resume_of_a_complete_pack_that_is_another(source: Path, tmp_path: Path, bits: int) -> None:
    pack = convert(source, tmp_path / "pack", bits=bits)
    with pytest.raises(ConvertError, match=r"quant: found.*expected.*--force"):
        convert(source, pack, resume=True, bits=8)
    with pytest.raises(ConvertError, match=r"activation.*--force"):
        convert(source, pack, resume=True, bits=bits, activation="relu2")
    other = write_checkpoint(tmp_path / "other", dtype="F16", seed=5)
    with pytest.raises(ConvertError, match=r"flash-000.*differs from the source.*--force"):
        convert(other, pack, resume=True, bits=bits)
    (source / "tokenizer.json").write_text("{}")
    with pytest.raises(ConvertError, match=r"tokenizer\.json.*--force"):
        convert(source, pack, resume=True, bits=bits)


def test_resume_of_a_damaged_pack(source: Path, tmp_path: Path) -> None:
    pack = convert(source, tmp_path / "pack")
    os.truncate(pack / "flash-001.safetensors", 20000)
    with pytest.raises(ConvertError, match=r"flash-001.*--force"):
        convert(source, pack, resume=True)
    check_same(convert(source, pack, resume=True, force=True), convert(source, tmp_path / "whole"))


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"bits": 4}, "option bits: found 4, expected 8"),
        ({"group_size": 32}, "option group-size: found 32, expected 64"),
        ({"tier": "dense"}, "option tier: found 'dense', expected 'exact'"),
        ({"activation": "relu2"}, "option activation"),
        ({"activation": "relu"}, "option activation"),
    ],
)
def test_resume_refuses_other_options(source: Path, tmp_path: Path, options: dict[str, Any], named: str) -> None:
    stopped(source, tmp_path / "pack", bits=8)
    with pytest.raises(ConvertError) as caught:
        convert(source, tmp_path / "pack", **{"bits": 8, "resume": True} | options)
    assert named in str(caught.value) and "--force" in str(caught.value)


def test_resume_refuses_another_codec(source: Path, tmp_path: Path) -> None:
    stopped(source, tmp_path / "pack")
    with pytest.raises(ConvertError, match="option codec: found 'zstd', expected None"):
        convert(source, tmp_path / "pack", codec="zstd", resume=True)


def test_resume_refuses_another_source(source: Path, tmp_path: Path) -> None:
    stopped(source, tmp_path / "pack")
    shard = max(source.glob("*.safetensors"))
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    with pytest.raises(ConvertError, match=f"source file {shard.name}"):
        convert(source, tmp_path / "pack", resume=True)
    (source / "merges.txt").write_text("a b")
    with pytest.raises(ConvertError, match="source file"):
        convert(source, tmp_path / "pack", resume=True)
    check_same(convert(source, tmp_path / "pack", force=True), convert(source, tmp_path / "whole"))


def test_source_that_changes_meanwhile(source: Path, tmp_path: Path) -> None:
    shard = max(source.glob("*.safetensors"))

    def touch(name: str, done: int, total: int) -> None:
        if name == "resident.safetensors" and done == total:
            os.utime(shard)

    with pytest.raises(CheckpointError, match=f"{shard.name}: changed while"):
        convert(source, tmp_path / "pack", progress=touch)
    assert not (tmp_path / "pack").exists()


def test_source_that_shrinks_meanwhile(source: Path, tmp_path: Path) -> None:
    def cut(name: str, done: int, total: int) -> None:
        if name == "flash-000.safetensors":
            for shard in source.glob("*.safetensors"):
                os.truncate(shard, 10000)

    with pytest.raises(CheckpointError, match=r"tensor.*the file ends before byte"):
        convert(source, tmp_path / "pack", progress=cut)


def test_unfinished_work_is_neither_used_nor_lost_silently(source: Path, tmp_path: Path) -> None:
    stopped(source, tmp_path / "pack")
    with pytest.raises(ConvertError, match=r"\.pack\.partial.*--resume.*--force"):
        convert(source, tmp_path / "pack")
    check_same(convert(source, tmp_path / "pack", force=True, bits=4), convert(source, tmp_path / "whole", bits=4))


def test_existing_destination_is_refused(source: Path, tmp_path: Path) -> None:
    pack = convert(source, tmp_path / "pack")
    with pytest.raises(ConvertError, match="already exists; use --force"):
        convert(source, pack)
    digest = Manifest.load(pack).digest
    convert(source, pack, force=True, bits=4)
    assert Manifest.load(pack).digest != digest and verify(pack) == []


@pytest.mark.parametrize("make", ["file", "directory", "link"])
def test_force_replaces_only_packs(source: Path, tmp_path: Path, make: str) -> None:
    dst = tmp_path / "precious"
    precious = tmp_path / "elsewhere" if make == "link" else dst
    if make == "file":
        precious.write_text("mine")
    else:
        precious.mkdir()
        (precious / "notes.txt").write_text("mine")
    if make == "link":
        dst.symlink_to(precious)
    with pytest.raises(ConvertError, match="not a pack"):
        convert(source, dst, force=True)
    assert (precious if make == "file" else precious / "notes.txt").read_text() == "mine"
    assert not [*tmp_path.glob(".*")]


def test_link_to_a_pack_stays_a_link(source: Path, tmp_path: Path) -> None:
    pack = convert(source, tmp_path / "pack")
    (tmp_path / "link").symlink_to("pack")
    assert convert(source, tmp_path / "link", force=True, bits=4) == pack
    assert (tmp_path / "link").is_symlink() and Manifest.load(tmp_path / "link").quant is not None


def test_nothing_is_left_beside_a_pack(source: Path, tmp_path: Path) -> None:
    convert(source, tmp_path / "packs" / "pack")
    convert(source, tmp_path / "packs" / "pack", force=True)
    assert [path.name for path in (tmp_path / "packs").iterdir()] == ["pack"]


def test_bad_request_leaves_nothing(source: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError):
        convert(source, tmp_path / "packs" / "pack", bits=4, group_size=128)
    with pytest.raises(UsageError):
        convert(source, "/")
    assert not (tmp_path / "packs").exists()


def test_disk_space_is_checked_first(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 1_000_000})())
    with pytest.raises(ConvertError, match=r"not enough space: found 1\.0 MB free"):
        convert(source, tmp_path / "pack")
    assert not [*tmp_path.glob(".*")]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_disk_full_in_the_middle(source: Path, tmp_path: Path, code: int, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = convert(source, tmp_path / "whole")
    write, left = os.write, 60_000

    def limited(fd: int, data: Any) -> int:
        nonlocal left
        if left == 0:
            raise OSError(code, os.strerror(code))
        done = write(fd, memoryview(data)[:left])  # a disk takes what fits, then nothing
        left -= done
        return done

    monkeypatch.setattr(os, "write", limited)
    with pytest.raises(ConvertError, match=r"disk full.*\.pack\.partial.*--resume") as caught:
        convert(source, tmp_path / "pack")
    assert "\n" not in str(caught.value) and not (tmp_path / "pack").exists()
    monkeypatch.setattr(os, "write", write)
    check_same(convert(source, tmp_path / "pack", resume=True), whole)


def test_file_size_limit(source: Path, tmp_path: Path) -> None:
    """A real refusal of the system, in a child: files of more than 20 kB cannot be written."""
    limit = 20_000
    main = "from flashsparse.cli import main; main()"
    command = [sys.executable, "-c", main, "convert", str(source), str(tmp_path / "pack")]
    done = subprocess.run(
        command,
        cwd=ROOT,
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "disk full" in done.stderr.splitlines()[-1] and "--resume" in done.stderr.splitlines()[-1]
    check_same(convert(source, tmp_path / "pack", resume=True), convert(source, tmp_path / "whole"))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "none", str(disk)]
    if sys.platform != "linux" or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("needs the right to mount a small file system")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_small_disk(source: Path, small_disk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (small_disk / "ballast").write_bytes(bytes(1_900_000))
    with pytest.raises(ConvertError, match="not enough space"):
        convert(source, small_disk / "pack")
    with monkeypatch.context() as patch:
        patch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 1 << 40})())
        with pytest.raises(ConvertError, match="disk full"):
            convert(source, small_disk / "pack")
    (small_disk / "ballast").unlink()
    check_same(convert(source, small_disk / "pack", resume=True), convert(source, tmp_path / "whole"))


def test_unwritable_parent(source: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConvertError, match="file") as caught:
        convert(source, tmp_path / "file" / "pack")
    assert "--resume" not in str(caught.value)


def test_one_conversion_at_a_time(source: Path, tmp_path: Path) -> None:
    with Staging(tmp_path / "pack"):
        for options in ({}, {"resume": True}, {"force": True}):
            with pytest.raises(ConvertError, match="another conversion to this destination is running"):
                convert(source, tmp_path / "pack", **options)
    convert(source, tmp_path / "pack")


def test_interrupt_keeps_the_work(source: Path, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        convert(source, tmp_path / "pack", progress=stop_at("resident.safetensors", KeyboardInterrupt))
    journal = Journal.load(staging_directory(tmp_path / "pack") / "journal.jsonl")
    assert journal is not None and "flash-001.safetensors" in journal.files
    check_same(convert(source, tmp_path / "pack", resume=True), convert(source, tmp_path / "whole"))


def read_pack(pack: Path) -> str:
    """Opens every file of a pack as a loader does and checks all bytes; returns the digest.

    A pack that was replaced meanwhile (its manifest is another at the end) is read again.
    """
    while True:
        digest = read_manifest(pack).digest
        try:
            manifest = Manifest.load(pack)
            files = {name: (pack / name).open("rb") for name in manifest.files}
        except (PackError, FileNotFoundError):
            if read_manifest(pack).digest == digest:
                raise
            continue
        try:
            if read_manifest(pack).digest != digest or manifest.digest != digest:
                continue
            for name, file in files.items():
                found = FileDigest()
                found.update(file.read())
                assert found.entry().sha256 == manifest.files[name].sha256, name
            return digest
        finally:
            for file in files.values():
                file.close()


def can_swap(directory: Path) -> bool:
    for name in ("a", "b"):
        (directory / name).mkdir()
    return swap(directory / "a", directory / "b")


def test_readers_see_the_old_pack_or_the_new_one(source: Path, tmp_path: Path) -> None:
    if not can_swap(tmp_path):
        pytest.skip("this file system cannot exchange directories")
    packs = [convert(source, tmp_path / str(bits), bits=bits) for bits in (16, 4)]
    known = {Manifest.load(pack).digest for pack in packs}
    pack = convert(source, tmp_path / "pack")
    seen: list[str] = []
    problems: list[BaseException] = []
    done = threading.Event()

    def read() -> None:
        try:
            while not done.is_set():
                seen.append(read_pack(pack))
        except BaseException as problem:
            problems.append(problem)

    readers = [threading.Thread(target=read) for _ in range(3)]
    for reader in readers:
        reader.start()
    for bits in (4, 16) * 6:
        convert(source, pack, bits=bits, force=True)
    done.set()
    for reader in readers:
        reader.join()
    assert not problems and {*seen} <= known and len(seen) > 10


def test_replacing_without_an_exchange(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(converter.publish, "swap", lambda new, old: False)
    pack = convert(source, tmp_path / "pack")
    convert(source, pack, bits=4, force=True)
    check_same(pack, convert(source, tmp_path / "four", bits=4))
    assert not [*tmp_path.glob(".*")]


@pytest.mark.slow
@pytest.mark.parametrize("bits", [4, 16])
def test_memory_does_not_grow_with_the_checkpoint(tmp_path: Path, bits: int) -> None:
    """150 MB of weights go through a block of columns and a few blocks of rows."""
    shape = {"hidden": 512, "intermediate": 16384, "layers": 3, "heads": 8, "kv_heads": 8}
    source = write_checkpoint(tmp_path / "source", dtype="F16", **shape)
    code = (
        "import sys, mlx.core\n"
        "from converter import bundles\n"
        "from converter.convert import convert\n"
        "from flashsparse.memory import peak_footprint\n"
        "bundles.COLUMN_BYTES = 8 << 20\n"
        "before = peak_footprint()\n"
        f"convert(sys.argv[1], sys.argv[2], bits={bits})\n"
        "print(peak_footprint() - before)\n"
    )
    command = [sys.executable, "-c", code, str(source), str(tmp_path / "pack")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert 0 < int(done.stdout) < 100_000_000
