"""From logits to tokens, for what the model does not draw itself.

Order: logit bias, penalties (repetition over prompt and output, frequency and presence over
output), temperature, then min-p, top-k and top-p, each a cut through the tokens sorted by
falling probability, ties by id. The draw is the inverse of the cumulative distribution of what is
left, in the order of ids, at one uniform number that depends on (seed, token index) alone, so that
neither the batch nor a replay changes a token. On the CPU distributions are cumulated here, in
float64; on a CUDA device by ``kernels.sample``, which draws by the same definition.
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
from sparsed.engine.batch import DrawParams
from sparsed.engine.draws import draw as draw_on_device
from sparsed.engine.request import RequestState

NUM_CANDIDATES = 256  # the tokens a cut looks at first; one that keeps more sorts the row
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
        adjusted_NV = self._adjust(logits_NV, requests)
        if adjusted_NV.is_cuda:
            draws = [request.draw for request in requests]
            tokens = draw_on_device(adjusted_NV.contiguous(), draws=draws).tolist()
        else:
            rows = zip(adjusted_NV, requests, strict=True)
            tokens = [_draw(logits_V, request.draw) for logits_V, request in rows]
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


def _draw(logits_V: Tensor, draw: DrawParams | None) -> int:
    """One token of a row on the CPU."""
    if draw is None:
        return int(logits_V.argmax())
    kept_C = _kept(logits_V, draw)
    cumulated_C = _weights(logits_V if kept_C is None else logits_V[kept_C], draw).cumsum()
    number = uniform(draw.seed, index=draw.token_index)
    place = int(np.searchsorted(cumulated_C, number * cumulated_C[-1], side="right"))
    return place if kept_C is None else int(kept_C[place])


def _kept(logits_V: Tensor, draw: DrawParams) -> Tensor | None:
    """Ids of the tokens that pass the cuts, rising; None: all of them."""
    vocab_size = len(logits_V)
    if draw.top_p >= 1.0 and draw.min_p == 0.0 and not 0 < draw.top_k < vocab_size:
        return None
    best_C, ids_C = logits_V.topk(min(NUM_CANDIDATES, vocab_size))
    kept = _first_kept(_falling(best_C.numpy(), ids_C.numpy()), logits_V, draw)
    if kept is None:
        everything = _falling(logits_V.numpy(), np.arange(vocab_size))
        kept = _first_kept(everything, logits_V, draw)
    assert kept is not None, "a whole row decides every cut"
    return torch.from_numpy(np.sort(kept))


def _first_kept(
    candidates: _Sorted, logits_V: Tensor, draw: DrawParams
) -> NDArray[np.int64] | None:
    """Ids of the tokens that pass the cuts; None: more candidates are needed to tell."""
    best_C, ids_C = candidates
    vocab_size = len(logits_V)
    # Without the rest of the row it is open which of the tokens tied with the last come first.
    known = len(ids_C) if len(ids_C) == vocab_size else int((best_C > best_C[-1]).sum())
    weights_C = np.exp((best_C.astype(np.float64) - best_C[0]) / draw.temperature)
    kept = int((weights_C >= draw.min_p).sum()) if draw.min_p > 0.0 else vocab_size
    kept = min(kept, draw.top_k) if draw.top_k > 0 else kept
    if known < kept < vocab_size:
        return None
    if draw.top_p < 1.0:
        cumulated_C = weights_C[:known].cumsum()
        whole = cumulated_C[kept - 1] if kept <= known else _weights(logits_V, draw).sum()
        kept = min(kept, int(np.searchsorted(cumulated_C, draw.top_p * whole)) + 1)
    return ids_C[:kept] if kept <= known else None


def _weights(logits_C: Tensor, draw: DrawParams) -> NDArray[np.float64]:
    """Probabilities as multiples of the highest one."""
    exponents_C = logits_C.double()
    return exponents_C.sub_(logits_C.max()).div_(draw.temperature).exp_().numpy()


class _Sorted(NamedTuple):
    """Logits in falling order, ties by token id."""

    logits_C: NDArray[np.float32]
    ids_C: NDArray[np.int64]


def _falling(logits_C: NDArray[np.float32], ids_C: NDArray[np.int64]) -> _Sorted:
    """One sort of 64-bit keys, logit above id: ten times as fast as a stable sort of pairs."""
    ranks_C = _flip((logits_C + 0.0).view(np.uint32))  # + 0.0 makes -0.0 and 0.0 a tie
    keys_C = (ranks_C.astype(np.uint64) << np.uint64(32)) | ids_C.astype(np.uint64)
    keys_C.sort()
    logits_C = _flip((keys_C >> np.uint64(32)).astype(np.uint32)).view(np.float32)
    return _Sorted(logits_C, (keys_C & np.uint64(0xFFFFFFFF)).astype(np.int64))


def _flip(bits_C: NDArray[np.uint32]) -> NDArray[np.uint32]:
    """Between the bits of float32 and integers in the opposite order; its own inverse."""
    return np.where(bits_C >> 31, bits_C, ~bits_C & np.uint32(0x7FFFFFFF))
