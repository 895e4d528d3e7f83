"""Clips of the digits benchmark: real handwriting in motion over real photographs, drawn from a seed.

Every clip has its own random generator, made from the dataset's seed, its split and its index, so a clip comes out the
same whoever draws it, in whatever order and process.
"""

from __future__ import annotations

import functools
import importlib.resources
import io
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .._extra import needs
from .settings import FRAMES, SIDE, SPLITS, VERBS, DigitsConfig, Domain

MEL, STEPS = 32, 16  # frequency bins and time steps of one frame's spectrogram
RENDERED = FRAMES + 1  # flow needs a successor for the last frame
MARGIN = 12  # pixels that the camera may move within
SPRITE = 24
FLOW_UNIT = 5.0  # pixels per frame that are stored as 1
FLOW_CLIP = 1.6

# One of each pair goes to the source, the other to the target: texture against texture, page against page. A split that
# is not paired gives one domain all the textures, and the gap then depends on the draw.
_PAIRS = (
    ("grass.png", "gravel.png"),
    ("page.png", "text.png"),
    ("brick.png", "clock_motion.png"),
    ("astronaut.png", "camera.png"),
    ("coffee.png", "chelsea.png"),
    ("coins.png", "moon.png"),
    ("rocket.jpg", "ihc.png"),
    ("retina.jpg", "hubble_deep_field.jpg"),
)
_CENTRES = ((18, 18), (38, 18), (18, 38), (38, 38))


@dataclass(frozen=True)
class ClipSpec:
    """What is decided about a clip before it is drawn; small enough to send to a worker."""

    entropy: tuple[int, ...]
    verb: int
    noun: int
    digit: np.ndarray  # (8, 8) float, 0..16
    other: np.ndarray  # (8, 8), the digit that does not move
    background: str
    domain: Domain


@functools.cache
def _background(name: str) -> np.ndarray:
    """One of scikit-image's bundled pictures as (height, width, 3) uint8.

    The file is read from the installed package: scikit-image's own loader may try to download what it misses.
    """
    needs("skimage")
    file = importlib.resources.files("skimage") / "data" / name
    if not file.is_file():
        raise FileNotFoundError(
            f"{name} is not among the pictures of the installed scikit-image; install 0.22 or newer."
        )
    with needs("PIL.Image").open(io.BytesIO(file.read_bytes())) as image:
        picture = np.asarray(image.convert("RGB"))
    return np.ascontiguousarray(picture[350:1050, 350:1050] if name.startswith("retina") else picture)


@functools.lru_cache(maxsize=1)
def _handwriting() -> tuple[np.ndarray, np.ndarray]:
    digits = needs("sklearn.datasets").load_digits()
    return digits.images, digits.target


def plan(config: DigitsConfig, split: str) -> list[ClipSpec]:
    """Decide classes, handwriting and backgrounds of a split.

    Source and target get opposite halves of the handwriting and of every pair of backgrounds; within a domain the first
    three quarters of its handwriting go to training. Handwriting is cut in contiguous blocks, as neighbours in the
    collection tend to have one writer (it names none, so "other writers" is an assumption).
    """
    size, source = config.size(split), split.startswith("source")
    shared = np.random.default_rng([config.seed, 1000])
    sides = shared.integers(0, 2, len(_PAIRS))
    backgrounds = [pair[side if source else 1 - side] for pair, side in zip(_PAIRS, sides, strict=True)]
    images, targets = _handwriting()
    order = np.roll(np.arange(len(images)), -int(shared.integers(len(images))))
    half = order[: len(order) // 2] if source else order[len(order) // 2 :]
    cut = len(half) * 3 // 4
    block = half[:cut] if split.endswith("train") else half[cut:]

    number = SPLITS.index(split)
    rng = np.random.default_rng([config.seed, 2000, number])
    nouns, verbs = rng.permutation(np.arange(size) % 10), rng.permutation(np.arange(size) % len(VERBS))
    specs = []
    for index, (verb, noun) in enumerate(zip(verbs, nouns, strict=True)):
        same, different = block[targets[block] == noun], block[targets[block] != noun]
        specs.append(
            ClipSpec(
                entropy=(config.seed, 3000, number, index),
                verb=int(verb),
                noun=int(noun),
                digit=images[rng.choice(same)],
                other=images[rng.choice(different)],
                background=backgrounds[int(rng.integers(len(backgrounds)))],
                domain=config.domain(split),
            )
        )
    return specs


def _digit_mask(image: np.ndarray) -> np.ndarray:
    cv2 = needs("cv2")
    mask = cv2.resize(image.astype(np.float32) / 16, (SPRITE, SPRITE), interpolation=cv2.INTER_CUBIC)
    return np.clip(mask * 1.4 - 0.15, 0, 1)


def _blob_mask(rng: np.random.Generator) -> np.ndarray:
    cv2 = needs("cv2")
    cloud = cv2.resize(rng.normal(size=(5, 5)).astype(np.float32), (SPRITE, SPRITE), interpolation=cv2.INTER_CUBIC)
    rows, columns = np.mgrid[:SPRITE, :SPRITE]
    disc = np.clip((11.5 - np.hypot(rows - 11.5, columns - 11.5)) / 2, 0, 1)
    return (np.clip((cloud - 0.1) * 4, 0, 1) * disc).astype(np.float32)


def _colour(rng: np.random.Generator, domain: Domain, brightness: float) -> np.ndarray:
    """Colour (3,) of a layer whose brightness differs from the background's by a draw from ``contrast``."""
    cv2 = needs("cv2")
    dark = rng.random() < domain.p_dark
    contrast = rng.uniform(*domain.contrast)
    level = np.clip(brightness - contrast, 0.02, 1) if dark else np.clip(brightness + contrast, 0, 1)
    hsv = np.array([[[int(179 * rng.uniform(*domain.hue)), int(255 * rng.uniform(0.2, 0.7)), 255]]], np.uint8)
    rgb = cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB)[0, 0].astype(np.float32) / 255
    return (rgb / rgb.mean() * level).astype(np.float32)


def _motion(verb: int, rng: np.random.Generator, speed: tuple[float, float], centre: tuple[float, float]) -> np.ndarray:
    """Positions (RENDERED, 4): x, y in pixels, angle in degrees, scale."""
    velocity = rng.uniform(*speed)
    time = np.arange(RENDERED) - (RENDERED - 1) / 2
    track = np.empty((RENDERED, 4))
    track[:] = (*centre, rng.uniform(-12, 12), rng.uniform(0.8, 1.05))
    sign = 1 if verb % 2 else -1
    if verb < 2:
        track[:, 0] += sign * velocity * time
    elif verb < 4:
        track[:, 1] += sign * velocity * time
    elif verb < 6:
        track[:, 2] += sign * 5 * velocity * time
    else:
        track[:, 3] *= np.exp(-sign * 0.035 * velocity * time)
    return track


def _draw(frame: np.ndarray, mask: np.ndarray, colour: np.ndarray, place: np.ndarray) -> None:
    cv2 = needs("cv2")
    x, y, angle, scale = (float(value) for value in place)
    matrix = cv2.getRotationMatrix2D((11.5, 11.5), angle, scale)
    matrix[:, 2] += (x - 11.5, y - 11.5)
    alpha = cv2.warpAffine(mask, matrix, (SIDE, SIDE), flags=cv2.INTER_LINEAR)[..., None]
    frame *= 1 - alpha
    frame += alpha * colour


def _spectrogram(verb: int, rng: np.random.Generator, domain: Domain) -> np.ndarray:
    """Sound of a motion, (FRAMES, MEL, STEPS) float32: the kind of motion sets the timbre, its direction the chirp."""
    time, bins = np.linspace(-1, 1, STEPS * RENDERED), np.arange(MEL)[:, None]
    kind, sign = verb // 2, 1 if verb % 2 else -1

    def line(centre: Any, width: float) -> np.ndarray:
        return np.exp(-0.5 * ((bins - centre) / width) ** 2)

    base = (8, 14, 20, 11)[kind] + rng.normal(0, 1.0) + domain.audio_shift
    pitch = base + (3.0, 3.0, 2.0, 2.0)[kind] * sign * rng.uniform(0.6, 1.2) * time
    if kind == 2:
        pitch = pitch + 1.5 * np.sin(14 * time + rng.uniform(0, 6))
    sound = line(pitch, 1.2)
    if kind in (1, 3):
        sound = sound + 0.7 * line(pitch * 1.6, 1.2)
    if kind == 3:
        sound = sound * (0.6 + 0.4 * np.sign(np.sin(20 * time + rng.uniform(0, 6))))
    sound = domain.audio_level * sound * rng.uniform(0.5, 1.3)
    noise = np.abs(rng.normal(size=(MEL, time.size))) * 0.45
    if domain.audio_shift:
        noise = noise + 0.5 * line(5 + rng.normal(), 0.8) + 0.25 * np.exp(-bins / 6.0)
    logarithm = np.log(sound + noise + 1e-2)[:, : FRAMES * STEPS]
    return logarithm.reshape(MEL, FRAMES, STEPS).swapaxes(0, 1).astype(np.float32)


def render_clip(spec: ClipSpec) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Draw one clip.

    Returns:
        frames (5, 56, 56, 3) uint8; flow (5, 56, 56, 2) float16, from each frame to the next, in units of 5 pixels a
        frame, x before y; spectrograms (5, 32, 16) float32, the logarithm of the magnitude.
    """
    cv2 = needs("cv2")
    rng, domain, picture = np.random.default_rng(spec.entropy), spec.domain, _background(spec.background)
    height, width = picture.shape[:2]
    side = int(rng.integers(90, min(height, width, 260)))
    top, left = int(rng.integers(0, height - side + 1)), int(rng.integers(0, width - side + 1))
    crop, canvas = picture[top : top + side, left : left + side], SIDE + 2 * MARGIN
    scene = cv2.resize(crop, (canvas, canvas), interpolation=cv2.INTER_AREA).astype(np.float32) / 255
    if rng.random() < 0.5:
        scene = scene[:, ::-1]
    mean = scene.mean()
    scene = np.ascontiguousarray((scene - mean) * domain.background_contrast + np.clip(mean, 0.25, 0.75))
    brightness = float(scene.mean())

    camera = np.cumsum(rng.normal(0, domain.shake, (RENDERED, 2)), axis=0)
    camera = np.clip(camera, 1 - MARGIN, MARGIN - 1)
    camera -= camera.mean(axis=0)
    centres = np.array(_CENTRES)[rng.permutation(4)[:3]] + rng.uniform(-3, 3, (3, 2))
    layers = []
    if rng.random() < domain.p_static:
        still = np.empty((RENDERED, 4))
        still[:] = (*centres[1], rng.uniform(-12, 12), rng.uniform(0.8, 1.05))
        layers.append((_digit_mask(spec.other), _colour(rng, domain, brightness), still))
    if rng.random() < domain.p_move:
        verb = int(rng.integers(len(VERBS)))
        track = _motion(verb, rng, domain.speed, (centres[2, 0], centres[2, 1]))
        layers.append((_blob_mask(rng), _colour(rng, domain, brightness), track))
    track = _motion(spec.verb, rng, domain.speed, (centres[0, 0], centres[0, 1]))
    layers.append((_digit_mask(spec.digit), _colour(rng, domain, brightness), track))

    gain = rng.uniform(*domain.gain)
    frames = np.empty((RENDERED, SIDE, SIDE, 3), np.uint8)
    for index, (dx, dy) in enumerate(camera):
        view = np.array([[1, 0, dx - MARGIN], [0, 1, dy - MARGIN]], np.float32)
        frame = cv2.warpAffine(scene, view, (SIDE, SIDE), flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REFLECT)
        for mask, colour, places in layers:
            _draw(frame, mask, colour, places[index] + (dx, dy, 0, 0))
        if domain.blur:
            frame = cv2.GaussianBlur(frame, (0, 0), domain.blur)
        noise = domain.noise * rng.standard_normal(frame.shape, dtype=np.float32)
        frames[index] = np.clip((frame * gain + noise) * 255, 0, 255)
    grey = [cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY) for frame in frames]
    flow = np.stack(
        [
            cv2.calcOpticalFlowFarneback(now, following, None, 0.5, 2, 9, 2, 5, 1.1, 0)
            for now, following in itertools.pairwise(grey)
        ]
    )
    flow = np.clip(flow / FLOW_UNIT, -FLOW_CLIP, FLOW_CLIP).astype(np.float16)
    return frames[:FRAMES], flow, _spectrogram(spec.verb, rng, domain)


def render_clips(specs: Sequence[ClipSpec]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Draw several clips, one after the other: the three arrays of :func:`render_clip` with a leading axis."""
    cv2 = needs("cv2")
    threads = cv2.getNumThreads()
    cv2.setNumThreads(1)  # pictures are small and clips are spread over processes
    try:
        clips = [render_clip(spec) for spec in specs]
    finally:
        cv2.setNumThreads(threads)
    rgb, flow, audio = zip(*clips, strict=True)
    return np.stack(rgb), np.stack(flow), np.stack(audio)
