"""Four models that are compared by their samples: what decoded codes of four sources look like."""

import dataclasses
import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gae_core import data, metrics, nets, plots
from gae_core.densities import fit_gaussian_mixture
from gae_core.models.autoencoder import Autoencoder
from gae_core.models.eae import EAE
from gae_core.models.vae import VAE
from gae_core.seeds import fresh, seed_of, stream
from gae_core.studies import judge
from gae_core.studies.study import Outcome, Study, Trained, check_known

TOPIC = "image models"
ABOUT = {
    "autoencoder": "squared error alone",
    "batch_norm": "autoencoder with batch norm of the code",
    "eae": "entropic autoencoder: batch norm and nearest-neighbour entropy",
    "vae": "variational autoencoder, Bernoulli likelihood",
}
SIZES = {  # widths of the perceptrons, none for convolutions; images that the training sees, in thousands
    "short": ((256, 128), 120),  # seconds on two cores, as in notebooks
    "medium": ((512, 256), 1200),  # minutes on two cores
    "full": ((), 6000),  # for a GPU
}


@dataclass(frozen=True, kw_only=True)
class Recipe(Trained):
    """How a model is made and trained.

    Attributes:
        kind: of model, one of ``ABOUT``.
        hidden: widths of the perceptrons' hidden layers, empty for convolutions.
        dim: of the code.
        lam: weight of the entropy, of those that have it.
        k: of its nearest neighbour.
        coded: training images, at most, to whose codes one Gaussian is fitted.
        fitted: of these, those to whose codes a mixture is.
        components: of the mixture.
        drawn: images of each source, at most as many as the test set has.
        compared: images for precision and recall.
        binarised: test images whose likelihood is estimated, of those that have one.
        samples: importance samples for each of them.
    """

    kind: str
    hidden: tuple[int, ...]
    dim: int = 8
    lam: float | None = None
    k: int | None = None
    coded: int = 20_000
    fitted: int = 5000
    components: int = 10
    drawn: int = 10_000
    compared: int = 2000
    binarised: int = 1000
    samples: int = 200


def recipe(kind: str, data_name: str, size: str) -> Recipe:
    """The recipe of a recorded run.

    Raises:
        ValueError: for an unknown kind of model, or size.
    """
    check_known(kind=(kind, ABOUT), size=(size, SIZES))
    hidden, thousands = SIZES[size]
    epochs = max(1, round(1000 * thousands / data.ROWS[data_name]))
    own = {"batch_norm": {"lam": 0.0, "k": 1}, "eae": {"lam": 1.0, "k": 1}}.get(kind, {})
    return Recipe(kind=kind, hidden=hidden, epochs=epochs, **own)


def build(recipe: Recipe, shape: Sequence[int], seed: int) -> nn.Module:
    """A model with fresh weights that depend on ``seed`` alone."""
    how = {"hidden": recipe.hidden} if recipe.hidden else {}
    pair = functools.partial(nets.mlp_pair if recipe.hidden else nets.conv_pair, shape, recipe.dim, **how)
    with fresh(seed):
        match recipe.kind:
            case "autoencoder":
                return Autoencoder(*pair(), recipe.dim)
            case "vae":
                return VAE(*pair(heads=2, output=nn.Identity), recipe.dim, likelihood="bernoulli")
            case "batch_norm" | "eae":
                return EAE(*pair(), recipe.dim, lam=recipe.lam, k=recipe.k)
    raise ValueError(f"kind must be one of {', '.join(ABOUT)}, got {recipe.kind!r}")


def sample_sources(model: nn.Module, images: data.Images, recipe: Recipe, *, n: int, seed: int) -> dict[str, Tensor]:
    """Images that the same decoder shows for four sources of codes.

    Args:
        model: trained, in evaluation mode.
        images: data; densities are fitted to codes of training images, reconstructions are of test images.
        recipe: has how many codes the densities are fitted to.
        n: images a source.
        seed: of the samples and the fit.

    Returns:
        Source of the codes -> images (n, ...): "N(0, I)", "one Gaussian" and "mixture of ten" fitted ex post,
        "reconstructions".
    """
    generator = stream(seed, "samples")
    z = metrics.in_batches(model.encode, images.x_train[: recipe.coded])
    densities = {
        "one Gaussian": fit_gaussian_mixture(z),
        "mixture of ten": fit_gaussian_mixture(z[: recipe.fitted], recipe.components, seed=seed_of(seed, "density")),
    }
    return {
        "N(0, I)": torch.cat(
            [model.sample(min(1000, n - i), generator=generator).to(z.device) for i in range(0, n, 1000)]
        ),
        **{
            name: metrics.in_batches(model.decode, density.sample(n, generator=generator))
            for name, density in densities.items()
        },
        "reconstructions": metrics.in_batches(model, images.x_test[:n]),
    }


def measure(model: nn.Module, images: data.Images, recipe: Recipe, *, seed: int) -> dict[str, float]:
    """The metrics of a trained model on held-out data: error, Fréchet distances, precision and recall, codes.

    Codes of a variational model are drawn from q(z | x), one for each image. Its likelihood is that of the first test
    images, binarised at random by their grey values.

    Args:
        model: trained, in evaluation mode.
        images: data.
        recipe: has how much is drawn.
        seed: of the samples.
    """
    generator = stream(seed, "evaluation")
    features = judge.classifier(images).to(next(model.parameters()).device).features
    real = metrics.in_batches(features, images.x_test)
    n = min(recipe.drawn, len(real))
    sources = {"real images": images.x_train[:n], **sample_sources(model, images, recipe, n=n, seed=seed)}
    fakes = {name: metrics.in_batches(features, x) for name, x in sources.items()}
    measured = {
        "squared error": float(metrics.squared_error(model, images.x_test).mean()),
        **{f"Fréchet, {name}": metrics.frechet_distance(fake, real) for name, fake in fakes.items()},
    }
    for name in ("real images", "N(0, I)"):
        shares = metrics.precision_recall(real[: recipe.compared], fakes[name][: recipe.compared])
        measured |= {f"precision, {name}": shares.precision, f"recall, {name}": shares.recall}
    codes = metrics.in_batches(model.encode, images.x_test)
    if isinstance(model, VAE):
        mu, logvar = metrics.in_batches(model.posterior, images.x_test)
        codes = mu + (0.5 * logvar).exp() * torch.randn(mu.shape, generator=generator)
        binary = torch.bernoulli(data.to_unit(images.x_test[: recipe.binarised]), generator=generator)
        nll = metrics.importance_weighted_nll(model, binary, samples=recipe.samples, generator=generator)
        split = metrics.encoder_information(mu, logvar, generator=generator)
        measured |= {
            "NLL of binarised images": float(nll.nll.mean()),
            "NLL, fall on doubling": float((nll.halved - nll.nll).mean()),
            "active units": float(metrics.active_units(mu)),
            "KL": split.kl,
            "mutual information": split.mutual_information,
            "cap of mutual information": split.cap,
            "KL of aggregate posterior": split.kl_aggregate,
        }
    gaussianity = dataclasses.asdict(metrics.gaussianity(codes))
    return measured | {name.replace("_", " "): value for name, value in gaussianity.items()}


def run(recipe: Recipe, data_name: str, seed: int, device: torch.device) -> Outcome:
    """Train and measure one model."""
    images = data.load(data_name)
    judge.classifier(images)  # if it cannot be had, one hears of it before the training
    model = build(recipe, images.shape, seed)
    training = recipe.fit(model, images.x_train, images.y_train, seed=seed, device=device)
    return Outcome(
        measure(model, images, recipe, seed=seed),
        training,
        figure=plots.image_panels(sample_sources(model, images, recipe, n=64, seed=seed), columns=8),
        classifier=judge.about(images),
    )


STUDIES = {
    name: Study(about, TOPIC, ("mnist", "fashion_mnist", "digits"), functools.partial(recipe, name), run, build)
    for name, about in ABOUT.items()
}
