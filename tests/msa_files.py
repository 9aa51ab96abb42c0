"""Small data sets in the layouts that people use, made by the tests."""

import pickle

import numpy as np


def mmsa(aligned=True, n=(6, 3, 4), seed=0, sims=False):
    """A small file in the layout of MMSA; the clips of a video are in descending order."""
    rng = np.random.default_rng(seed)
    lengths = (8, 8, 8) if aligned else (8, 12, 10)
    limit = 1.0 if sims else 3.0
    root = {}
    for part, (name, count) in enumerate(zip(("train", "valid", "test"), n, strict=True)):
        words = rng.integers(1, 9, count)
        bert = np.zeros((count, 3, 8), np.float32)
        bert[:, 1] = np.arange(8) < words[:, None]
        root[name] = {
            "raw_text": np.array([f"words {i}" for i in range(count)]),
            "text": rng.standard_normal((count, lengths[0], 7)).astype(np.float32),
            "audio": rng.standard_normal((count, lengths[1], 5)).astype(np.float32),
            "vision": rng.standard_normal((count, lengths[2], 6)).astype(np.float32),
            "text_bert": bert,
            "id": [f"vid{part}{i // 4}$_${count - i}" for i in range(count)],
            "regression_labels": rng.uniform(-limit, limit, count).astype(np.float32),
            "annotations": ["Positive"] * count,
        }
        if not aligned:
            root[name]["audio_lengths"] = rng.integers(1, 13, count).tolist()
            root[name]["vision_lengths"] = rng.integers(1, 11, count).tolist()
        if sims:
            root[name]["regression_labels_T"] = root[name]["regression_labels"]
    return root


def write(tmp_path, root, name="aligned_50.pkl", protocol=4):
    path = tmp_path / name
    path.write_bytes(pickle.dumps(root, protocol=protocol))
    return path
