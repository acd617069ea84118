"""What an engine says of a request: the output of a token, and log-probabilities of its prompt.

Shape legend: N positions of a chunk, V vocabulary.
"""

from __future__ import annotations

from torch import Tensor

from sparsed.core import TokenOutput
from sparsed.engine.batch import PromptChunk
from sparsed.engine.request import RequestState, Status
from sparsed.engine.sampler import Draw, token_logprobs


def output_of(request: RequestState, *, draw: Draw | None) -> TokenOutput:
    """The output of a token just appended, or of none, after all that were reported."""
    num_tokens = max(len(request.tokens), len(request.request.generated_tokens))
    index = num_tokens - (draw is not None)
    prompt_known = request.status is Status.DECODE and request.wants_prompt_logprobs
    return TokenOutput(
        request_id=request.request_id,
        index=index,
        token_id=draw.token_id if draw else None,
        logprob=draw.logprobs[0] if draw and draw.logprobs else None,
        top_logprobs=draw.logprobs[1:] if draw else (),
        prompt_logprobs=tuple(request.prompt_logprobs) if prompt_known and index == 0 else None,
    )


def add_prompt_logprobs(request: RequestState, chunk: PromptChunk, logits_NV: Tensor) -> None:
    """Note what a chunk's logits (n, V) say of the prompt: those of position i describe its token
    i + 1; nothing describes the first."""
    assert request.sampling.prompt_logprobs is not None
    if chunk.start == 0:
        request.prompt_logprobs.append(None)
    described = request.prompt[chunk.start + 1 : chunk.end + 1]
    request.prompt_logprobs.extend(
        token_logprobs(
            logits_NV[: len(described)],
            tokens=described,
            num_best=request.sampling.prompt_logprobs,
        )
    )
