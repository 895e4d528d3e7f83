"""The loss terms of TA3N and their sum over streams (equation 6 of the M3EM report).

Every term is a sum over rows divided by a number of rows: that of the whole step, where several processes have a share
of it each. The terms of all processes, and their gradients, then add up to those of one process.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from m3em_fast.uda.ta3n import StreamOutput, entropy

__all__ = [
    "adversarial_loss",
    "attentive_entropy",
    "classification_loss",
    "rows_not_finite",
    "stream_losses",
    "total_loss",
    "who_is_not_finite",
]

ADVERSARIAL = ("adversarial_relation", "adversarial_video", "adversarial_frame")


def classification_loss(
    verb_logits: Tensor, noun_logits: Tensor, verb: Tensor, noun: Tensor, clips: int | None = None
) -> Tensor:
    """Half the sum of the verb's and the noun's cross-entropy over (B, classes) logits, each divided by ``clips``.

    ``clips`` is B where it is not given: a mean.
    """
    clips = len(verb) if clips is None else clips
    losses = [F.cross_entropy(*pair, reduction="sum") / clips for pair in ((verb_logits, verb), (noun_logits, noun))]
    return 0.5 * (losses[0] + losses[1])


def adversarial_loss(domain_logits: Tensor, num_source: int, clips: int | None = None) -> Tensor:
    """Cross-entropy of domain logits (B,2) or (B,K,2): 0 for the first ``num_source`` rows, 1 for the rest.

    The sum is divided by ``clips``, B where it is not given, and by K.
    """
    rows = domain_logits.shape[0]
    domain = (torch.arange(rows, device=domain_logits.device) >= num_source).long()
    count = rows if clips is None else clips
    if domain_logits.dim() == 3:
        domain = domain[:, None].expand(domain_logits.shape[:2])
        count *= domain_logits.shape[1]
    return F.cross_entropy(domain_logits.reshape(-1, 2), domain.reshape(-1), reduction="sum") / count


def attentive_entropy(domain_video_logits: Tensor, class_logits: Tensor, clips: int | None = None) -> Tensor:
    """``(1 + H(domain)) * H(class)``, be certain where the domains cannot be told apart: the sum over clips, divided by
    ``clips`` (their number, where it is not given)."""
    clips = len(class_logits) if clips is None else clips
    return ((1.0 + entropy(domain_video_logits)) * entropy(class_logits)).sum() / clips


def stream_losses(
    out: StreamOutput, verb: Tensor, noun: Tensor, num_source: int, of: tuple[int, int] | None = None
) -> dict[str, Tensor]:
    """The terms of one stream, unweighted.

    Args:
        out: TA3N's output for source clips followed by target clips.
        verb, noun: (num_source,) int64 labels of the source clips.
        num_source: how many of the rows are source.
        of: source and target clips of the whole step, where these are one process's share of it.

    Returns:
        ``classification``, and with adaptation ``adversarial_relation``, ``adversarial_video``,
        ``adversarial_frame`` and ``attentive_entropy`` (half the sum of verb's and noun's, over all rows).
    """
    source, clips = (num_source, len(out.verb)) if of is None else (of[0], sum(of))
    terms = {"classification": classification_loss(out.verb[:num_source], out.noun[:num_source], verb, noun, source)}
    if out.domain_relation is not None and out.domain_video is not None and out.domain_frame is not None:
        terms["adversarial_relation"] = adversarial_loss(out.domain_relation, num_source, clips)
        terms["adversarial_video"] = adversarial_loss(out.domain_video, num_source, clips)
        terms["adversarial_frame"] = adversarial_loss(out.domain_frame, num_source, clips)
        terms["attentive_entropy"] = 0.5 * (
            attentive_entropy(out.domain_video, out.verb, clips) + attentive_entropy(out.domain_video, out.noun, clips)
        )
    return terms


def total_loss(
    streams: Mapping[str, StreamOutput],
    verb: Tensor,
    noun: Tensor,
    *,
    lambda_y: float = 1.0,
    lambda_d: float = 1.0,
    gamma: float = 0.003,
    of: tuple[int, int] | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """``lambda_y * L_y + lambda_d * L_d + gamma * L_ae``, every term summed over the streams.

    Args:
        streams: stream -> TA3N's output, source clips first; as many of them as there are labels.
        verb, noun: (source clips,) int64.
        lambda_y, lambda_d, gamma: weights of classification, of all adversarial terms and of the attentive entropy.
        of: as in :func:`stream_losses`.

    Returns:
        the loss, and the unweighted terms summed over streams, detached, for the log.
    """
    terms: dict[str, Tensor] = {}
    for out in streams.values():
        for name, value in stream_losses(out, verb, noun, len(verb), of).items():
            terms[name] = terms[name] + value if name in terms else value
    weights = {"classification": lambda_y, "attentive_entropy": gamma, **dict.fromkeys(ADVERSARIAL, lambda_d)}
    loss = torch.stack([weights[name] * value for name, value in terms.items()]).sum()
    return loss, {name: value.detach() for name, value in terms.items()}


def rows_not_finite(scores: Sequence[Tensor]) -> Tensor:
    """(clips,) bool, on the CPU: whose (clips, classes) logits are not all finite."""
    return ~torch.cat(list(scores), 1).isfinite().all(1).cpu()


def who_is_not_finite(terms: Mapping[str, float], rows: Tensor, clips: Sequence[str]) -> str:
    """For the sentence about a loss that is no number: its terms, and the clips whose scores are none.

    Args:
        terms: as :func:`total_loss` gives them, as numbers.
        rows: (clips,), not zero for those of :func:`rows_not_finite`.
        clips: a step's clip ids, in the rows' order; the first of them are named where all have finite scores.
    """
    values = ", ".join(f"{name} {x:.4g}" for name, x in terms.items())
    bad = rows.nonzero()[:, 0].tolist()
    of = f"{len(bad)} of {len(clips)} clips have scores that are not finite" if bad else "all scores are finite"
    named = [repr(clips[i]) for i in (bad or range(len(clips)))[:10]]  # quoted: an id may hold anything
    return f"{values}; {of}: {', '.join(named)}{', ...' if len(bad or clips) > 10 else ''}"
