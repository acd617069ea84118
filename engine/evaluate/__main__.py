"""``python -m sparsed.engine.evaluate``: reads an ``Evaluate`` as JSON from its standard input and
answers as ``engine.process`` says, with an ``EvaluationReport``."""

from __future__ import annotations

import sys

import msgspec

from sparsed.core import Evaluate, EvaluationReport, ExitCode
from sparsed.engine.process import Progress, answer


def main() -> ExitCode:
    """Evaluate what standard input asks for; the exit status for the shell."""
    wanted = msgspec.json.decode(sys.stdin.buffer.read(), type=Evaluate)
    return answer(lambda report: _evaluate(wanted, on_progress=report))


def _evaluate(wanted: Evaluate, *, on_progress: Progress) -> EvaluationReport:
    on_progress("loading torch", 0.0)
    from sparsed.engine.evaluate.evaluate import evaluate

    return evaluate(wanted, on_progress=on_progress)


if __name__ == "__main__":
    sys.exit(main())
