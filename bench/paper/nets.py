"""The nets, one output each: logistic regression, the paper's small ReLU net (8 hidden units), and a small CNN.

"mlp" and "cnn" have ReLU as in the paper's code; "mlp-gelu" is the same net without kinks.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

NETS = ("logreg", "mlp", "mlp-gelu", "cnn")


def build(name: str, shape: Sequence[int], seed: int) -> nn.Module:
    """A new net for inputs of `shape`: [features] or [channels, height, width]."""
    torch.manual_seed(seed)
    num_inputs = torch.Size(shape).numel()
    if name == "logreg":
        return nn.Sequential(nn.Flatten(), nn.Linear(num_inputs, 1))
    if name in ("mlp", "mlp-gelu"):
        activation = nn.ReLU() if name == "mlp" else nn.GELU()
        return nn.Sequential(nn.Flatten(), nn.Linear(num_inputs, 8), activation, nn.Linear(8, 1))
    if name == "cnn":
        channels, height, width = shape
        return nn.Sequential(
            nn.Conv2d(channels, 8, 3, stride=2, padding=1), nn.ReLU(),
            nn.Conv2d(8, 16, 3, stride=2, padding=1), nn.ReLU(),
            nn.Flatten(), nn.Linear(16 * -(-height // 4) * -(-width // 4), 1),
        )  # fmt: skip
    raise ValueError(f"net {name!r} is not one of {', '.join(NETS)}")


def bce(output: Tensor, target: Tensor) -> Tensor:
    """Binary cross entropy of each sample [B]."""
    return nn.functional.binary_cross_entropy_with_logits(output.squeeze(1), target, reduction="none")


def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """The share of samples on the right side of 0, a scalar."""
    with torch.no_grad():
        return ((model(x).squeeze(1) > 0) == (y > 0.5)).double().mean()
