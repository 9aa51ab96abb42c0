"""The embedded corpus: shapes of a published set, and a signal planted for each part of a system to find."""

from __future__ import annotations

import zlib
from dataclasses import dataclass

import numpy as np

from .corpus import TRAIN, Corpus


@dataclass(frozen=True)
class Shape:
    """Sizes of a published set: utterances and videos per split, widths of text, audio and vision, label grid."""

    utterances: tuple[int, int, int]
    videos: tuple[int, int, int]
    dims: tuple[int, int, int]
    limit: float
    step: float


SHAPES = {
    "mosi": Shape((1284, 229, 686), (52, 10, 31), (768, 5, 20), 3.0, 0.2),
    "mosei": Shape((16326, 1871, 4659), (2249, 300, 678), (768, 74, 35), 3.0, 1 / 3),
    "sims": Shape((1368, 456, 457), (36, 12, 12), (768, 33, 709), 1.0, 0.2),
}
PAIRS = ("independent", "persistent")
MODALITIES = ("text", "audio", "vision")
TOPICS = 12
COMMON_TOPICS = 2
COMMON_TRAIN, COMMON_TEST = 0.8, 0.3
CARRIER = 3.0
NUISANCE = 10
PERSISTENCE = 0.75
VIDEO_SHARE = 0.3
TURNING = 0.05
WHITE_NOISE = 0.05
TOKEN_NOISE = 0.15


def synthetic(
    name: str = "mosi",
    seed: int = 0,
    size: int | None = None,
    pooled: bool = True,
    length: int = 50,
    dims: tuple[int, int, int] | None = None,
    pairs: str = "independent",
) -> Corpus:
    """Generate utterances in videos, with text, audio and vision features and a sentiment label.

    Per utterance there are latent variables, each of unit variance:

    * ``s`` sentiment, ``e`` tone and ``d`` stance. Each is a video effect (30 % of the variance) plus a first-order
      autoregression over the clips (coefficient .75), so neighbours tell something about an utterance, also about its
      missing modalities.
    * ``g`` congruence of what is said with how it is said, and three carriers of sign ±1, one per pair of modalities:
      one member of the pair shows the carrier, the other the carrier times ``g``. With ``pairs="independent"`` all
      four are drawn anew for every utterance. With ``"persistent"`` ``g`` is made like ``s``, and a carrier is a habit
      that flips with probability .05 from clip to clip: neighbours also tell what a missing member of a pair would
      show, and a model that rebuilds that member has the pair again.
    * a topic. Two common topics are mild (``s`` counts .7); in each of ten rare ones ``s`` counts 1.3 and text shows it
      along a direction of its own. Common topics hold 80 % of the train part but only 30 % of the others: most labels
      of the pool are redundant, and a labelled set that covers the rare topics is worth more than a random one.
    * ten private nuisance variables per modality.

    Label (before rounding to the set's grid and clipping to its range), with ``s' = s · topic strength``::

        y ∝ .8 s' + .5 e + .5 d + .8 g + noise

    The noise has deviation .25, but 1.0 in the last rare topic, which stays uncertain whatever is labelled.

    * ``s'`` is shown by all modalities, by text best (noise .5 against .8); ``e`` by audio and vision (noise .4). This
      is what the modalities share, among carriers and nuisance: contrasting the modalities with each other (first
      tier) finds it without labels.
    * ``d`` is shown by text alone (noise .3): no other modality tells that this part of text matters, and a fused
      embedding contrasted with each modality (second tier) keeps it.
    * No function of one modality tells ``g``, nor does a sum of such functions: a carrier has mean zero. The product of
      the two members of a pair does, up to noise of deviation .25, so a model that fuses the modalities must multiply
      (matrix fusion) or learn to. ``g`` is the same in all three pairs: contrasting the pairs (third tier) finds it
      without labels.

    Features are a fixed random orthonormal mixing of the latent views plus white noise (.05 pooled, .15 per
    token). In sequence form all modalities share the tokens' intensities (gamma distributed, mean 1), so token products
    carry the same information as the utterance's.

    Args:
        name: Whose sizes to take: ``"mosi"``, ``"mosei"`` or ``"sims"``.
        seed: Seed of everything.
        size: Total utterances, split and spread over videos in the set's proportions; as many as the set has when
            omitted.
        pooled: One vector per utterance and modality; else aligned sequences of up to ``length`` tokens.
        length: Longest sequence, with ``pooled=False``.
        dims: Feature widths of text, audio and vision; the set's when omitted.
        pairs: Whether neighbours tell what only two modalities together tell (``"persistent"``) or not
            (``"independent"``).

    Raises:
        ValueError: The name or the kind of pairs is unknown, or a size or width is too small.

    Note:
        The latent variables and labels depend on ``name``, ``seed``, ``size`` and ``pairs`` alone: pooled and
        sequence form agree in them.
    """
    if name not in SHAPES:
        raise ValueError(f"synthetic: name must be one of {sorted(SHAPES)}, got {name!r}")
    if pairs not in PAIRS:
        raise ValueError(f"synthetic: pairs must be one of {list(PAIRS)}, got {pairs!r}")
    shape = SHAPES[name]
    widths = dims or shape.dims
    if min(widths) < 4:
        raise ValueError(f"synthetic: each modality needs a width of at least 4, got {widths}")
    if size is not None and size < 30:
        raise ValueError(f"synthetic: size must be at least 30 utterances, got {size}")
    if length < 2:
        raise ValueError(f"synthetic: length must be at least 2 tokens, got {length}")
    root = np.random.SeedSequence([seed, zlib.crc32(name.encode())])
    streams = [np.random.default_rng(s) for s in root.spawn(5)]
    split, video_ptr = _videos(streams[0], shape, size)
    views, label = _latents(streams[1], video_ptr, split, pairs)
    step, limit = shape.step, shape.limit
    labels = np.clip(np.round(label * 0.5 * limit / step) * step, -limit, limit).astype(np.float32)
    mask = _token_mask(streams[2], len(split), length)
    features = {}
    for modality, width, stream in zip(MODALITIES, widths, streams[2].spawn(3), strict=True):
        mixed = views[modality][:, :width] @ _mixing(streams[3], min(width, views[modality].shape[1]), width)
        features[modality] = mixed.astype(np.float32), stream
    video = np.repeat(np.arange(len(video_ptr) - 1), np.diff(video_ptr))
    clip = np.arange(len(split)) - video_ptr[video]
    if pooled:
        arrays = {m: x + WHITE_NOISE * g.standard_normal(x.shape, dtype=np.float32) for m, (x, g) in features.items()}
    else:
        gate = streams[4].gamma(0.5, 2.0, mask.shape).astype(np.float32) * mask
        gate /= np.maximum(gate.sum(1, keepdims=True) / mask.sum(1, keepdims=True), np.float32(1e-6))
        arrays = {m: _tokens(x, gate, mask, g) for m, (x, g) in features.items()}
    return Corpus(
        name=f"synthetic {name.upper()}",
        family=name,
        features=arrays,
        labels=labels,
        split=split,
        video_ptr=video_ptr,
        utterance_ids=np.array([f"v{v:04d}_{c:03d}" for v, c in zip(video.tolist(), clip.tolist(), strict=True)]),
        masks={} if pooled else {m: mask for m in MODALITIES},
        aligned=not pooled,
        notes=(f"generated with seed {seed}, {pairs} pairs; planted signal: see examples/msa/synthetic.py",),
    )


def _videos(rng: np.random.Generator, shape: Shape, size: int | None) -> tuple[np.ndarray, np.ndarray]:
    scale = 1.0 if size is None else size / sum(shape.utterances)
    counts = [max(4, round(n * scale)) for n in shape.utterances]
    if size is not None:
        counts[0] = size - counts[1] - counts[2]
    lengths, split = [], []
    for part, (n, v) in enumerate(zip(counts, shape.videos, strict=True)):
        videos = min(max(1, round(v * scale)), n)
        own = 1 + rng.multinomial(n - videos, rng.dirichlet(np.full(videos, 5.0)))
        lengths.append(own)
        split.append(np.full(n, part, dtype=np.int8))
    return np.concatenate(split), np.concatenate([[0], np.cumsum(np.concatenate(lengths))]).astype(np.int64)


def _persistent(rng: np.random.Generator, video_ptr: np.ndarray) -> np.ndarray:
    """Video effect plus autoregression over clips, unit variance."""
    sizes = np.diff(video_ptr)
    n = int(video_ptr[-1])
    first = np.zeros(n, dtype=bool)
    first[video_ptr[:-1]] = True
    shock = rng.standard_normal(n)
    fresh = np.sqrt(1 - PERSISTENCE**2)
    walk = np.empty(n)
    previous = 0.0
    for i, (start, value) in enumerate(zip(first.tolist(), shock.tolist(), strict=True)):
        previous = value if start else PERSISTENCE * previous + fresh * value
        walk[i] = previous
    effect = np.repeat(rng.standard_normal(len(sizes)), sizes)
    return np.sqrt(VIDEO_SHARE) * effect + np.sqrt(1 - VIDEO_SHARE) * walk


def _habits(rng: np.random.Generator, video_ptr: np.ndarray) -> np.ndarray:
    """Signs ``[3, N]``: drawn at the start of a video, then flipping now and then."""
    turns = np.full(int(video_ptr[-1]), TURNING)
    turns[video_ptr[:-1]] = 0.5
    return np.where(rng.random((3, len(turns))) < turns, -1.0, 1.0).cumprod(axis=1)


def _latents(
    rng: np.random.Generator, video_ptr: np.ndarray, split: np.ndarray, pairs: str
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """What each modality shows, most informative columns first, and the label before scaling."""
    n = int(video_ptr[-1])
    s, e, d = (_persistent(rng, video_ptr) for _ in range(3))
    if pairs == "persistent":
        g, carriers = _persistent(rng, video_ptr), _habits(rng, video_ptr)
    else:
        g, carriers = rng.standard_normal(n), rng.choice([-1.0, 1.0], (3, n))
    common = rng.random(n) < np.where(split == TRAIN, COMMON_TRAIN, COMMON_TEST)
    topic = np.where(common, rng.integers(0, COMMON_TOPICS, n), rng.integers(COMMON_TOPICS, TOPICS, n))
    rare = topic >= COMMON_TOPICS
    strength = np.where(rare, 1.3, 0.7)
    s = s * strength
    sigma = np.where(topic == TOPICS - 1, 1.0, 0.25)
    label = 0.8 * s + 0.5 * e + 0.5 * d + 0.8 * g + sigma * rng.standard_normal(n)

    def noisy(x: np.ndarray, sd: float) -> np.ndarray:
        return x + sd * rng.standard_normal(n)

    # Column 0 of the text code serves the common topics; a rare topic has its own column for s and one for its place.
    seen = noisy(s, 0.5)
    code = np.zeros((n, 1 + TOPICS - COMMON_TOPICS))
    code[np.arange(n), np.where(rare, topic - COMMON_TOPICS + 1, 0)] = seen
    place = 1.5 * np.eye(TOPICS)[topic]
    with_audio, with_vision, beside_text = CARRIER * carriers

    views = {
        "text": (code, noisy(d, 0.3), with_audio, with_vision, place),
        "audio": (noisy(s, 0.8), noisy(e, 0.4), with_audio * noisy(g, 0.25), beside_text),
        "vision": (noisy(s, 0.8), noisy(e, 0.4), with_vision * noisy(g, 0.25), beside_text * noisy(g, 0.25)),
    }
    views = {m: np.column_stack([*own, 0.9 * rng.standard_normal((n, NUISANCE))]) for m, own in views.items()}
    return views, label


def _mixing(rng: np.random.Generator, rank: int, width: int) -> np.ndarray:
    """Orthonormal rows, ``[rank, width]``."""
    q, r = np.linalg.qr(rng.standard_normal((width, rank)))
    return (q * np.sign(np.diag(r))).T


def _token_mask(rng: np.random.Generator, n: int, length: int) -> np.ndarray:
    lengths = np.clip(np.round(rng.gamma(3.0, 4.0, n)), 2, length).astype(int)
    return np.arange(length) < lengths[:, None]


def _tokens(x: np.ndarray, gate: np.ndarray, mask: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    tokens = rng.standard_normal((*mask.shape, x.shape[1]), dtype=np.float32)
    tokens *= np.float32(TOKEN_NOISE)
    tokens += gate[..., None] * x[:, None]
    tokens *= mask[..., None]
    return tokens
