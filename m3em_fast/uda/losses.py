"""The loss terms of TA3N and their sum over streams (equation 6 of the M3EM report)."""

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
    "stream_losses",
    "total_loss",
    "who_is_not_finite",
]

ADVERSARIAL = ("adversarial_relation", "adversarial_video", "adversarial_frame")


def classification_loss(verb_logits: Tensor, noun_logits: Tensor, verb: Tensor, noun: Tensor) -> Tensor:
    """Half the sum of the verb's and the noun's cross-entropy, each a mean over (B, classes) logits."""
    return 0.5 * (F.cross_entropy(verb_logits, verb) + F.cross_entropy(noun_logits, noun))


def adversarial_loss(domain_logits: Tensor, num_source: int) -> Tensor:
    """Cross-entropy of domain logits (B,2) or (B,K,2): 0 for the first ``num_source`` rows, 1 for the rest."""
    rows = domain_logits.shape[0]
    domain = (torch.arange(rows, device=domain_logits.device) >= num_source).long()
    if domain_logits.dim() == 3:
        domain = domain[:, None].expand(domain_logits.shape[:2])
    return F.cross_entropy(domain_logits.reshape(-1, 2), domain.reshape(-1))


def attentive_entropy(domain_video_logits: Tensor, class_logits: Tensor) -> Tensor:
    """Mean over clips of ``(1 + H(domain)) * H(class)``: be certain where the domains cannot be told apart."""
    return ((1.0 + entropy(domain_video_logits)) * entropy(class_logits)).mean()


def stream_losses(out: StreamOutput, verb: Tensor, noun: Tensor, num_source: int) -> dict[str, Tensor]:
    """The terms of one stream, unweighted.

    Args:
        out: TA3N's output for source clips followed by target clips.
        verb, noun: (num_source,) int64 labels of the source clips.
        num_source: how many of the rows are source.

    Returns:
        ``classification``, and with adaptation ``adversarial_relation``, ``adversarial_video``,
        ``adversarial_frame`` and ``attentive_entropy`` (half the sum of verb's and noun's, over all rows).
    """
    terms = {"classification": classification_loss(out.verb[:num_source], out.noun[:num_source], verb, noun)}
    if out.domain_relation is not None and out.domain_video is not None and out.domain_frame is not None:
        terms["adversarial_relation"] = adversarial_loss(out.domain_relation, num_source)
        terms["adversarial_video"] = adversarial_loss(out.domain_video, num_source)
        terms["adversarial_frame"] = adversarial_loss(out.domain_frame, num_source)
        terms["attentive_entropy"] = 0.5 * (
            attentive_entropy(out.domain_video, out.verb) + attentive_entropy(out.domain_video, out.noun)
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
) -> tuple[Tensor, dict[str, Tensor]]:
    """``lambda_y * L_y + lambda_d * L_d + gamma * L_ae``, every term summed over the streams.

    Args:
        streams: stream -> TA3N's output, source clips first; as many of them as there are labels.
        verb, noun: (source clips,) int64.
        lambda_y, lambda_d, gamma: weights of classification, of all adversarial terms and of the attentive entropy.

    Returns:
        the loss, and the unweighted terms summed over streams, detached, for the log.
    """
    terms: dict[str, Tensor] = {}
    for out in streams.values():
        for name, value in stream_losses(out, verb, noun, len(verb)).items():
            terms[name] = terms[name] + value if name in terms else value
    weights = {"classification": lambda_y, "attentive_entropy": gamma, **dict.fromkeys(ADVERSARIAL, lambda_d)}
    loss = torch.stack([weights[name] * value for name, value in terms.items()]).sum()
    return loss, {name: value.detach() for name, value in terms.items()}


def who_is_not_finite(terms: Mapping[str, Tensor], scores: Sequence[Tensor], clips: Sequence[str]) -> str:
    """For the sentence about a loss that is no number: its terms, and the clips whose scores are none.

    Args:
        terms: as :func:`total_loss` gives them.
        scores: (clips, classes) logits.
        clips: a step's clip ids, in the rows' order; the first of them are named where all have finite scores.
    """
    values = ", ".join(f"{name} {x.item():.4g}" for name, x in terms.items())
    bad = (~torch.cat(list(scores), 1).isfinite().all(1)).nonzero()[:, 0].tolist()
    of = f"{len(bad)} of {len(clips)} clips have scores that are not finite" if bad else "all scores are finite"
    named = [repr(clips[i]) for i in (bad or range(len(clips)))[:10]]  # quoted: an id may hold anything
    return f"{values}; {of}: {', '.join(named)}{', ...' if len(bad or clips) > 10 else ''}"
