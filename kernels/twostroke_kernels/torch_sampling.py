"""Sampling in PyTorch: penalties, filters, Gumbel noise where it can matter, logprobs.

Filters follow the order (logit descending, id ascending): top-k keeps the first k of a row; top-p keeps the shortest
beginning of those whose share of their mass reaches p; min-p keeps what is at least min_p times as likely as the best.
All three keep a beginning of that order, so a row is described by how many tokens it keeps.
"""

from __future__ import annotations

import dataclasses

import torch
import torch.nn.functional as F
from torch import Tensor

from twostroke_kernels.backend import Penalties, SampledRows, SamplingRows
from twostroke_kernels.noise import GUMBEL_MAX, gumbel, philox_4x32, split_seed

_MINUS_INFINITY = float("-inf")
_LIKELIEST = 256
"""Tokens looked at first by top-p and min-p; 16 times as many as long as that is not enough."""
_PIECE = 192
"""Width of the first stage of `first_argmax`; other vocabularies than its multiples take `argmax`."""
_NEAR = 4.0
"""Tokens this close to the best get noise first; any value gives the same choice."""


def penalize(logits: Tensor, penalties: Penalties) -> None:
    """See `Backend.penalize`."""
    cells = (penalties.rows, penalties.tokens)
    values = logits[cells]
    values = torch.where(values > 0, values / penalties.repetition, values * penalties.repetition)
    logits[cells] = values - penalties.subtract


def sample(raw_logits: Tensor, logits: Tensor, rows: SamplingRows) -> SampledRows:
    """See `Backend.sample`."""
    token_ids = first_argmax(logits) if rows.all_greedy else _choose(logits, rows)
    finite = raw_logits.amax(-1).isfinite() & raw_logits.amin(-1).isfinite()
    logprobs, top_ids, top_logprobs = _logprobs(raw_logits, token_ids, rows.num_logprobs)
    return SampledRows(token_ids, logprobs, top_ids, top_logprobs, finite)


def first_argmax(x: Tensor) -> Tensor:
    """[R, V] -> [R]: the smallest id among the largest. In two stages, as `amax` is vectorised and `argmax` is not."""
    num_rows, size = x.shape
    if size % _PIECE:
        return x.argmax(-1)
    pieces = x.view(num_rows, size // _PIECE, _PIECE)
    piece = pieces.amax(-1).argmax(-1)
    within = pieces[torch.arange(num_rows, device=x.device), piece].argmax(-1)
    return piece * _PIECE + within


def _logprobs(raw_logits: Tensor, token_ids: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    num_rows, size = raw_logits.shape
    if count < 0:
        return (
            raw_logits.new_zeros(num_rows),
            token_ids.new_empty(num_rows, 0),
            raw_logits.new_empty(num_rows, 0),
        )
    total = raw_logits.logsumexp(-1, keepdim=True)
    chosen = raw_logits.gather(1, token_ids[:, None]) - total
    top_ids = _best(raw_logits, min(count, size))
    return chosen[:, 0], top_ids, raw_logits.gather(1, top_ids) - total


def _best(x: Tensor, count: int) -> Tensor:
    """[R, count] ids by (logit descending, id ascending); `topk` alone breaks ties as it likes."""
    if count == 0:
        return torch.empty(x.shape[0], 0, dtype=torch.int64, device=x.device)
    last = x.topk(count).values[:, -1:]
    row, ids = (x < last).logical_not_().nonzero(as_tuple=True)  # not `>=`, so that NaN leaves no row short
    order = x[row, ids].argsort(descending=True, stable=True)
    order = order[row[order].argsort(stable=True)]
    ends = row.bincount(minlength=x.shape[0]).cumsum(0)
    starts = F.pad(ends, (1, 0))[:-1, None]
    return ids[order[starts + torch.arange(count, device=x.device)]]


def _choose(logits: Tensor, rows: SamplingRows) -> Tensor:
    drawn = rows.temperature > 0
    if bool(drawn.all()):
        return _draw(logits, rows)
    picked = drawn.nonzero()[:, 0]
    token_ids = first_argmax(logits)
    token_ids[picked] = _draw(logits[picked], _only(rows, picked))
    return token_ids


def _only(rows: SamplingRows, picked: Tensor) -> SamplingRows:
    names = ("temperature", "top_k", "top_p", "min_p", "seed", "choice", "position")
    return dataclasses.replace(rows, **{name: getattr(rows, name)[picked] for name in names})


def _draw(logits: Tensor, rows: SamplingRows) -> Tensor:
    """Noise costs more than all else here and is bounded, so only tokens that can win get any: first those near the
    best, then those that may still overtake the leader among them.
    """
    scaled = _filter(logits / rows.temperature[:, None], rows)
    scaled = F.pad(scaled, (0, -scaled.shape[1] % 4), value=_MINUS_INFINITY)
    quads = scaled.view(scaled.shape[0], scaled.shape[1] // 4, 4)
    best = torch.maximum(torch.maximum(quads[..., 0], quads[..., 1]), torch.maximum(quads[..., 2], quads[..., 3]))
    scores = torch.full_like(quads, _MINUS_INFINITY)
    near = best >= best.amax(-1, keepdim=True) - _NEAR
    _add_noise(scores, quads, near, rows)
    leader = scores.amax((1, 2))[:, None]
    _add_noise(scores, quads, (best >= leader - GUMBEL_MAX) & ~near, rows)
    return first_argmax(scores.view(scaled.shape))


def _add_noise(scores: Tensor, quads: Tensor, chosen: Tensor, rows: SamplingRows) -> None:
    row, quad = chosen.nonzero(as_tuple=True)
    if row.numel() == 0:
        return
    counter = (quad, rows.position[row], rows.choice[row], torch.zeros_like(quad))
    words = philox_4x32(counter, split_seed(rows.seed[row]))
    scores[row, quad] = quads[row, quad] + gumbel(torch.stack(words, -1))


def _filter(scaled: Tensor, rows: SamplingRows) -> Tensor:
    """Minus infinity for the tokens that do not pass."""
    size = scaled.shape[1]
    filtered = ((rows.top_k > 0) & (rows.top_k < size)) | (rows.top_p < 1) | (rows.min_p > 0)
    picked = filtered.nonzero()[:, 0]
    if picked.numel() == 0:
        return scaled
    everyone = picked.numel() == scaled.shape[0]
    part = scaled if everyone else scaled[picked]
    part = _cut(part, *_num_kept(part, rows if everyone else _only(rows, picked)))
    return part if everyone else scaled.index_copy(0, picked, part)


def _num_kept(scaled: Tensor, rows: SamplingRows) -> tuple[Tensor, Tensor]:
    """How many tokens each row keeps, and its logits in descending order at least that far."""
    size = scaled.shape[1]
    top_k = torch.where(rows.top_k > 0, rows.top_k.clamp(max=size), size)
    limited = top_k < size
    reach = max(1 if bool(limited.all()) else min(size, _LIKELIEST), int(torch.where(limited, top_k, 0).amax()))
    while True:
        best = scaled.topk(reach).values
        kept = _num_kept_of(best, scaled, top_k, rows)
        if reach == size or bool((kept < reach).logical_or_(top_k <= reach).all()):
            return kept, best
        reach = min(size, reach * 16)


def _num_kept_of(best: Tensor, scaled: Tensor, top_k: Tensor, rows: SamplingRows) -> Tensor:
    """Counts in `best`, the beginning of the order; as many as it holds if that is not far enough."""
    within_k = torch.arange(best.shape[1], device=best.device) < top_k[:, None]
    odds = (best - best[:, :1]).double().exp_()
    upto = odds.cumsum(-1)
    whole = (scaled - best[:, :1]).exp_().sum(-1, dtype=torch.float64)
    mass = torch.where(top_k <= best.shape[1], (odds * within_k).sum(-1), whole)
    within_p = (upto - odds < (rows.top_p * mass)[:, None]) | (rows.top_p >= 1)[:, None]
    within_min_p = odds >= rows.min_p[:, None]
    return (within_k & within_p & within_min_p).sum(-1).clamp_(min=1)


def _cut(scaled: Tensor, kept: Tensor, best: Tensor) -> Tensor:
    """Keeps the `kept` first tokens of each row's order; `best` says at which logit the last of them lies."""
    last = best.gather(1, kept[:, None] - 1)
    drop = scaled < last
    excess = scaled.shape[1] - drop.sum(-1) - kept
    if bool((excess > 0).any()):
        _drop_later_ties(drop, scaled == last, excess)
    return scaled.masked_fill_(drop, _MINUS_INFINITY)


def _drop_later_ties(drop: Tensor, tied: Tensor, excess: Tensor) -> None:
    """Marks the `excess` largest ids among each row's tokens that tie at the cut."""
    row, ids = tied.nonzero(as_tuple=True)
    ends = row.bincount(minlength=tied.shape[0]).cumsum(0)
    late = torch.arange(row.numel(), device=row.device) >= (ends - excess)[row]
    drop[row[late], ids[late]] = True
