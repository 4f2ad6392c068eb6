"""`flashsparse convert` as a user meets it: summary, progress lines, one-line errors, exit codes, interrupt."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from flashsparse.pack.manifest import Manifest
from flashsparse.pack.verify import verify
from tests.checkpoints import write_checkpoint

ROOT = Path(__file__).parents[2]
MAIN = "from flashsparse.cli import main; main()"
# Stops at a file, as a user does with Ctrl-C, and waits there.
SLOW = (
    """
import signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # shells start background jobs with the signal ignored
import converter.journal as journal
add = journal.Journal.add_file
def slow(self, name, entry):
    add(self, name, entry)
    if name == "flash-000.safetensors":
        print("here", file=sys.stderr, flush=True)
        time.sleep(60)
journal.Journal.add_file = slow
"""
    + MAIN
)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "source", dtype="BF16")


def run(*arguments: object, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", MAIN, "convert", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=os.environ | (env or {}))


def test_summary(source: Path, tmp_path: Path) -> None:
    done = run(source, tmp_path / "pack")
    assert done.returncode == 0
    for line in (
        r"tier +exact, gate full",
        r"activation +relu \(from config\.json\)",
        r"weights +BF16, as in the source",
        r"size +[\d.]+ [kM]B, of which resident [\d.]+ kB",
        r"record +256 bytes, stride 256",
        r"direct read 2\.00 times a record at 512-byte sectors \(2\.00 with a stride of 512, 100\.0% more disk\)",
    ):
        assert re.search(line, done.stdout), done.stdout
    assert [line.split()[-1] for line in done.stderr.splitlines()] == [
        "config.json", "flash-000.safetensors", "flash-001.safetensors", "resident.safetensors", "resident.safetensors",
    ]  # fmt: skip
    assert [line[:4] for line in done.stderr.splitlines()][::4] == ["  0%", "100%"]
    assert "\x1b" not in done.stdout + done.stderr


def test_options(source: Path, tmp_path: Path) -> None:
    options = ["--bits", "4", "--group-size", "32", "--tier", "dense", "--gate", "full", "--activation", "fatrelu:0.5"]
    done = run(source, tmp_path / "pack", *options)
    assert done.returncode == 0
    assert re.search(r"activation +fatrelu:0\.5 \(from --activation\)", done.stdout)
    manifest = Manifest.load(tmp_path / "pack")
    assert (manifest.tier, vars(manifest.quant)) == ("dense", {"bits": 4, "group_size": 32})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "code", "words"),
    [
        (["--bits", "5"], 2, "--bits"),
        (["--gate", "small"], 2, "--gate"),
        (["--gate", "compact", "--bits", "4"], 2, "the gate itself is smaller"),
        (["--bits", "4", "--group-size", "128"], 2, "128 does not divide hidden_size"),
        (["--activation", "gelu"], 2, "gelu"),
        (["--activation", "silu", "--tier", "exact"], 1, "exact zeros"),
    ],
)
def test_errors(source: Path, tmp_path: Path, options: list[str], code: int, words: str) -> None:
    done = run(source, tmp_path / "pack", *options)
    assert done.returncode == code and words in done.stderr
    assert len(done.stderr.splitlines()) == 1 and done.stdout == ""


def test_missing_source(tmp_path: Path) -> None:
    done = run(tmp_path / "nowhere", tmp_path / "pack")
    assert done.returncode == 2 and "no such directory" in done.stderr and len(done.stderr.splitlines()) == 1


def test_offline_repository(tmp_path: Path) -> None:
    done = run("nobody/nothing", tmp_path / "pack", env={"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hub")})
    assert done.returncode == 1 and "nobody/nothing: no such directory, and the repository cannot be" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_existing_pack(source: Path, tmp_path: Path) -> None:
    assert run(source, tmp_path / "pack").returncode == 0
    done = run(source, tmp_path / "pack")
    assert done.returncode == 1 and "--force" in done.stderr
    assert run(source, tmp_path / "pack", "--resume").returncode == 0
    assert run(source, tmp_path / "pack", "--force", "--bits", "8").returncode == 0


def test_ctrl_c_leaves_work_to_resume(source: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-c", SLOW, "convert", str(source), str(tmp_path / "pack")]
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True) as child:
        assert child.stderr is not None
        while child.stderr.readline().strip() != "here":
            assert child.poll() is None
        child.send_signal(signal.SIGINT)
        rest = child.stderr.read()
    assert child.returncode == 130
    assert rest.splitlines()[-1].startswith("Interrupted; the work so far is kept in ") and "--resume" in rest
    assert "Traceback" not in rest
    done = run(source, tmp_path / "pack", "--resume")
    assert done.returncode == 0 and "flash-000" not in done.stderr
    assert verify(tmp_path / "pack") == []


def test_bar_on_a_terminal(source: Path, tmp_path: Path) -> None:
    pty = pytest.importorskip("pty")
    ours, theirs = pty.openpty()
    command = [sys.executable, "-c", MAIN, "convert", str(source), str(tmp_path / "pack")]
    child = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=theirs, env=os.environ | {"TERM": "xterm"}
    )
    os.close(theirs)
    shown = b""
    while True:
        try:
            part = os.read(ours, 65536)
        except OSError:  # Linux says EIO when the other side is closed
            break
        if not part:
            break
        shown += part
    os.close(ours)
    stdout, _ = child.communicate()
    assert child.returncode == 0 and b"\x1b[" in shown and b"tier" in stdout


def test_help_states_every_default() -> None:
    done = run("--help")
    assert done.returncode == 0
    text = " ".join(done.stdout.split())
    for default in ("16", "64", "auto", "full", "config.json's", "off"):
        assert f"[default: {default}]" in text


def test_help_is_light() -> None:
    code = "import sys\nfrom flashsparse.cli.convert import convert\nprint([*sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    for heavy in ("numpy", "mlx", "mlx.core", "rich", "huggingface_hub", "transformers", "converter"):
        assert f"'{heavy}'" not in done.stdout
