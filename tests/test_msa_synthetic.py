"""The embedded corpus: the shapes it promises, and the signal it plants, found again by simple probes."""

import numpy as np
import pytest
from sklearn.cross_decomposition import CCA
from sklearn.decomposition import PCA
from sklearn.linear_model import Ridge
from threadpoolctl import threadpool_limits

from examples.msa.missing import missing_mask
from examples.msa.synthetic import PAIRS, SHAPES, synthetic

SEEDS = (0, 1)
# Width of the widest modality's latent view (text): what a probe must keep to see all that is planted.
LATENTS = 36


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    """On problems this small, several threads only wait for each other."""
    with threadpool_limits(1):
        yield


@pytest.fixture(scope="module", params=SEEDS)
def corpus(request):
    return synthetic("mosi", seed=request.param)


@pytest.fixture(scope="module")
def components(corpus):
    return whitened(corpus)


def whitened(corpus):
    """Whitened principal components of each modality, fitted on train rows."""
    train = corpus.rows("train")
    parts = {}
    for name, x in corpus.features.items():
        z = PCA(min(x.shape[1], LATENTS), random_state=0).fit(x[train]).transform(x)
        parts[name] = z / z[train].std(0)
    return parts


def mae(corpus, x, rows=None, strength=300.0):
    rows, test = corpus.rows("train") if rows is None else rows, corpus.rows("test")
    model = Ridge(strength).fit(x[rows], corpus.labels[rows])
    return np.abs(model.predict(x[test]) - corpus.labels[test]).mean()


def neighbours(corpus, x):
    """Mean of the features of up to two clips before and after, inside the video."""
    video = corpus.video_index
    total, count = np.zeros_like(x), np.zeros((len(x), 1))
    for step in (-2, -1, 1, 2):
        near = np.roll(video, step) == video
        # A roll past either end of a video meets another video.
        total += np.where(near[:, None], np.roll(x, step, 0), 0)
        count += near[:, None]
    return total / np.maximum(1, count)


@pytest.mark.parametrize("name", ["mosi", "sims"])
def test_sizes_are_those_of_the_set(name):
    c, shape = synthetic(name), SHAPES[name]
    assert tuple(np.bincount(c.split)) == shape.utterances and c.dims == shape.dims
    assert len(c.video_ptr) - 1 == sum(shape.videos)
    assert np.abs(c.labels).max() == pytest.approx(shape.limit)
    assert np.allclose(c.labels / shape.step, np.round(c.labels / shape.step), atol=1e-4)
    # All signs occur, and no video crosses a split.
    assert min((c.labels < 0).mean(), (c.labels > 0).mean()) > 0.3 and (c.labels == 0).any()
    assert all(len(set(c.split[a:b])) == 1 for a, b in zip(c.video_ptr[:-1], c.video_ptr[1:], strict=True))


def test_seeds_differ_and_repeat():
    assert synthetic(size=100, seed=1).sha256 == synthetic(size=100, seed=1).sha256
    assert synthetic(size=100, seed=1).sha256 != synthetic(size=100, seed=2).sha256


def test_sequences_carry_the_pooled_signal():
    pooled = synthetic(size=300, seed=3)
    sequences = synthetic(size=300, seed=3, pooled=False, length=30)
    assert (pooled.labels == sequences.labels).all() and sequences.aligned and len(sequences) == 300
    assert sequences.features["text"].shape == (300, 30, 768)
    mask = sequences.masks["audio"]
    assert (sequences.features["audio"][~mask] == 0).all() and mask[:, :2].all() and not mask.all()
    for name in pooled.modalities:
        a, b = pooled.features[name], sequences.pooled().features[name]
        assert np.corrcoef(a.ravel(), b.ravel())[0, 1] > 0.8


@pytest.mark.parametrize(("kwargs", "message"), [
    ({"name": "iemocap"}, "name must be one of"), ({"size": 10}, "size must be at least"),
    ({"dims": (8, 2, 8)}, "width of at least 4"), ({"pairs": "none"}, "pairs must be one of"),
    ({"pooled": False, "length": 1}, "length must be at least"),
])  # fmt: skip
def test_bad_requests_are_refused(kwargs, message):
    with pytest.raises(ValueError, match=message):
        synthetic(**kwargs)


def test_each_modality_informs_and_text_most(corpus, components):
    constant = np.abs(corpus.labels[corpus.rows("test")] - corpus.labels[corpus.rows("train")].mean()).mean()
    alone = {name: mae(corpus, z) for name, z in components.items()}
    assert all(error < 0.97 * constant for error in alone.values())
    assert alone["text"] < min(alone["audio"], alone["vision"])
    assert mae(corpus, np.hstack(list(components.values()))) < 0.97 * alone["text"]


def test_products_of_modalities_show_what_sums_do_not(corpus, components):
    text, audio, vision = components.values()
    additive = np.hstack([text, audio, vision])
    product = (text[:, :, None] * audio[:, None]).reshape(len(text), -1)
    within = (text[:, :, None] * text[:, None, :5]).reshape(len(text), -1)
    gained = mae(corpus, np.hstack([additive, product]), strength=300)
    assert gained < 0.97 * mae(corpus, additive)
    # The same number of products inside one modality gives no such gain.
    assert gained < 0.95 * mae(corpus, np.hstack([additive, within]), strength=300)


def test_neighbours_help_and_replace_a_missing_modality(corpus, components):
    x = np.hstack(list(components.values()))
    assert mae(corpus, np.hstack([x, neighbours(corpus, x)])) < 0.985 * mae(corpus, x)
    observed, _ = missing_mask(corpus, "exact", 0.5, 0)
    hidden = np.hstack([np.where(observed[:, [m]], z, 0) for m, z in enumerate(components.values())])
    loss = mae(corpus, hidden) - mae(corpus, x)
    assert mae(corpus, np.hstack([hidden, neighbours(corpus, hidden)])) < mae(corpus, hidden) - 0.2 * loss


@pytest.mark.parametrize("seed", SEEDS)
def test_neighbours_restore_pairs_that_persist(seed):
    """Ratio of two errors with products of text and audio: a missing modality taken from neighbours, over left out."""
    ratio = {}
    for pairs in PAIRS:
        corpus = synthetic("mosi", seed=seed, pairs=pairs)
        observed, _ = missing_mask(corpus, "exact", 0.5, 0)
        hidden = [np.where(observed[:, [m]], z, 0) for m, z in enumerate(whitened(corpus).values())]
        near = [neighbours(corpus, z) for z in hidden]
        filled = [np.where(observed[:, [m]], z, n) for m, (z, n) in enumerate(zip(hidden, near, strict=True))]
        error = [
            mae(corpus, np.hstack([*hidden, *near, (text[:, :, None] * audio[:, None]).reshape(len(text), -1)]))
            for text, audio, _ in (filled, hidden)
        ]
        ratio[pairs] = error[0] / error[1]
    assert ratio["persistent"] < 0.95 and ratio["independent"] > 0.97


def test_what_the_modalities_share_saves_labels(corpus, components):
    train = corpus.rows("train")
    text, others = components["text"], np.hstack([components["audio"], components["vision"]])
    # Canonical correlation is the linear form of a cross-modal contrast: no label is used.
    shared = CCA(6, max_iter=2000, tol=1e-4).fit(text[train], others[train]).transform(text, others)
    shared = shared[0] / shared[0][train].std(0) + shared[1] / shared[1][train].std(0)
    x = np.hstack([text, others])
    rng = np.random.default_rng(0)
    few = [rng.choice(train, 60, replace=False) for _ in range(10)]
    assert np.mean([mae(corpus, shared, r, 3) for r in few]) < 0.95 * np.mean([mae(corpus, x, r, 3) for r in few])


def test_covering_the_feature_space_beats_random_labels(corpus):
    """Greedy maximum determinant against random, 180 labels, averaged over starts."""
    train = corpus.rows("train")
    x = np.hstack([PCA(min(v.shape[1], LATENTS)).fit(v[train]).transform(v) for v in corpus.features.values()])
    random, chosen = [], []
    for seed in range(5):
        rng = np.random.default_rng(seed)
        random.append(mae(corpus, x, rng.choice(train, 180, replace=False), 3))
        picks = list(rng.choice(train, 30, replace=False))
        inverse = np.linalg.inv(x[picks].T @ x[picks] + 3 * np.eye(x.shape[1]))
        while len(picks) < 180:
            gain = ((x[train] @ inverse) * x[train]).sum(1)
            gain[np.isin(train, picks)] = -1
            picks.append(train[gain.argmax()])
            v = inverse @ x[picks[-1]]
            inverse -= np.outer(v, v) / (1 + x[picks[-1]] @ v)
        chosen.append(mae(corpus, x, np.array(picks), 3))
    assert np.mean(chosen) < 0.98 * np.mean(random)
