"""SSLMM: semi-supervised learning with missing modalities, re-implemented from the abstract and related work."""
