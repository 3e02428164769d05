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

    Raises:
        ValueError: for another shape; from the loss, for labels that are not integers 0 to classes - 1, one for each x.
    """

    def __init__(self, shape: tuple[int, ...], classes: int = 10, *, features: int = 64) -> None:
        super().__init__()
        if len(shape) != 3 or shape[1] % 4 or shape[2] % 4:
            raise ValueError(f"shape must be (channels, height, width), sides divisible by 4, got {tuple(shape)}")
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
        if y.shape != (len(x),) or y.is_floating_point():
            raise ValueError(f"y must be integer labels of shape ({len(x)},), got {y.dtype} {tuple(y.shape)}")
        if ((y < 0) | (y >= self.head.out_features)).any():  # torch would leave out the rows of label -100
            raise ValueError(
                f"y must be labels 0 to {self.head.out_features - 1}, got {int(y.min())} to {int(y.max())}"
            )
        return ClassifierLoss(F.cross_entropy(self(x), y.long(), reduction="none"))
