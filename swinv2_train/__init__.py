"""swinv2_train: SimMIM pre-training and fine-tuning of Swin Transformer V2 at any size."""

__version__ = "0.2.0"
