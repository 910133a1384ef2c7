"""jaxft: fine-tunes Stable Diffusion models in JAX, on one CPU, one GPU or a TPU pod."""

__version__ = "0.1.0"
