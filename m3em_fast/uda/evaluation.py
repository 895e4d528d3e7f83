"""Top-1 and top-5 accuracy of verbs, nouns and actions, and the floor that a constant answer reaches."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from torchmetrics.functional.classification import multiclass_accuracy
from tqdm import tqdm

from m3em_fast.data.prefetch import BatchReader, Prefetch
from m3em_fast.epic.scores import log_softmax
from m3em_fast.epic.scoring import top_actions, top_classes
from m3em_fast.uda.distributed import ALONE, Team
from m3em_fast.uda.fusion import action_scores

if TYPE_CHECKING:
    from m3em_fast.data.store import FeatureStore
    from m3em_fast.uda.model import ActionModel

__all__ = ["METRICS", "TOP", "accuracies", "challenge_accuracies", "evaluate", "majority_floor", "predict"]

TOP = (1, 5)
METRICS = tuple(f"{kind}_top{k}" for kind in ("verb", "noun", "action") for k in TOP)


def accuracies(verb_logits: Tensor, noun_logits: Tensor, verb: Tensor, noun: Tensor) -> dict[str, float]:
    """Accuracies in percent over clips: (B, verbs) and (B, nouns) fused logits against (B,) labels.

    An action is right when verb and noun are; pairs are ranked by the sum of both log-softmax scores. With fewer than
    five classes top-5 is 100.
    """
    num_nouns = noun_logits.shape[1]
    scores = {
        "verb": (verb_logits.double(), verb),
        "noun": (noun_logits.double(), noun),
        "action": (action_scores(verb_logits, noun_logits), verb * num_nouns + noun),
    }
    result = {}
    for kind, (score, label) in scores.items():
        classes = score.shape[1]
        for k in TOP:
            value = multiclass_accuracy(score, label, num_classes=classes, top_k=min(k, classes), average="micro")
            result[f"{kind}_top{k}"] = 100.0 * value.item()
    return result


def challenge_accuracies(verb_logits: Tensor, noun_logits: Tensor, verb: Tensor, noun: Tensor) -> dict[str, float]:
    """As :func:`accuracies`, counted by what scores the challenge: :mod:`m3em_fast.epic.scoring`.

    The scores of all pairs of 97 verbs and 300 nouns are never made: for target_val they would take 1.8 GB. The two
    differ where scores are equal, of which the challenge's counts the class of the higher id first.
    """
    scores = {"verb": log_softmax(verb_logits.numpy()), "noun": log_softmax(noun_logits.numpy())}
    labels = {"verb": verb.numpy()[:, None], "noun": noun.numpy()[:, None]}
    hits = {kind: top_classes(scores[kind], max(TOP)) == labels[kind] for kind in scores}
    verbs, nouns = top_actions(scores["verb"], scores["noun"], max(TOP))
    hits["action"] = (verbs == labels["verb"]) & (nouns == labels["noun"])
    return {f"{kind}_top{k}": 100.0 * float(hit[:, :k].any(1).mean()) for kind, hit in hits.items() for k in TOP}


def majority_floor(verb: np.ndarray, noun: np.ndarray) -> dict[str, float]:
    """What the most frequent class (the five most frequent, for top-5) of these very labels would score, in percent."""
    result = {}
    for kind, label in {"verb": verb, "noun": noun, "action": verb * (noun.max() + 1) + noun}.items():
        counts = np.sort(np.unique(label, return_counts=True)[1])[::-1]
        for k in TOP:
            result[f"{kind}_top{k}"] = 100.0 * float(counts[:k].sum()) / len(label)
    return result


@torch.no_grad()
def predict(
    model: ActionModel,
    store: FeatureStore,
    *,
    batch: int,
    device: torch.device,
    autocast: AbstractContextManager,
    team: Team = ALONE,
) -> tuple[Tensor, Tensor]:
    """Fused float32 logits, (clips, verbs) and (clips, nouns), of a whole store.

    With a ``team`` each of its processes predicts a share of the clips, and all of them get the logits of all.
    """
    training = model.training
    model.eval()
    verbs, nouns = [], []
    # delay: no bar for what takes under two seconds anyway.
    own = np.arange(len(store))[team.share(len(store))]
    # At least one batch, if an empty one: a share may be, and its logits have a width too.
    parts = [(own[start : start + batch],) for start in range(0, len(own) or 1, batch)]
    reader = BatchReader([store], model.modalities, model.num_segments, pin_memory=device.type == "cuda")
    with Prefetch(parts, reader, workers=1) as batches:
        for _, features in tqdm(
            batches, "evaluate", len(parts), unit="batch", leave=False, delay=2, disable=not team.first
        ):
            with autocast:
                out = model({name: x.to(device, non_blocking=True) for name, x in features.items()})
            verbs.append(out.verb.float().cpu())
            nouns.append(out.noun.float().cpu())
    model.train(training)
    logits = torch.cat(verbs), torch.cat(nouns)
    if team.size == 1:
        return logits
    whole = tuple(x.new_zeros((len(store), x.shape[1])) for x in logits)
    for all_of_them, x in zip(whole, logits, strict=True):
        all_of_them[team.share(len(store))] = x
        team.sum(all_of_them)  # every clip is in one process's share: nothing is added to anything but 0
    return whole[0], whole[1]


def evaluate(
    model: ActionModel,
    store: FeatureStore,
    *,
    batch: int,
    device: torch.device,
    autocast: AbstractContextManager,
    challenge: bool = False,
    team: Team = ALONE,
) -> dict[str, float]:
    """Accuracies of the model on a labelled store, in percent; ``challenge``: :func:`challenge_accuracies`.

    ``team`` as in :func:`predict`.
    """
    if store.labels is None:
        raise ValueError(f"evaluate: the feature store of {len(store)} clips has no labels to compare with")
    verb, noun = predict(model, store, batch=batch, device=device, autocast=autocast, team=team)
    count = challenge_accuracies if challenge else accuracies
    return count(verb, noun, torch.from_numpy(store.labels["verb"]), torch.from_numpy(store.labels["noun"]))
