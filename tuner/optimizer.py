"""``python -m sparsed.tuner.optimizer``: answers each ``LiveContext`` on stdin with an ``Answer``.

A process of its own, so that fitting a model never holds the daemon; on one thread, as all models
are fitted (``threads.py``). Ends with its input.
"""

from __future__ import annotations

import os
import sys
from typing import BinaryIO

import msgspec

from sparsed.tuner.live import propose
from sparsed.tuner.messages import Answer, LiveContext

NICENESS = 19


def serve(questions: BinaryIO, answers: BinaryIO) -> None:
    """Answer line by line until the input ends."""
    decoder = msgspec.json.Decoder(LiveContext)
    for line in questions:
        answer = Answer(decision=propose(decoder.decode(line)))
        answers.write(msgspec.json.encode(answer) + b"\n")
        answers.flush()


if __name__ == "__main__":
    os.nice(NICENESS)
    serve(sys.stdin.buffer, sys.stdout.buffer)
