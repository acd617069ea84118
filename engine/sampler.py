"""From logits to tokens.

Order: logit bias, penalties (repetition over prompt and output, frequency and presence over
output), temperature, then min-p, top-k and top-p, each a cut through the tokens sorted by
falling probability, ties by id. The draw is the inverse of the cumulative distribution at one
uniform number that depends on (seed, token index) alone, so that neither the batch nor a replay
changes a token. Distributions are cumulated in float64 on the host, row by row, for that reason.
Source: ours; the definitions of the parameters are OpenAI's and vLLM's.

Shape suffixes: N rows, V vocabulary, C candidates.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sparsed.core import SamplingParams, TokenLogprob
from sparsed.engine.request import RequestState

NUM_CANDIDATES = 256  # the tokens a draw looks at first; one that falls outside sorts the row
_SEED_MASK = (1 << 128) - 1  # the key of Philox has 128 bits


class Draw(NamedTuple):
    """A token; with logprobs, the token's own entry and then the best ones."""

    token_id: int
    logprobs: tuple[TokenLogprob, ...] = ()


class Sampler:
    """Draws tokens; keeps the token counts of requests with penalties until ``forget``."""

    def __init__(self) -> None:
        self._counts: dict[str, _Counts] = {}

    def sample(self, logits_NV: Tensor, *, requests: Sequence[RequestState]) -> list[Draw]:
        """The next token of each request. ``logits_NV``: float32, left unchanged.

        Logprobs are those of the raw logits: before bias, penalties, temperature and cuts.
        """
        if all(request.is_plain_greedy for request in requests):
            return [Draw(token) for token in logits_NV.argmax(dim=-1).tolist()]
        adjusted_NV = self._adjust(logits_NV, requests)
        tokens = adjusted_NV.argmax(dim=-1).tolist()
        random = [row for row, request in enumerate(requests) if not request.is_greedy]
        if random:
            drawn = _draw(adjusted_NV[random], [requests[row] for row in random])
            for row, token in zip(random, drawn, strict=True):
                tokens[row] = token
        return _with_logprobs(logits_NV, tokens, requests)

    def forget(self, request_id: str) -> None:
        """Drop what is kept of a finished request, if anything."""
        self._counts.pop(request_id, None)

    def _adjust(self, logits_NV: Tensor, requests: Sequence[RequestState]) -> Tensor:
        """Logits after bias and penalties."""
        biased = [row for row, request in enumerate(requests) if request.sampling.logit_bias]
        penalised = [row for row, request in enumerate(requests) if request.has_penalties]
        if not biased and not penalised:
            return logits_NV
        adjusted_NV = logits_NV.clone()
        for row in biased:
            for token, bias in requests[row].sampling.logit_bias:
                adjusted_NV[row, token] += bias
        for row in penalised:
            counts = self._counts_of(requests[row], like_V=logits_NV[row])
            adjusted_NV[row] = counts.penalise(adjusted_NV[row], requests[row].sampling)
        return adjusted_NV

    def _counts_of(self, request: RequestState, *, like_V: Tensor) -> _Counts:
        counts = self._counts.get(request.request_id)
        if counts is None:
            counts = _Counts(request.prompt, like_V=like_V)
            self._counts[request.request_id] = counts
        counts.update(request.tokens)
        return counts


class _Counts:
    """Which tokens a request has seen, on the device of its logits."""

    def __init__(self, prompt: Sequence[int], *, like_V: Tensor) -> None:
        self._seen_V = torch.zeros_like(like_V, dtype=torch.bool)
        self._seen_V[torch.tensor(prompt, device=like_V.device)] = True
        self._output_V = torch.zeros_like(like_V)
        self._num_counted = 0

    def update(self, output: Sequence[int]) -> None:
        """Count the tokens that came since the last call; ``output`` is all of them."""
        new = torch.tensor(output[self._num_counted :], device=self._seen_V.device).long()
        self._output_V.index_add_(0, new, torch.ones_like(new, dtype=self._output_V.dtype))
        self._seen_V[new] = True
        self._num_counted = len(output)

    def penalise(self, logits_V: Tensor, params: SamplingParams) -> Tensor:
        penalty = params.repetition_penalty
        repeated_V = torch.where(logits_V > 0, logits_V / penalty, logits_V * penalty)
        logits_V = torch.where(self._seen_V, repeated_V, logits_V)
        logits_V = logits_V - params.frequency_penalty * self._output_V
        return logits_V - params.presence_penalty * (self._output_V > 0)


def token_logprobs(
    logits_NV: Tensor, *, tokens: Sequence[int], num_best: int
) -> list[tuple[TokenLogprob, ...]]:
    """Per row the entry of its token, then those of the ``num_best`` most likely ones."""
    wanted_N1 = torch.tensor(tokens, device=logits_NV.device)[:, None]
    token_N1 = logits_NV.gather(1, wanted_N1)
    total_N1 = logits_NV.logsumexp(dim=-1, keepdim=True)
    best_NC, ids_NC = logits_NV.topk(min(num_best, logits_NV.shape[1]))
    ranks = ((logits_NV > token_N1).sum(dim=-1) + 1).tolist()
    own = (token_N1 - total_N1)[:, 0].tolist()
    best = (best_NC - total_N1).tolist()
    rows = zip(tokens, own, ranks, ids_NC.tolist(), best, strict=True)
    return [
        (
            TokenLogprob(token_id=token, logprob=logprob, rank=rank),
            *(
                TokenLogprob(token_id=best_token, logprob=best_logprob, rank=place)
                for place, (best_token, best_logprob) in enumerate(zip(ids, values, strict=True), 1)
            ),
        )
        for token, logprob, rank, ids, values in rows
    ]


def uniform(seed: int, *, index: int) -> float:
    """The number in [0, 1) that draws token ``index``: Philox with key and counter."""
    bits = np.random.Philox(key=seed & _SEED_MASK, counter=index)
    return float(np.random.Generator(bits).random())


def _with_logprobs(
    logits_NV: Tensor, tokens: Sequence[int], requests: Sequence[RequestState]
) -> list[Draw]:
    draws = [Draw(token) for token in tokens]
    for row, request in enumerate(requests):
        if (num_best := request.sampling.logprobs) is not None:
            entries = token_logprobs(
                logits_NV[row : row + 1], tokens=[tokens[row]], num_best=num_best
            )
            draws[row] = Draw(tokens[row], entries[0])
    return draws


def _draw(logits_NV: Tensor, requests: Sequence[RequestState]) -> list[int]:
    """One token per row; every temperature is above zero."""
    temperatures = [request.sampling.temperature for request in requests]
    scale_N1 = torch.tensor(temperatures, dtype=torch.float64, device=logits_NV.device)[:, None]
    totals = (logits_NV.double() / scale_N1).logsumexp(dim=-1).tolist()
    vocab_size = logits_NV.shape[1]
    best_NC, ids_NC = logits_NV.topk(min(NUM_CANDIDATES, vocab_size))
    best, ids = best_NC.cpu().numpy(), ids_NC.cpu().numpy()
    tokens = []
    for row, (request, total) in enumerate(zip(requests, totals, strict=True)):
        few = _falling(best[row], ids[row])
        token = _pick(few, request, total=total, vocab_size=vocab_size)
        if token is None:
            everything = _falling(logits_NV[row].cpu().numpy(), np.arange(vocab_size))
            token = _pick(everything, request, total=total, vocab_size=vocab_size)
        assert token is not None, "a whole row decides every draw"
        tokens.append(token)
    return tokens


class _Sorted(NamedTuple):
    """Logits in falling order, ties by token id."""

    logits_C: NDArray[np.float32]
    ids_C: NDArray[np.uint64]


def _falling(logits_C: NDArray[np.float32], ids_C: NDArray[np.int64]) -> _Sorted:
    """One sort of 64-bit keys, logit above id: ten times as fast as a stable sort of pairs."""
    ranks_C = _flip((logits_C + 0.0).view(np.uint32))  # + 0.0 makes -0.0 and 0.0 a tie
    keys_C = (ranks_C.astype(np.uint64) << np.uint64(32)) | ids_C.astype(np.uint64)
    keys_C.sort()
    logits_C = _flip((keys_C >> np.uint64(32)).astype(np.uint32)).view(np.float32)
    return _Sorted(logits_C, keys_C & np.uint64(0xFFFFFFFF))


def _flip(bits_C: NDArray[np.uint32]) -> NDArray[np.uint32]:
    """Between the bits of float32 and integers in the opposite order; its own inverse."""
    return np.where(bits_C >> 31, bits_C, ~bits_C & np.uint32(0x7FFFFFFF))


def _pick(
    candidates: _Sorted, request: RequestState, *, total: float, vocab_size: int
) -> int | None:
    """The token drawn from the first ones in falling order; None: more of them are needed.

    ``total``: log of the sum of exp(logit / temperature) over the whole vocabulary.
    """
    logits_C, ids_C = candidates
    params = request.sampling
    probs_C = np.exp(logits_C.astype(np.float64) / params.temperature - total)
    # Without the rest of the row it is open which of the tokens tied with the last come first.
    known = len(ids_C) if len(ids_C) == vocab_size else int((logits_C > logits_C[-1]).sum())
    kept = _num_kept(probs_C, params, vocab_size=vocab_size)
    if known < kept < vocab_size:
        return None
    cumulated = probs_C[:known].cumsum()
    mass = cumulated[kept - 1] if kept <= known else 1.0
    if params.top_p < 1.0:
        kept = min(kept, int(np.searchsorted(cumulated, params.top_p * mass)) + 1)
        if kept > known:
            return None
        mass = cumulated[kept - 1]
    number = uniform(request.seed, index=len(request.tokens))
    place = int(np.searchsorted(cumulated[:kept], number * mass, side="right"))
    if place < min(kept, known):
        return int(ids_C[place])
    return int(ids_C[kept - 1]) if kept <= known else None


def _num_kept(probs_C: NDArray[np.float64], params: SamplingParams, *, vocab_size: int) -> int:
    """Tokens that pass min-p and top-k; more may pass min-p if all candidates do."""
    kept = vocab_size
    if params.min_p > 0.0:
        kept = max(int((probs_C >= params.min_p * probs_C[0]).sum()), 1)
    return min(kept, params.top_k) if params.top_k > 0 else kept
