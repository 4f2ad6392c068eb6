"""The command line without a model: dispatch, errors and exit codes, the cache directory, chat over a fake engine."""

from __future__ import annotations

import contextlib
import errno
import importlib
import io
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
import pytest

from flashsparse import cli, errors
from flashsparse.cli import chat, conversation, demo, generate, packs, report
from flashsparse.cli.options import Sampling
from flashsparse.stats import Drift

RUN = [sys.executable, "-m", "flashsparse"]
STATS = {
    "generation_tokens": 3,
    "generation_tps": 12.5,
    "prompt_tokens": 4,
    "prompt_tps": 50.0,
    "time_to_first_token_s": 0.1,
    "flash_bytes_per_token": 1_500_000,
    "read_mode": "direct",
    "hit_rate": 0.875,
    "prefetch_useful": 0.5,
    "lookahead": {"mode": "auto", "on": True},
    "peak_memory_bytes": 90_000_000,
    "runtime_bytes": 75_000_000,
    "budget_bytes": 20_000_000,
}


def run(*args: str, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*RUN, *args], capture_output=True, text=True, timeout=120, **options)


# Dispatch and errors


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_command_is_there(name: str) -> None:
    command = getattr(importlib.import_module(cli.COMMANDS[name][0]), name)
    assert isinstance(command, click.Command)
    assert command.name == name


def test_help_imports_nothing_heavy() -> None:
    script = (
        "import sys; from flashsparse.cli import cli; cli.main(['--help'], standalone_mode=False);"
        "heavy = {'mlx', 'mlx_lm', 'numpy', 'transformers', 'huggingface_hub', 'rich', 'converter'};"
        "sys.exit(f'imported {heavy & set(sys.modules)}' if heavy & set(sys.modules) else 0)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    for name in cli.COMMANDS:
        assert name in done.stdout


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_importing_a_command_imports_nothing_heavy(name: str) -> None:
    script = (
        f"import sys, {cli.COMMANDS[name][0]};"
        "heavy = {'mlx', 'mlx_lm', 'transformers', 'huggingface_hub'} & set(sys.modules);"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "args",
    [
        ["nonsense"],
        ["generate"],
        ["generate", "x"],
        ["generate", "/", "-p", "x"],
        ["generate", "/nowhere/at/all", "-p", "x"],
        ["generate", "x", "-p", "x", "--temp", "-1"],
        ["generate", "x", "-p", "x", "--read-mode", "fast"],
        ["chat", "--no-such-option"],
        ["generate", ".", "-p", "x", "--temp", "nan"],
        ["chat", ".", "--temp", "inf"],
        ["chat", ".", "--top-p", "nan"],
        ["generate", ".", "-p", "x", "--seed", "-1"],
        ["generate", ".", "-p", "x", "--dram", "9000TB"],
        ["generate", ".", "-p", "x", "--dram", "lots"],
        ["generate", ".", "-p", "x", "--threads", "100000"],
        ["doctor", "--threads", "100000"],
        ["doctor", "--density", "nan"],
        ["doctor", "--hit-rate", "nan"],
        ["demo", "-p", ""],
    ],
    ids=" ".join,
)
def test_usage_errors_are_one_line_and_exit_2(args: list[str]) -> None:
    done = run(*args)
    assert done.returncode == 2
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith("flashsparse: ")


@pytest.mark.parametrize(
    ("error", "status", "text"),
    [
        (errors.UsageError("bad\nsize"), 2, "bad size"),
        (errors.PackError("no pack"), 1, "no pack"),
        (errors.BudgetError("too small", 7), 1, "too small"),
        (OSError(2, "No such file or directory", "/x"), 1, "/x: No such file or directory"),
        (MemoryError(), 1, "out of memory; give a smaller --dram"),
        (KeyError("x"), 1, "internal error: KeyError: 'x' (flashsparse --debug shows where)"),
    ],
    ids=str,
)
@pytest.mark.parametrize("debug", [False, True])
def test_run_errors(
    error: Exception, status: int, text: str, debug: bool, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(packs, "resolve_pack", fail)
    monkeypatch.setattr(generate, "resolve_pack", fail)
    args = ["generate", "x", "-p", "x"]
    with pytest.raises(SystemExit) as left:
        cli.main(["--debug", *args] if debug else args)
    shown = capsys.readouterr().err
    assert left.value.code == status
    assert shown.splitlines()[-1] == f"flashsparse: {text}"
    assert ("Traceback" in shown) == debug


def test_interrupt_exits_130(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(generate, "resolve_pack", interrupt)
    with pytest.raises(SystemExit) as left:
        cli.main(["generate", "x", "-p", "x"])
    assert left.value.code == 130


@pytest.mark.parametrize("module", ["click", "flashsparse.cli", "importlib.resources"])
def test_an_interrupt_while_importing_is_quiet(module: str) -> None:
    script = (
        "import sys, builtins, flashsparse.command as command\n"
        "real = builtins.__import__\n"
        "def interrupted(name, *rest):\n"
        f"    if name == {module!r}: raise KeyboardInterrupt\n"
        "    return real(name, *rest)\n"
        "builtins.__import__ = interrupted; sys.argv[1:] = ['demo']; command.main()"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr.strip()) == (130, "", "")


def test_the_console_script_imports_nothing_before_it_can_be_interrupted() -> None:
    import tomllib

    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())
    assert project["project"]["scripts"] == {"flashsparse": "flashsparse.command:main"}
    script = "import sys, flashsparse.command; sys.exit('click' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], timeout=60).returncode == 0


WRITING = """
from flashsparse.cli import info, main, report
info.info.callback = lambda **_: report.write('x')
main(['info', '.'])
"""


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize("command", [["-m", "flashsparse", "--help"], ["-c", WRITING]])
def test_a_full_standard_output_is_named(command: list[str]) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, *command], stdout=full, stderr=subprocess.PIPE, text=True, timeout=60, env=environment
        )
    assert done.returncode == 1
    expected = "flashsparse: standard output: No space left on device; free some, or write to another disk\n"
    assert done.stderr == expected


def test_a_closed_pipe_is_quiet() -> None:
    with subprocess.Popen([*RUN, "--help"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        assert child.stderr is not None
        child.stdout.close()
        assert child.stderr.read() == ""


def test_version() -> None:
    import flashsparse

    assert run("--version").stdout == f"flashsparse {flashsparse.__version__}\n"


def test_output_survives_an_ascii_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    script = "from flashsparse.cli import main, report; report.write('\\u00e9\\udcff\\U0001f600'); main(['--version'])"
    done = subprocess.run(
        [sys.executable, "-c", "import sys; sys.stdout.reconfigure(errors='replace');" + script],
        capture_output=True,
        env={"PYTHONIOENCODING": "ascii", "PATH": ""},
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(b"???")


# Packs and the cache directory


def test_cache_directories(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert packs.cache_dir() == tmp_path / "flashsparse"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative/is/ignored")
    monkeypatch.setenv("HOME", "/home/x")
    monkeypatch.setattr(sys, "platform", "linux")
    assert packs.cache_dir() == Path("/home/x/.cache/flashsparse")
    monkeypatch.setattr(sys, "platform", "darwin")
    assert packs.cache_dir() == Path("/home/x/Library/Caches/flashsparse")


@pytest.fixture
def checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    return folder


def test_a_checkpoint_needs_consent(checkpoint: Path) -> None:
    with pytest.raises(errors.UsageError, match="flashsparse convert"):
        packs.resolve_pack(str(checkpoint), yes=False)


def test_a_checkpoint_is_converted_once(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Path] = []

    def convert(source: Path, target: Path, resume: bool, force: bool) -> Path:
        target.mkdir()
        (target / "pack.json").write_text("{}")
        made.append(target)
        return target

    monkeypatch.setattr("converter.convert.convert", convert)
    monkeypatch.setattr(packs, "is_pack", lambda path: (path / "pack.json").is_file())
    first = packs.resolve_pack(str(checkpoint), yes=True)
    assert packs.resolve_pack(str(checkpoint), yes=False) == first
    assert made == [first]
    (checkpoint / "model.safetensors").write_bytes(b"x")
    assert packs.resolve_pack(str(checkpoint), yes=True) != first


def test_a_pack_is_taken_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "pack.json").write_text("{}")
    assert packs.resolve_pack(str(tmp_path), yes=False) == tmp_path


@pytest.mark.parametrize(
    ("text", "yes"), [("a/b", True), ("a.b/c-d_e", True), ("/a/b", False), ("a", False), ("a/b/c", False)]
)
def test_repository_ids(text: str, yes: bool) -> None:
    assert packs.is_repo_id(text) == yes


# Figures


def test_stats_line() -> None:
    line = report.stats_line(STATS)
    assert "12.5 tok/s" in line
    assert "1.5 MB from flash per token (direct reads)" in line
    assert "hit rate 87.5 %" in line
    assert "peak memory 15.0 MB of 20.0 MB" in line
    assert "lookahead on, 50.0 % of it used" in line
    assert "hit rate -" in report.stats_line(STATS | {"hit_rate": None})
    assert "lookahead" not in report.stats_line(STATS | {"prefetch_useful": None})


def test_demo_summary_says_what_fits() -> None:
    lines = demo.summary(STATS, slots=(10, 10), neurons=40, size=30_000_000)
    assert any("20 of 80 neurons" in line for line in lines)
    assert any("the model is 30.0 MB" in line for line in lines)


# Chat


class FakeStats:
    def to_dict(self) -> dict[str, Any]:
        return STATS


@dataclass
class FakePiece:
    text: str
    token: int
    finish_reason: str | None = None
    stats: FakeStats = field(default_factory=FakeStats)


class FakeTokenizer:
    """Characters are tokens; a template marks turns with <, > and |."""

    def __init__(self, templated: bool) -> None:
        self.has_chat_template = templated

    def apply_chat_template(self, turns: list[dict[str, str]], **_: Any) -> list[int]:
        marks = {"system": "#", "user": "<", "assistant": ">"}
        if any(t["content"] == "refuse" for t in turns):
            raise ValueError("system role not supported")
        return [ord(c) for c in "".join(f"{marks[t['role']]}{t['content']}|" for t in turns) + ">"]


class FakeSession:
    """Answers `ok|` to everything; remembers what it was fed."""

    def __init__(self, fail: bool = False) -> None:
        self.tokens: list[int] = []
        self.fed: list[str] = []
        self.cleared, self.fail = 0, fail
        self.full = self.closed = False

    def generate(self, prompt: str | Sequence[int], **options: Any) -> Iterator[FakePiece]:
        self.options = options
        text = prompt if isinstance(prompt, str) else "".join(map(chr, prompt))
        if self.fail:
            raise errors.ContextLengthError("full")
        self.fed.append(text)
        self.tokens += [ord(c) for c in text]
        for letter in "ok":
            self.tokens.append(ord(letter))
            yield FakePiece(letter, ord(letter))
        self.tokens.append(ord("|"))
        yield FakePiece("", ord("|"), "stop")

    def clear(self) -> None:
        self.cleared += 1
        self.tokens = []

    def save(self, path: Path) -> None:
        path.write_text(json.dumps(self.tokens))

    def load(self, path: Path) -> None:
        self.tokens = json.loads(path.read_text())


class FakePlan:
    def describe(self) -> str:
        return "the plan"


class FakeEngine:
    def __init__(self, templated: bool = True, tokenizer: bool = True, fail: bool = False) -> None:
        self.tokenizer = FakeTokenizer(templated) if tokenizer else None
        self.plan = FakePlan()
        self.fake = FakeSession(fail)
        self.found: Drift | None = None

    def drift(self) -> Drift | None:
        return self.found

    @contextlib.contextmanager
    def session(self) -> Iterator[FakeSession]:
        yield self.fake


def talk(engine: FakeEngine, text: str, monkeypatch: pytest.MonkeyPatch, **options: Any) -> FakeSession:
    monkeypatch.setattr(sys, "stdin", io.StringIO(text))
    chat.talk(engine, Sampling(), **options)  # type: ignore[arg-type]
    return engine.fake


def test_only_new_turns_are_fed(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    session = talk(FakeEngine(), "hi\nmore\n", monkeypatch, system="S")
    assert session.fed == ["#S|<hi|>", "<more|>"]
    assert session.cleared == 0
    assert capsys.readouterr().out == "ok\nok\n"


def test_a_changed_beginning_is_fed_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    session = talk(FakeEngine(), "hi\n/set system T\nmore\n", monkeypatch)
    assert session.fed == ["<hi|>", "#T|<hi|>ok|<more|>"]
    assert session.cleared == 1


def test_without_a_template_text_continues(monkeypatch: pytest.MonkeyPatch) -> None:
    assert talk(FakeEngine(templated=False), "Once\nmore\n", monkeypatch).fed == ["Once", "\nmore"]


def test_without_a_tokenizer_ids_are_typed(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    session = talk(FakeEngine(tokenizer=False), "65 66\nwords\n", monkeypatch)
    assert session.fed == ["AB"]
    output = capsys.readouterr()
    assert output.out == "111 107 124 \n\n"
    assert "no tokenizer" in output.err


def test_messages_of_several_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    session = talk(FakeEngine(), '"""a\nb\nc"""\n"""\nd\n"""\n"""e"""\n', monkeypatch)
    assert session.fed == ["<a\nb\nc|>", "<d|>", "<e|>"]


def test_settings(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    lines = "/set temp 0.5\n/set top-k 3\n/set max-tokens 9\n/set seed 4\n/set nose 1\n/set temp warm\n/show\nhi\n"
    session = talk(FakeEngine(), lines, monkeypatch)
    assert session.options == {"temp": 0.5, "top_p": 1.0, "top_k": 3, "seed": 4, "max_tokens": 9}
    output = capsys.readouterr()
    assert "temp: 0.5" in output.out
    assert "the plan" in output.out
    assert [line[:20] for line in output.err.splitlines()] == ["flashsparse: 'nose' ", "flashsparse: temp ta"]


def test_commands(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    session = talk(FakeEngine(), "/stats\n/help\nhi\n/stats\n/clear\nhi\n/what\n/bye\nnever\n", monkeypatch)
    assert session.fed == ["<hi|>", "<hi|>"]
    output = capsys.readouterr()
    assert "no reply yet" in output.out
    assert "12.5 tok/s" in output.out
    assert output.err == "flashsparse: /what is not a command; /help lists them\n"


@pytest.mark.parametrize(("ratio", "warned"), [(1.2, False), (1.5, True), (0.5, True)])
def test_stats_warn_when_the_predictor_drifts(
    monkeypatch: pytest.MonkeyPatch, capsys: Any, ratio: float, warned: bool
) -> None:
    engine = FakeEngine()
    engine.found = Drift(ratio, (ratio,))
    talk(engine, "hi\n", monkeypatch, stats=True)
    assert (f"the predictor names {ratio:.2f} times as many neurons" in capsys.readouterr().err) == warned


def test_save_and_load(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    file = tmp_path / "talk"
    talk(FakeEngine(), f"hi\n/save {file}\n", monkeypatch)
    session = talk(FakeEngine(), f"/load {file}\nmore\n", monkeypatch)
    assert session.fed == ["<more|>"]
    (tmp_path / "talk.turns.json").write_text("[]")
    fake = FakeEngine()
    with pytest.raises(errors.SessionError, match="turns"):
        conversation.Conversation(fake, fake.fake).load(file)  # type: ignore[arg-type]


def test_a_turn_that_does_not_fit_is_not_remembered(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    engine = FakeEngine(fail=True)
    talk(engine, "hi\n/show\n", monkeypatch)
    assert "flashsparse: full" in capsys.readouterr().err
    talking = conversation.Conversation(engine, engine.fake)  # type: ignore[arg-type]
    with pytest.raises(errors.ContextLengthError):
        list(talking.reply("hi", Sampling()))
    assert talking.messages == []


def test_a_template_that_refuses_is_a_usage_error(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    talk(FakeEngine(), "refuse\n", monkeypatch)
    assert "refuses this conversation" in capsys.readouterr().err


def test_interrupt_stops_the_reply_only(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    import signal

    engine = FakeEngine()
    plain = engine.fake.generate

    def pressed(prompt: Any, **options: Any) -> Iterator[FakePiece]:
        for piece in plain(prompt, **options):
            signal.raise_signal(signal.SIGINT)
            yield piece

    monkeypatch.setattr(engine.fake, "generate", pressed)
    session = talk(engine, "hi\n/bye\n", monkeypatch)
    assert session.tokens == [ord(c) for c in "<hi|>o"]
    output = capsys.readouterr()
    assert output.out == "o\n"
    assert "(stopped)" in output.err


@pytest.mark.parametrize(
    ("problem", "expected"),
    [
        (PermissionError(errno.EACCES, "denied", "a/b"), "a/b: denied; change its permissions"),
        (FileExistsError(errno.EEXIST, "exists", "a/b"), "a/b: exists; a file is in the way"),
        (OSError(errno.ENOSPC, "full"), "full; free some"),
        (OSError(errno.EIO, "broken", "a"), "a: broken"),
    ],
)
def test_the_systems_errors_say_what_to_do(problem: OSError, expected: str) -> None:
    message, status = cli.explain(problem)
    assert message.startswith(expected)
    assert status == 1
