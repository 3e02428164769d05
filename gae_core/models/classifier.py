"""A small image classifier, whose last hidden layer is the feature space of the metrics."""

from dataclasses import dataclass

from torch import Generator, Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True)
class ClassifierLoss:
    """Terms of the loss, each of shape (batch,): cross-entropy in nats."""

    total: Tensor


class Classifier(nn.Module):
    """Two convolutions, each halving the image, and one hidden layer of features.

    Args:
        shape: shape of one image, (channels, height, width), sides divisible by 4.
        classes: number of classes.
        features: width of the last hidden layer.
    """

    def __init__(self, shape: tuple[int, ...], classes: int = 10, *, features: int = 64) -> None:
        super().__init__()
        channels, height, width = shape
        self.features = nn.Sequential(
            nn.Conv2d(channels, 32, 5, stride=2, padding=2),
            nn.BatchNorm2d(32),
            nn.ReLU(),
            nn.Conv2d(32, 64, 5, stride=2, padding=2),
            nn.BatchNorm2d(64),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(64 * (height // 4) * (width // 4), features),
            nn.ReLU(),
        )
        self.head = nn.Linear(features, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (batch, classes) of images x in [0, 1], (batch, channels, height, width)."""
        return self.head(self.features(x))

    def loss(self, x: Tensor, y: Tensor, *, generator: Generator | None = None) -> ClassifierLoss:
        """Cross-entropy of labels y (batch,); ``generator`` is there for the common interface and not used."""
        return ClassifierLoss(F.cross_entropy(self(x), y, reduction="none"))
