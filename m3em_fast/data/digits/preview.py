"""An animated picture of the benchmark: what both domains look, move and sound like."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import numpy as np

from .._extra import needs
from .prepare import load_frames
from .render import FLOW_CLIP, plan
from .settings import FRAMES, NOUNS, SIDE, VERBS, DigitsConfig

SCALE = 2  # screen pixels per pixel of a clip
COLUMNS, ROWS = 3, 3  # clips of each domain
GAP, EDGE, LABEL, HEADING = 4, 14, 22, 34
TILE = SIDE * SCALE
CELL = (3 * TILE + 2 * GAP, TILE + LABEL)
INK, PAPER, FAINT = (235, 235, 235), (24, 26, 30), (150, 155, 165)
ACCENT = {"source": (120, 200, 120), "target": (240, 160, 90)}


def flow_picture(flow: np.ndarray) -> np.ndarray:
    """Flow (..., 2) as colours (..., 3) uint8: hue for direction, saturation for speed; white stands still."""
    x, y = np.moveaxis(flow.astype(np.float32), -1, 0)
    speed = np.clip(np.hypot(x, y) / (FLOW_CLIP / 2), 0, 1)
    hue = np.mod(np.arctan2(y, x) / (2 * np.pi), 1) * 6
    sectors = np.stack([np.abs(hue - 3) - 1, 2 - np.abs(hue - 2), 2 - np.abs(hue - 4)], axis=-1)
    return ((1 - speed[..., None] * (1 - np.clip(sectors, 0, 1))) * 255).astype(np.uint8)


def flow_wheel(side: int) -> np.ndarray:
    """Key to :func:`flow_picture`, (side, side, 4) uint8: the colour of a motion lies where the motion goes."""
    rows, columns = np.mgrid[:side, :side] - (side - 1) / 2
    colours = flow_picture(np.stack([columns, rows], axis=-1) / (side / 2) * (FLOW_CLIP / 2))
    inside = np.hypot(rows, columns) <= side / 2
    return np.concatenate([colours, 255 * inside[..., None].astype(np.uint8)], axis=-1)


def sound_picture(sound: np.ndarray, now: int) -> np.ndarray:
    """Spectrograms (frames, bins, steps) of one clip as one picture (bins, frames * steps, 3), low frequencies below.

    What has not sounded yet at frame ``now`` is dimmed.
    """
    palette = needs("matplotlib").colormaps["magma"]
    whole = np.concatenate(list(sound), axis=1)[::-1]
    low, high = np.percentile(whole, (5, 99.5))
    colours = palette(np.clip((whole - low) / max(high - low, 1e-6), 0, 1))[..., :3]
    colours[:, (now + 1) * sound.shape[2] :] *= 0.35
    return (colours * 255).astype(np.uint8)


def write_preview(path: Path, config: DigitsConfig, seconds: float = 0.35) -> None:
    """Write an animated GIF: source clips in the upper half, target clips below; per clip frames, flow and sound.

    Args:
        path: file to write; an existing one is replaced once the new one is complete.
        config: which benchmark. Nothing but the shown clips is drawn.
        seconds: time that one frame stays.

    Raises:
        OSError: the file cannot be written.
    """
    if not path.parent.is_dir():
        raise FileNotFoundError(errno.ENOENT, "there is no such folder to write the preview to", str(path.parent))
    image_module = needs("PIL.Image")
    pages = [_page(config, now, clips) for clips in [_clips(config)] for now in range(FRAMES)]
    temporary = path.with_name(f".{path.name}.partial")
    try:
        # One palette for all pages: with one each, still parts flicker.
        strip = image_module.new("RGB", (pages[0].width, pages[0].height * len(pages)))
        for number, page in enumerate(pages):
            strip.paste(page, (0, number * page.height))
        palette = strip.quantize(256, method=image_module.Quantize.MEDIANCUT)
        quantised = [page.quantize(palette=palette, dither=image_module.Dither.NONE) for page in pages]
        durations = [int(1000 * seconds)] * (FRAMES - 1) + [int(2500 * seconds)]
        quantised[0].save(
            temporary, format="GIF", save_all=True, append_images=quantised[1:], duration=durations, loop=0
        )
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _clips(config: DigitsConfig) -> dict[str, list[tuple[str, np.ndarray, np.ndarray, np.ndarray]]]:
    """Clips to show of each domain, no two with one verb or one noun as far as that goes."""
    shown = {}
    for domain in ("source", "target"):
        split = f"{domain}_train"
        specs = plan(config, split)
        chosen: list[int] = []
        for limit in range(1, COLUMNS * ROWS + 1):
            for index, spec in enumerate(specs):
                used = [specs[i] for i in chosen]
                fresh = (
                    sum(s.verb == spec.verb for s in used) < limit and sum(s.noun == spec.noun for s in used) < limit
                )
                if fresh and index not in chosen and len(chosen) < COLUMNS * ROWS:
                    chosen.append(index)
        names = [f"{NOUNS[specs[index].noun]}  {VERBS[specs[index].verb]}" for index in chosen]
        shown[domain] = list(zip(names, *load_frames(config, split, chosen), strict=True))
    return shown


def _font(size: int) -> Any:
    # matplotlib ships this font; Pillow's own has one small size where FreeType is missing.
    file = Path(needs("matplotlib").get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"
    return needs("PIL.ImageFont").truetype(str(file), size)


def _page(
    config: DigitsConfig, now: int, shown: dict[str, list[tuple[str, np.ndarray, np.ndarray, np.ndarray]]]
) -> Any:
    image_module = needs("PIL.Image")
    width = 2 * EDGE + COLUMNS * CELL[0] + (COLUMNS - 1) * EDGE
    half = HEADING + ROWS * CELL[1] + (ROWS - 1) * GAP
    page = image_module.new("RGB", (width, 2 * half + EDGE), PAPER)
    pen = needs("PIL.ImageDraw").Draw(page)
    small, large = _font(13), _font(17)
    for number, (domain, clips) in enumerate(shown.items()):
        top = number * half
        look = getattr(config, domain)
        labelled = "labels are used in training" if domain == "source" else "labels are hidden in training"
        pen.text((EDGE, top + 8), f"{domain} domain “{look}”", fill=ACCENT[domain], font=large)
        pen.text((EDGE + 210, top + 19), labelled, fill=FAINT, font=small, anchor="lm")
        pen.text((width - EDGE, top + 19), "frames · flow       · sound", fill=FAINT, font=small, anchor="rm")
        wheel = image_module.fromarray(flow_wheel(22))
        left = width - EDGE - int(small.getlength("   · sound")) - wheel.width + 9
        page.paste(wheel, (left, top + 8), wheel)
        for place, (name, rgb, flow, sound) in enumerate(clips):
            x = EDGE + place % COLUMNS * (CELL[0] + EDGE)
            y = top + HEADING + place // COLUMNS * (CELL[1] + GAP)
            pictures = (rgb[now], flow_picture(flow[now]), sound_picture(sound, now))
            for slot, picture in enumerate(pictures):
                tile = image_module.fromarray(picture).resize((TILE, TILE), image_module.Resampling.NEAREST)
                page.paste(tile, (x + slot * (TILE + GAP), y))
            pen.text((x, y + TILE + 3), name, fill=INK, font=small)
    return page
