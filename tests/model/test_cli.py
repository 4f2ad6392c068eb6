"""Commands on whole tiny models, as a user runs them: real packs, exit codes, standard streams."""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from flashsparse import cli
from flashsparse.cli import demo
from tests.vector_files import read

CASE = "llama-wide-relu"
LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789 ."  # 64, one per token
TEMPLATE = "{% for m in messages %}{{ m['role'][0] }}{{ m['content'] }}.{% endfor %}"
JSON_KEYS = {
    "text",
    "tokens",
    "prompt_tokens",
    "generation_tokens",
    "prompt_tps",
    "generation_tps",
    "time_to_first_token_s",
    "start_limit_s",
    "drive",
    "load_s",
    "peak_memory_bytes",
    "runtime_bytes",
    "budget_bytes",
    "embeddings",
    "flash_bytes",
    "flash_reads",
    "flash_bytes_per_token",
    "hit_rate",
    "io_wait_s",
    "tier",
}

Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A home, cache and state directory of the test's own; no network."""
    for name, folder in (("HOME", "home"), ("XDG_CACHE_HOME", "cache"), ("XDG_STATE_HOME", "state")):
        monkeypatch.setenv(name, str(tmp_path / folder))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.fixture
def run(home: None, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Run:
    """`flashsparse ARGS` in this process, which has MLX loaded already."""

    def call(*args: str | Path, text: str = "") -> subprocess.CompletedProcess[str]:
        monkeypatch.setattr(sys, "stdin", io.StringIO(text))
        capfd.readouterr()
        with pytest.raises(SystemExit) as left:
            cli.main([str(arg) for arg in args])
        output = capfd.readouterr()
        return subprocess.CompletedProcess(args, int(left.value.code or 0), output.out, output.err)

    return call


def add_tokenizer(folder: Path, template: str | None = None) -> None:
    """A tokenizer of one token per letter, as tokenizer.json and tokenizer_config.json."""
    from tokenizers import Tokenizer, decoders, models

    tokenizer = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(LETTERS)}, merges=[]))
    tokenizer.decoder = decoders.Fuse()
    tokenizer.save(str(folder / "tokenizer.json"))
    config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    config["model_max_length"] = 16
    if template:
        config["chat_template"] = template
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with a tokenizer and a chat template."""
    folder = tmp_path_factory.mktemp("checkpoint") / "model"
    shutil.copytree(read(CASE).folder, folder)
    add_tokenizer(folder, TEMPLATE)
    return folder


@pytest.fixture(scope="session")
def pack(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from converter.convert import convert

    return convert(checkpoint, tmp_path_factory.mktemp("packs") / "model")


@pytest.fixture(scope="session")
def bare_pack(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pack without a tokenizer."""
    from converter.convert import convert

    return convert(read(CASE).folder, tmp_path_factory.mktemp("packs") / "bare")


def test_generate_json_from_a_process_of_its_own(home: None, bare_pack: Path) -> None:
    vector = read(CASE)
    prompt = " ".join(map(str, vector.prompt))
    command = [sys.executable, "-m", "flashsparse", "generate", str(bare_pack), "-p", prompt, "-n", "20", "--json"]
    command += ["--embeddings", "flash"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert set(result) >= JSON_KEYS
    assert result["tokens"] == vector.greedy[:20].tolist()
    assert (result["embeddings"], result["prefill"]["embedding_reads"] > 0) == ("flash", True)
    assert (result["prompt_tokens"], result["generation_tokens"], result["tier"]) == (64, 20, "exact")
    assert result["flash_bytes"] > 0
    assert result["flash_reads"] > 0
    assert result["peak_memory_bytes"] - result["runtime_bytes"] <= result["budget_bytes"]
    assert result["finish_reason"] == "length"


def test_a_prompt_beyond_the_context_is_refused_in_one_line(home: None, pack: Path) -> None:
    command = [sys.executable, "-m", "flashsparse", "generate", str(pack), "-p", "a" * 5000]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1
    after_plan = done.stderr.partition("runtime ")[2].splitlines()[1:]
    assert len(after_plan) == 1 and "begin a new conversation" in after_plan[0], done.stderr


def test_the_end_of_the_context_ends_the_reply(run: Run, pack: Path) -> None:
    done = run("generate", pack, "-p", "hello", "-n", "500", "--max-kv-size", "32", "--json")
    assert done.returncode == 0, done.stderr
    text, result = done.stdout.splitlines()[0], json.loads(done.stdout.splitlines()[-1])
    assert (result["finish_reason"], len(result["tokens"]), result["text"]) == ("length", 28, text)
    assert "context is full at 32 tokens" in done.stderr and "larger --max-kv-size" in done.stderr


def test_chat_keeps_the_reply_that_fills_the_context(run: Run, pack: Path) -> None:
    done = run("chat", pack, "-n", "500", "--temp", "0", "--max-kv-size", "32", text="hello\nmore\n/clear\nhello\n")
    assert done.returncode == 0, done.stderr
    first, refused, again = done.stdout.splitlines()
    assert first == again and len(first) > 20 and refused == ""
    assert done.stderr.count("context is full at 32 tokens") == 2
    assert done.stderr.count("--max-kv-size reserved 32") == 1


def test_generate_reads_standard_input_and_streams_text(run: Run, pack: Path) -> None:
    piped = run("generate", pack, "-p", "-", "-n", "12", text="hello")
    given = run("generate", pack, "-p", "hello", "-n", "12")
    assert piped.returncode == given.returncode == 0, piped.stderr + given.stderr
    assert piped.stdout == given.stdout
    assert len(piped.stdout) == 13
    assert set(piped.stdout[:-1]) <= set(LETTERS)


def test_a_seed_repeats_and_another_differs(run: Run, pack: Path) -> None:
    args = ("generate", pack, "-p", "hello", "-n", "24", "--temp", "1", "--seed")
    first, again, other = (run(*args, seed).stdout for seed in ("5", "5", "6"))
    assert first == again != other


@pytest.mark.parametrize(
    ("args", "status", "message"),
    [
        (["-p", ""], 2, "the prompt is empty"),
        (["-p", "a", "--dram", "lots"], 2, "size 'lots' is not understood"),
        (["-p", "a", "--dram", "1kB"], 1, ""),
        (["-p", "a" * 300, "--max-kv-size", "64"], 1, "--max-kv-size"),
    ],
    ids=["empty", "size", "budget", "context"],
)
def test_generate_errors_are_one_line(run: Run, pack: Path, args: list[str], status: int, message: str) -> None:
    done = run("generate", pack, *args)
    assert done.returncode == status
    last = done.stderr.splitlines()[-1]
    assert last.startswith("flashsparse: ")
    assert message in last
    assert "Traceback" not in done.stderr


def test_a_person_is_told_that_the_drive_was_not_measured(
    home: None, bare_pack: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from flashsparse.cli.options import Memory, open_engine

    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with open_engine(bare_pack, Memory()) as engine:
        assert not engine.drive_measured
    assert "flashsparse doctor" in capsys.readouterr().err
    monkeypatch.setattr(sys.stderr, "isatty", lambda: False)
    with open_engine(bare_pack, Memory()):
        assert "doctor" not in capsys.readouterr().err


def test_prompts_without_a_tokenizer_are_ids(run: Run, bare_pack: Path) -> None:
    done = run("generate", bare_pack, "-p", "once upon")
    assert done.returncode == 2
    assert "no tokenizer" in done.stderr


def test_a_damaged_manifest_is_one_line(run: Run, pack: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(pack, broken)
    text = (broken / "pack.json").read_text()
    (broken / "pack.json").write_text(text.replace('"version": 1', '"version": 99'))
    done = run("generate", broken, "-p", "a")
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1


def test_a_checkpoint_is_converted_once_into_the_cache(run: Run, checkpoint: Path, tmp_path: Path) -> None:
    args = ("generate", checkpoint, "-p", "hello", "-n", "4")
    refused = run(*args)
    assert refused.returncode == 2
    assert "flashsparse convert" in refused.stderr
    first = run(*args, "--yes")
    assert first.returncode == 0, first.stderr
    assert "converting" in first.stderr
    again = run(*args)
    assert again.returncode == 0
    assert "converting" not in again.stderr
    assert first.stdout == again.stdout
    assert len(list((tmp_path / "cache" / "flashsparse" / "packs").glob("*/pack.json"))) == 1


def test_chat_with_a_template(run: Run, pack: Path, tmp_path: Path) -> None:
    save = tmp_path / "talk"
    lines = f"hello\n/set temp 0\nagain\n/show\n/save {save}\n/bye\n"
    done = run("chat", pack, "-n", "5", "--seed", "1", "--system-prompt", "Be kind", "--stats", text=lines)
    assert done.returncode == 0, done.stderr
    replies = done.stdout.splitlines()[:2]
    assert [len(reply) for reply in replies] == [5, 5]
    assert "system: Be kind" in done.stdout
    assert done.stderr.count("tok/s") >= 2
    turns = json.loads(save.with_name("talk.turns.json").read_text())
    assert [m["role"] for m in turns["messages"]] == ["user", "assistant"] * 2
    assert [m["content"] for m in turns["messages"][1::2]] == replies
    loaded = run("chat", pack, "-n", "5", "--temp", "0", text=f"/load {save}\n/show\n")
    held = next(line for line in done.stdout.splitlines() if line.startswith("conversation:"))
    assert held in loaded.stdout


def test_chat_without_a_template_continues_the_text(run: Run, bare_pack: Path) -> None:
    done = run("chat", bare_pack, "-n", "3", "--temp", "0", text="1 2 3\n/clear\n1 2 3\n4\n")
    assert done.returncode == 0, done.stderr
    first, again, more = done.stdout.splitlines()
    assert first == again
    assert more != first


def test_demo(run: Run, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The demo command over a stand-in for the embedded model: converted once, one story, its figures."""
    package = tmp_path / "package"
    shutil.copytree(checkpoint, package / "demo_model")
    monkeypatch.setattr(demo, "files", lambda _: package)
    args = ("demo", "-n", "16", "--dram", "64MB", "-p", "once")
    first, again = run(*args), run(*args)
    for result in (first, again):
        assert result.returncode == 0, result.stderr
        for line in ("speed", "flash", "hit rate", "peak memory"):
            assert f"\n{line} " in result.stdout
    assert "converting" in first.stderr
    assert "converting" not in again.stderr
    assert len(list((tmp_path / "cache" / "flashsparse" / "demo").glob("*/pack.json"))) == 1
