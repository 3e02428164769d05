"""Conditional models of images: what a model shows when it is asked for a class. Records ``cvae...``."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from gae_core import data, metrics, nets, plots
from gae_core.densities import fit_gaussian_mixture
from gae_core.models.cvae import CVAE, Beside, LabelPriorVAE
from gae_core.seeds import fresh, seed_of, stream
from gae_core.studies import judge
from gae_core.studies.study import Outcome, Study, Trained, check_known

TOPIC = "cvae"
DATA = ("mnist", "digits")
VARIANTS = {  # where the label enters, beta, where codes come from
    "cvae": ("beside", 2.0, "prior", "conditional VAE: labels beside both networks, beta = 2"),
    "cvae_beta1": ("beside", 1.0, "prior", "conditional VAE: labels beside both networks, beta = 1"),
    "cvae_mixture": (
        *("beside", 1.0, "mixture"),
        "conditional VAE: the same, codes from a mixture of Gaussians fitted to each class",
    ),
    "cvae_prior_mean": (
        *("prior", 2.0, "prior"),
        "conditional VAE: labels move the mean of the prior alone, beta = 2",
    ),
}
SIZES = {  # epochs; images that are drawn and measured
    "short": (1, 500),
    "medium": (12, 10_000),
    "full": (100, 10_000),
}


@dataclass(frozen=True, kw_only=True)
class Recipe(Trained):
    """How a conditional model is made and trained, and what is drawn of it.

    Attributes:
        kind: "beside" if labels go into both networks, "prior" if they move the mean of the prior alone.
        beta: weight of the divergence.
        dim: of the code.
        hidden: widths of the encoder's hidden layers, which the decoder mirrors.
        classes: number of labels.
        codes: "prior" if images are drawn by codes from p(z | y), "mixture" if from a mixture fitted to each class.
        components: Gaussians of a mixture, at most.
        rows: codes for each Gaussian, at least, unless there is one.
        drawn: images that are drawn and measured, as many of each class.
        student: training of the classifiers that learn from the drawn images, and from as many real ones.
    """

    kind: str
    beta: float
    dim: int = 16
    hidden: tuple[int, ...] = (512, 256)
    classes: int = 10
    codes: str = "prior"
    components: int = 10
    rows: int = 200
    drawn: int
    student: Trained = field(default_factory=lambda: Trained(epochs=8))

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.kind not in ("beside", "prior"):
            raise ValueError(f'kind must be "beside" or "prior", got {self.kind!r}')
        if self.codes not in ("prior", "mixture"):
            raise ValueError(f'codes must be "prior" or "mixture", got {self.codes!r}')


def recipe(name: str, data_name: str, size: str) -> Recipe:
    """The recipe of a recorded run.

    Raises:
        ValueError: for an unknown name or size.
    """
    check_known(name=(name, VARIANTS), size=(size, SIZES))
    kind, beta, codes, _ = VARIANTS[name]
    epochs, drawn = SIZES[size]
    return Recipe(epochs=epochs, kind=kind, beta=beta, codes=codes, drawn=drawn)


def build(recipe: Recipe, shape: Sequence[int], seed: int) -> CVAE:
    """A model of images given labels; its fresh weights depend on ``seed`` alone."""
    dim, hidden, classes = recipe.dim, recipe.hidden, recipe.classes
    pixels = int(torch.Size(shape).numel())
    with fresh(seed):
        if recipe.kind == "prior":
            pair = nets.mlp_pair(shape, dim, hidden=hidden, heads=2, output=nn.Identity)
            return LabelPriorVAE(*pair, dim, classes=classes, beta=recipe.beta)
        encoder = Beside(nets.mlp([pixels + classes, *hidden, 2 * dim]))
        decoder = nn.Sequential(nets.mlp([dim + classes, *reversed(hidden), pixels]), nn.Unflatten(1, tuple(shape)))
        return CVAE(encoder, Beside(decoder), dim, classes=classes, beta=recipe.beta)


@torch.no_grad()
def codes_of_classes(
    model: CVAE, x: Tensor, y: Tensor, asked: Tensor, *, components: int, rows: int, seed: int
) -> Tensor:
    """Codes for the labels asked for, from a mixture of Gaussians that is fitted to the codes of each class.

    Args:
        model: in evaluation mode.
        x: training images, (n, ...).
        y: their labels, (n,).
        asked: labels, (m,).
        components: Gaussians of a class, at most.
        rows: codes of the class for each Gaussian, at least, unless there is one.
        seed: of the codes drawn from q(z | x, y), of the fits and of the draws.

    Returns:
        Codes (m, dim).
    """
    generator = stream(seed, "samples")
    batches = zip(x.split(1000), y.split(1000), strict=True)
    parts = [torch.cat([*model.posterior(data.to_unit(a), b)], 1) for a, b in batches]
    mu, logvar = torch.cat(parts).chunk(2, 1)
    z = mu + (0.5 * logvar).exp() * torch.randn(mu.shape, generator=generator)
    codes = torch.empty(len(asked), z.shape[1])
    for label in asked.unique():
        of_class = z[y == label]
        number = max(1, min(components, len(of_class) // rows))
        density = fit_gaussian_mixture(of_class, number, seed=seed_of(seed, "density", int(label)))
        codes[asked == label] = density.sample(int((asked == label).sum()), generator=generator)
    return codes


def draw(recipe: Recipe, model: CVAE, images: data.Images, *, seed: int) -> tuple[Tensor, Tensor]:
    """Means of p(x | z, y) for as many codes of each class, (n, ...), and the labels asked for, (n,)."""
    y = torch.arange(recipe.classes).repeat_interleave(recipe.drawn // recipe.classes)
    if recipe.codes == "prior":
        return model.sample(len(y), y, generator=stream(seed, "samples")), y
    z = codes_of_classes(
        model, images.x_train, images.y_train, y, components=recipe.components, rows=recipe.rows, seed=seed
    )
    return model.decode(z, y).detach(), y


def diversity(x: Tensor, y: Tensor) -> float:
    """Mean distance between two images of a class, over the classes; the first 500 images of each."""
    return float(torch.stack([torch.pdist(x[y == k].flatten(1)[:500]).mean() for k in y.unique()]).mean())


def accuracy(classifier: nn.Module, x: Tensor, y: Tensor) -> float:
    """Share of images (n, ...) that a classifier gives their label (n,)."""
    return float((metrics.in_batches(classifier, x).argmax(1) == y).double().mean())


def measure(
    recipe: Recipe,
    model: CVAE,
    x: Tensor,
    y: Tensor,
    images: data.Images,
    classifier: judge.Classifier,
    *,
    seed: int,
    device: torch.device,
) -> dict[str, float]:
    """The metrics of drawn images, beside those of reconstructions and of the data.

    Args:
        recipe: of the run.
        model: trained, in evaluation mode, on the CPU.
        x: images that it drew, (n, ...).
        y: labels that it was asked for, (n,).
        images: data; all is measured on the test images.
        classifier: of these images.
        seed: of the classifiers that are trained, and of the choice of real images.
        device: where they are trained.
    """
    test, labels = data.to_unit(images.x_test), images.y_test
    with torch.no_grad():
        batches = zip(test.split(1000), labels.split(1000), strict=True)
        reconstructions = torch.cat([model(a, b) for a, b in batches])

    def accuracy_trained_on(x: Tensor, y: Tensor, student_seed: int) -> float:
        """On the test images, of a classifier that has seen x alone."""
        with fresh(student_seed):
            student = judge.Classifier(images.shape, recipe.classes)
        recipe.student.fit(student, x, y, seed=student_seed, device=device)
        return accuracy(student.cpu(), test, labels)

    chosen = torch.randperm(len(images.x_train), generator=stream(seed, "data"))[: len(x)]
    spread, of_reconstructions = diversity(x, y), diversity(reconstructions, labels)
    of_samples, of_test = (metrics.in_batches(classifier.features, v) for v in (x, test))
    return {
        "share of the label asked for": accuracy(classifier, x, y),
        "the same of reconstructions": accuracy(classifier, reconstructions, labels),
        "accuracy trained on samples": accuracy_trained_on(x, y, seed_of(seed, "evaluation", 0)),
        "accuracy trained on as many real images": accuracy_trained_on(
            images.x_train[chosen], images.y_train[chosen], seed_of(seed, "evaluation", 1)
        ),
        "diversity over that of reconstructions": spread / of_reconstructions,
        "diversity": spread,
        "diversity of reconstructions": of_reconstructions,
        "diversity of data": diversity(test, labels),
        "Fréchet": metrics.frechet_distance(of_samples, of_test),
    }


def run(recipe: Recipe, data_name: str, seed: int, device: torch.device) -> Outcome:
    """Train a model, ask it for images of each class and measure them."""
    images = data.load(data_name)
    classifier = judge.classifier(images)  # if it cannot be had, one hears of it before the training
    model = build(recipe, images.shape, seed)
    training = recipe.fit(model, images.x_train, images.y_train, seed=seed, device=device)
    model = model.cpu()
    x, y = draw(recipe, model, images, seed=seed)
    first = torch.cat([x[y == k][:10] for k in range(recipe.classes)])
    return Outcome(
        measure(recipe, model, x, y, images, classifier, seed=seed, device=device),
        training,
        figure=plots.image_panels({"a class a row, means of p(x | z, y)": first}, columns=10, size=5),
        classifier=judge.about(images),
    )


STUDIES = {
    name: Study(about, TOPIC, DATA, functools.partial(recipe, name), run) for name, (_, _, _, about) in VARIANTS.items()
}
