"""saerl-fast: sparse-autoencoder signals for RL post-training."""

__version__ = "0.1.0"
