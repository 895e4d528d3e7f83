"""``python -m m3em_fast.data.digits``: make the digits benchmark, check it, or show what it looks like."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ... import _cli
from .._extra import needs
from .prepare import prepare
from .preview import write_preview
from .settings import DigitsConfig


@dataclass(frozen=True)
class Options:
    """Make the digits benchmark: feature stores of two domains, in about three minutes on two cores.

    A second call with the same settings finds everything made. Nothing is downloaded.
    """

    out: Path = Path("data/digits")
    """Folder for the four stores, source_train to target_test; one folder holds one setting."""
    preview: Path | None = None
    """Write an animated GIF of both domains here and make nothing else."""
    verify: bool = False
    """Check the SHA-256 of every shard of the stores."""
    workers: int | None = None
    """Processes; one per core by default. The result does not depend on it."""
    config: DigitsConfig = field(default_factory=DigitsConfig)
    """What is made."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; one sentence on stderr and status 2 where something is refused."""
    from ..store import FeatureStore

    prog = "m3em_fast.data.digits"
    try:
        tyro = needs("tyro")
        options: Options = _cli.cli(
            tyro.conf.configure(tyro.conf.OmitArgPrefixes)(Options), arguments, prog=f"python -m {prog}"
        )
        if options.workers is not None and options.workers < 1:
            raise ValueError(f"workers must be at least 1, got {options.workers}.")
        if options.preview is not None:
            if options.preview.suffix.lower() != ".gif":
                raise ValueError(f"preview must be a file name that ends in .gif, got {options.preview}.")
            write_preview(options.preview, options.config)
            print(options.preview)
            return 0
        for split, path in prepare(options.out, options.config, workers=options.workers).items():
            store = FeatureStore(path, verify=options.verify)
            print(f"{split:12} {len(store):5} clips  {path}{'  checksums right' if options.verify else ''}")
            accuracies = store.meta["backbone_source_val_accuracy"]
        print("backbones on source_val: " + ", ".join(f"{name} {100 * v:.1f} %" for name, v in accuracies.items()))
    except OSError as error:
        said = f"{error.filename}: {error.strerror}." if error.filename else error
        print(f"{prog}: {said}", file=sys.stderr)
        return 2
    except (ValueError, ImportError) as error:
        print(f"{prog}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"{prog}: interrupted; the next call goes on with the first unfinished stage.", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
