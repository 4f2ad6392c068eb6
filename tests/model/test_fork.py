"""A forked child has the memory of an engine and none of its threads: using it there is an error, not a hang."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

import flashsparse
from tests.model.packs import make_pack


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_an_engine_refuses_to_run_in_a_forked_child(tmp_path: Path) -> None:
    with flashsparse.load(make_pack(tmp_path), slots=64) as engine, engine.session() as session:
        session.logits([5, 6])
        child = os.fork()
        if child == 0:
            signal.alarm(30)  # a hang ends the child, with another status
            try:
                session.logits([7])
            except flashsparse.SessionError:
                os._exit(42)
            os._exit(1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 42
