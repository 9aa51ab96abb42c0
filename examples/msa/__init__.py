"""What the two systems share: corpora, metrics, missing-modality masks, baselines, checkpoints and reports."""
