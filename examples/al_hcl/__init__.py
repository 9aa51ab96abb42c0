"""AL-HCL: active learning and hierarchical contrastive learning for multimodal sentiment, with fusion guidance."""
