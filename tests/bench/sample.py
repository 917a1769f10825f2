"""Where a process spends its time, by sampling its stack: cheap enough not to change the answer, unlike cProfile.

    python -m tests.bench.sample OUT MODULE [ARGUMENT ...]

Runs a module as `python -m` does; at its end OUT gets milliseconds by function, with what it called and alone.
"""

import runpy
import signal
import sys
from collections import Counter
from pathlib import Path
from types import CodeType, FrameType

INTERVAL_S = 0.0005
SHOWN = 70


class Samples:
    """Counts of stacks, taken at every tick of a timer of wall-clock time."""

    def __init__(self, out: Path) -> None:
        self._out = out
        self.alone: Counter[tuple[CodeType, int]] = Counter()
        self.inclusive: Counter[CodeType] = Counter()
        self.num = 0

    def start(self) -> None:
        """The next tick: one at a time, or a slow machine would do nothing but take samples."""
        signal.setitimer(signal.ITIMER_REAL, INTERVAL_S)

    def take(self, signum: int, frame: FrameType | None) -> None:
        if frame is not None:
            self.num += 1
            self.alone[frame.f_code, frame.f_lineno] += 1
            seen = set()
            while frame is not None:
                seen.add(frame.f_code)
                frame = frame.f_back
            self.inclusive.update(seen)
            if self.num % 2000 == 0:  # a service may be killed before it ends
                self.write()
        self.start()

    def write(self) -> None:
        self._out.write_text(self.report())

    def report(self) -> str:
        """Two tables, the largest first."""
        lines = [f"{self.num} samples, one {INTERVAL_S * 1e3:g} ms after another"]
        rows = [(name(code), n) for code, n in self.inclusive.most_common(SHOWN)]
        lines += ["", "with what it calls", *(line(*row) for row in rows)]
        rows = [(f"{name(code)}:{at}", n) for (code, at), n in self.alone.most_common(SHOWN)]
        lines += ["", "alone", *(line(*row) for row in rows)]
        return "\n".join(lines) + "\n"


def name(code: CodeType) -> str:
    return f"{Path(code.co_filename).name}:{code.co_qualname}"


def line(what: str, num: int) -> str:
    return f"{num * INTERVAL_S * 1e3:9.1f} ms  {what}"


def main() -> None:
    out, module = Path(sys.argv[1]), sys.argv[2]
    sys.argv = sys.argv[2:]
    samples = Samples(out)
    signal.signal(signal.SIGALRM, samples.take)
    samples.start()
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        samples.write()


if __name__ == "__main__":
    main()
