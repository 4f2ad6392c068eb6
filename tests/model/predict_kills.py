"""Kills conversions to tier predict at steps spread over both stages, in forked children, and checks what is left.

Usage: python -m tests.model.predict_kills WORK TARGET COUNT; prints the number of kills as its last line. TARGET "none"
calibrates nothing. Imports MLX only in children: a process that runs MLX must not fork.
"""

from __future__ import annotations

import signal
import sys
from pathlib import Path

from tests.model.convert_kills import Scenario, check_same, in_child
from tests.model.test_calibrate import tiny, words


class PredictScenario(Scenario):
    """A conversion to a new pack, with a calibration on a short text."""

    def __init__(self, work: Path, target: str) -> None:
        from converter.convert import convert

        self.work, self.name, self.dst = work, "predict", work / "pack"
        self.old, self.force = None, False
        self.source = tiny(work / "source", intermediate=32)
        text = words(work / "text.txt", 60)
        self.options = {"tier": "predict"}
        if target != "none":
            self.options |= {"calibrate": [text], "calibrate_window": 15, "target": target}
        self.expected = work / "expected"
        assert in_child(lambda: convert(self.source, self.expected, **self.options)) == 0


def main() -> None:
    work, target, count = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
    scenario = PredictScenario(work, target)
    scenario.reset()
    assert in_child(lambda: scenario.run(0)) == 0
    check_same(scenario.dst, scenario.expected)
    steps = int((work / "steps").read_text())
    chosen = sorted({1 + number * (steps - 1) // max(count - 1, 1) for number in range(count)})
    for last in chosen:
        scenario.kill_and_resume(last)
    print(len(chosen), signal.SIGKILL.name)


if __name__ == "__main__":
    main()
