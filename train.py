"""Train TA3N + M3EM: labelled clips of the source domain, unlabelled clips of the target domain.

    python -m m3em_fast.data.digits --out data/digits      make the embedded benchmark (once)
    python train.py --method m3em --run runs/m3em          train on it
    python train.py --preset epic --model B --data DIR     the report's Model B on EPIC-KITCHENS: docs/reproduce.md

Every run leaves a folder: metrics.json (accuracies, losses), run.json (options, versions, time), checkpoint.pt,
TensorBoard events, curves.png, consensus.png for the digits with CMC, scores/ for EPIC-KITCHENS. The last epoch is what
is reported: no choice is made by looking at the target. Killed or stopped at any moment it goes on with --resume; what
it says when something is wrong is in docs/errors.md.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import signal
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # the imports below take seconds: no traceback of them at Ctrl-C
if __name__ == "__main__" and "RANK" in os.environ:
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # thirty lines to say that another process has ended

from m3em_fast.data import _extra

if __name__ == "__main__":
    _extra.require("train.py", *_extra.TRAIN)

import numpy as np
import torch
from tqdm import tqdm

from m3em_fast import backends, env
from m3em_fast.data.prefetch import Batch, BatchReader, Prefetch
from m3em_fast.data.samplers import num_batches, paired_batches
from m3em_fast.data.store import FeatureStore, StoreError
from m3em_fast.epic import EpicError, write_scores
from m3em_fast.epic.models import MODELS, without_consensus
from m3em_fast.ops.consensus_map import resolve_num_scales
from m3em_fast.uda import METHODS, ActionModel, report, total_loss, warmup_coefficient
from m3em_fast.uda.checkpoint import CheckpointError, random_state, restore, save_checkpoint
from m3em_fast.uda.distributed import Team, first, joined, only_one_speaks
from m3em_fast.uda.evaluation import evaluate, majority_floor, predict
from m3em_fast.uda.losses import rows_not_finite, who_is_not_finite
from m3em_fast.uda.options import Options, parse, resolve
from m3em_fast.uda.run import CHECKPOINT, EventLog, NoLog, StopSignals, UsageError, open_run, write_whole, writing
from m3em_fast.uda.splits import Stores, labels_of, modalities_of, open_stores

# What ends a run with its message as the one sentence and exit code 2.
REFUSALS = (UsageError, StoreError, CheckpointError, EpicError, backends.BackendError, OSError)

Pair = tuple[np.ndarray, np.ndarray | None]


def build_model(options: Options, store: FeatureStore) -> ActionModel:
    read = modalities_of(store, options.model)
    maps = {name: m for name, m in read.items() if m.kind == "map"}
    vectors = {name: m.channels for name, m in read.items() if m.kind == "vector"}
    chosen = MODELS.get(options.model)
    method: str = options.method
    if left_out(options, store):
        method = {"m3em": "ta3n_smr", "ta3n_cmc": "ta3n"}[method]
    try:
        if METHODS[method]["cmc"]:
            sizes = {name: (m.height, m.width) for name, m in maps.items()}
            if len(set(sizes.values())) > 1:
                raise ValueError(f"CMC compares maps of one size, got {sizes}")
            for m in maps.values():
                assert m.height is not None and m.width is not None
                resolve_num_scales(options.num_scales, m.height, m.width)
        model = ActionModel(
            {name: m.channels for name, m in maps.items()},
            vectors,
            store.num_classes["verb"],
            store.num_classes["noun"],
            method=method,
            visual=None if chosen is None else chosen.visual,
            projected=dict.fromkeys(() if chosen is None else chosen.projected, options.object_dim),
            latent_channels=options.latent,
            num_scales=options.num_scales,
            center=options.center,
            reduction=options.reduction,
            gate_bias=options.gate_bias,
            init=options.init,
            fc_dim=options.fc_dim,
            relation_dim=options.relation_dim,
            dropout_i=options.dropout,
            dropout_v=options.dropout,
        )
        for name, m in read.items():
            if m.frames < model.num_segments:
                raise ValueError(f"a clip needs {model.num_segments} frames, {name} has {m.frames}")
    except (ValueError, KeyError, RuntimeError) as error:  # of torch: a name that no module can have, no memory
        reason = str(error.args[0]).splitlines()[0]
        raise UsageError(f"--method {options.method} does not fit the data in {options.data}: {reason}.") from error
    return model


def left_out(options: Options, store: FeatureStore) -> str | None:
    """Why the model is trained without CMC although the method has it; None where nothing is left out."""
    if options.model == "all" or not METHODS[options.method]["cmc"]:
        return None
    read = modalities_of(store, options.model)
    return without_consensus(options.model, [name for name, m in read.items() if m.kind == "map"])


def pairing(options: Options, stores: Stores) -> tuple[int, int | None, int, int]:
    """What the samplers need to know: clips and batch sizes; no target for a method that does not adapt."""
    num_target = len(stores.target) if METHODS[options.method]["adversarial"] else None
    return len(stores.source), num_target, options.batch_source, options.batch_target


def batches(pairs: Iterable[Pair], reader: BatchReader, team: Team) -> Iterator[tuple[Pair, Pair, Batch]]:
    """The clips of each step, source and target; this process's share of them; the share's features, source first,
    which are read while the step before is computed."""

    def shares() -> Iterator[tuple[Pair, Pair]]:
        for source, target in pairs:
            own = source[team.share(len(source))], None if target is None else target[team.share(len(target))]
            yield (source, target), own

    with Prefetch(shares(), lambda item, room: reader(item[1], room), workers=1 + reader.widens) as ahead:
        for (pair, own), features in ahead:
            yield pair, own, features


def half_precision(options: Options) -> AbstractContextManager:
    dtype = {"fp32": None, "fp16": torch.float16, "bf16": torch.bfloat16}[options.precision]
    return nullcontext() if dtype is None else torch.autocast(torch.device(options.device).type, dtype=dtype)


def train(options: Options) -> Path:
    with joined(options.device, REFUSALS) as team:  # of one process, but for torchrun
        return run_of(resolve(options), team)


def run_of(options: Options, team: Team) -> Path:
    stores = open_stores(options.data, options.protocol, options.model)
    plan = stores.plan
    if options.threads:
        torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    model = build_model(options, stores.source).to(options.device)
    fixed = {name: x for name, x in asdict(options).items() if name not in ("run", "resume")}
    fixed = json.loads(json.dumps(fixed, default=str))
    team.agree(fixed, {split: store.fingerprint for split, store in stores.items()})
    names = [options.preset, *((options.model, options.protocol) if plan.scored else ()), options.method]
    # After everything that can be refused, so that a refusal leaves no folder behind.
    with open_run(options.run, "-".join(names), options.resume) if team.first else nullcontext(Path()) as run:
        run = Path(team.of_first(str(run)))
        if (sentence := left_out(options, stores.source)) and team.first:
            print(f"train.py: {sentence}", file=sys.stderr)
        start = time.perf_counter()
        history = fit(options, fixed, stores, model, run, team)
        if plan.scored:
            store_scores(options, stores, model, run, team)
        if not team.first:
            return run
        seconds = time.perf_counter() - start
        environment = {"seconds": seconds, "processes": team.size, "environment": env.report()}
        about = {"options": fixed, "data": stores.source.meta, **environment}
        metrics: dict[str, Any] = {
            "method": options.method,
            "results": {split: history[split][-1] for split in plan.reported},
            "floor": {split: majority_floor(**labels_of(stores[split])) for split in plan.reported},
            "history": history,
        }
        if plan.scored:
            metrics |= {"model": options.model, "protocol": options.protocol}
            about["left_out"] = sentence
        write_whole(run / "run.json", (json.dumps(about, indent=1, default=str) + "\n").encode())
        write_whole(run / "metrics.json", (json.dumps(metrics, indent=1) + "\n").encode())
        with writing(run / "curves.png"):
            report.draw_curves(run)
        if model.enhancement.cmc is not None:
            with writing(run / "consensus.png"):
                report.draw_consensus(run, model, stores[plan.evaluated], torch.device(options.device))
    return run


def store_scores(options: Options, stores: Stores, model: ActionModel, run: Path, team: Team) -> None:
    """Logits of every clip of the protocol's scored splits, for ensembles and the submission, under ``run``/scores."""
    said = {name: getattr(options, name) for name in ("protocol", "model", "method", "seed", "epochs")}
    device, autocast = torch.device(options.device), half_precision(options)
    for split in stores.plan.scored:
        store, folder = stores[split], run / "scores" / split
        verb, noun = predict(model, store, batch=512, device=device, autocast=autocast, team=team)
        if team.first:
            about = {"split": split, **said, "features": store.fingerprint}
            # What is there is of this very run, which had ended and was resumed.
            write_scores(folder, store.clips, verb, noun, about, replace=True)


def fit(
    options: Options, fixed: dict[str, Any], stores: Stores, model: ActionModel, run: Path, team: Team
) -> dict[str, list]:
    """The training itself, from the start or the checkpoint; the losses of all steps, the scores of all epochs."""
    assert options.lr is not None
    plan = stores.plan
    device = torch.device(options.device)
    optimizer = torch.optim.SGD(
        model.parameters(), options.lr, momentum=0.9, nesterov=True, weight_decay=options.weight_decay
    )
    autocast = half_precision(options)
    scaler = torch.amp.GradScaler(device.type, enabled=options.precision == "fp16")

    source_labels = {kind: torch.from_numpy(x) for kind, x in labels_of(stores.source).items()}
    pair = pairing(options, stores)
    steps = num_batches(*pair)
    data = {split: store.fingerprint for split, store in stores.items()}
    history: dict[str, list] = {"loss": [], "terms": [], **{split: [] for split in plan.reported}}
    first_epoch, first_step = 0, 0
    parts: dict[str, Any] = {"model": model, "optimizer": optimizer, "scaler": scaler}
    several = team.size > 1
    reader = BatchReader(
        [stores.source, stores.target], model.modalities, model.num_segments, pin_memory=device.type == "cuda"
    )
    shared = team.wrap(model, reader([np.arange(0), None]), device, options.seed) if several else model
    if options.resume and team.of_first((run / CHECKPOINT).exists()):
        history, first_epoch, first_step = restore(
            run / CHECKPOINT,
            fixed,
            data,
            plan.reported,
            **parts,
            device=device,
            epochs=options.epochs,
            steps=steps,
            team=team,
        )
    done, total = first_epoch * steps + first_step, options.epochs * steps
    with (
        StopSignals(run, several) as stop,
        EventLog(run, purge_step=done) if team.first else NoLog() as log,
        tqdm(total=total, initial=done, desc=options.method, unit="step", disable=not team.first) as bar,
    ):

        def save(epoch: int, step: int) -> None:
            log.flush()  # first, so that the log lacks no step that will not be done again
            states = {name: part.state_dict() for name, part in parts.items()}
            position = {"epoch": epoch, "step": step, "random": random_state(device, team)}
            if team.first:
                save_checkpoint(
                    run / CHECKPOINT, {**states, **position, "history": history, "options": fixed, "data": data}
                )

        for epoch in range(first_epoch, options.epochs):
            for group in optimizer.param_groups:
                group["lr"] = options.lr * 0.1 ** sum(epoch >= s for s in options.lr_steps)
            model.train()
            begin = first_step if epoch == first_epoch else 0
            pairs = itertools.islice(paired_batches(*pair, seed=options.seed, epoch=epoch), begin, None)
            for step, ((source, target), (own, _), features) in enumerate(batches(pairs, reader, team), begin):
                # The public baseline counts epochs from 1 and divides by the run's own length; see docs/decisions.md.
                warmup = warmup_coefficient((step + (epoch + 1) * steps) / total)
                # Losses are sums over this process's share, divided by the clips that all have.
                verb, noun = (source_labels[kind][own].to(device) for kind in ("verb", "noun"))
                features = {name: x.to(device, non_blocking=True) for name, x in features.items()}
                with autocast:
                    out = shared(features, [warmup * b for b in options.beta])
                    loss, terms = total_loss(
                        out.streams,
                        verb,
                        noun,
                        lambda_y=options.lambda_y,
                        lambda_d=options.lambda_d,
                        gamma=options.gamma,
                        of=(len(source), 0 if target is None else len(target)),
                    )
                sums, stop.agreed = team.step({"loss": loss, **terms}, stop.came)
                value = sums.pop("loss")
                optimizer.zero_grad(set_to_none=True)
                scaler.scale(loss).backward()
                scaler.unscale_(optimizer)
                norm = torch.nn.utils.clip_grad_norm_(model.parameters(), options.clip_gradient)
                # In float16 a gradient may overflow: the scaler then leaves the step out and scales less.
                if not math.isfinite(value) or not (scaler.is_enabled() or norm.isfinite()):
                    clips = [stores.source.clips[i] for i in source]
                    clips += [stores.target.clips[i] for i in (() if target is None else target)]
                    bad = team.rows(rows_not_finite((out.verb, out.noun)), len(source), len(clips))
                    raise UsageError(
                        f"loss is {value}, its gradient's norm {norm:.4g}, at epoch {epoch + 1} step {step} "
                        f"({who_is_not_finite(sums, bad, clips)})."
                    )
                scaler.step(optimizer)
                scaler.update()

                history["loss"].append(value)
                history["terms"].append(sums)
                for name, x in sums.items():
                    log.add_scalar(f"loss/{name}", x, epoch * steps + step)
                bar.update()
                bar.set_postfix(epoch=epoch + 1, loss=f"{value:.3f}", refresh=False)
                if (step + 1) % options.save_every == 0 or step + 1 == steps or stop.asked is not None:
                    save(epoch, step + 1)
                stop.check()
            with stop.at_once():  # the state is saved, and evaluating changes nothing of it
                scores = {
                    split: evaluate(
                        model,
                        stores[split],
                        batch=512,
                        device=device,
                        autocast=autocast,
                        challenge=bool(plan.scored),
                        team=team,
                    )
                    for split in plan.reported
                }
            for split, metrics in scores.items():
                history[split].append(metrics)
                for name, x in metrics.items():
                    log.add_scalar(f"{split}/{name}", x, (epoch + 1) * steps)
            save(epoch + 1, 0)
            stop.check()
    return history


def main() -> int:
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with only_one_speaks():
            options = parse(sys.argv[1:], __doc__)
        run = train(options)
        if first():
            report.print_table([run])
    except REFUSALS as error:
        print(f"train.py: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as error:
        said = str(error) or "interrupted; --run with --resume goes on from the last checkpoint."
        with only_one_speaks():
            print(f"train.py: {said}", file=sys.stderr)
        return 128 + getattr(error, "signal", signal.SIGINT)
    return 0


if __name__ == "__main__":
    sys.exit(main())
