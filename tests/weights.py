"""Random weights for PyTorch's networks."""

from typing import Any


def randomise(module: Any, seed: int) -> Any:
    """Random weights of a size that keeps activations near 1, norms near 1 and 0."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in module.named_parameters():
            scale = 0.1 if weight.ndim == 1 else weight[0].numel() ** -0.5
            weight.copy_(torch.randn(weight.shape, generator=generator) * scale)
            if "norm" in name and name.endswith("weight"):
                weight += 1
    return module.eval()
