"""tale_jax: train, understand and use tiny language models end to end, on the computer you already own."""

__version__ = "0.2.0"
