"""The map of the family: where each model of the book stands, as its chapter's table has it."""

from dataclasses import dataclass

FOUND = ("closed form", "finite search", "iteration", "encoder", "not at all")  # how the code is inferred
KNOWN = ("no decoder", "nothing", "matched", "in the model")  # what is assumed of its distribution
GOALS = ("fit at one code", "likelihood", "a bound of it", "neighbours", "a critic")  # what is maximised


@dataclass(frozen=True)
class Place:
    """Where a model stands: its row in the chapter's table, and its place and colour in the picture drawn from it.

    Attributes:
        model: its name.
        chapter: page of the book that has it.
        latent: what the code is.
        inference: how it is found for a datum.
        assumed: what is assumed of its distribution.
        maximised: what the training maximises.
        sampled: what can be sampled.
        found: one of ``FOUND``.
        known: one of ``KNOWN``.
        goal: one of ``GOALS``.
    """

    model: str
    chapter: str
    latent: str
    inference: str
    assumed: str
    maximised: str
    sampled: str
    found: str
    known: str
    goal: str


ERROR, FIT = "minus the squared error", "images, after a fit to the codes"
MAP = tuple(
    Place(*row.split(" | "), *(axis[i] for axis, i in zip((FOUND, KNOWN, GOALS), places, strict=True)))
    for row, places in (
        (f"PCA | gae | a point of a plane | a projection | nothing | {ERROR} | {FIT}", (0, 1, 0)),
        (
            "PPCA, factor analysis | gae | a point of a plane | Gaussian posterior, closed form | $N(0, I)$ "
            "| the likelihood | images",
            (0, 3, 1),
        ),
        (
            f"k-means | gae | one of $K$ centres | comparison of all $K$ | nothing | {ERROR} "
            "| the centres, by their shares",
            (1, 1, 0),
        ),
        (
            "mixture of Gaussians | gae | one of $K$ components | Bayes' rule over all $K$ | its $K$ probabilities, "
            "learned | the likelihood | images",
            (1, 3, 1),
        ),
        (
            "local PCA | gae | a component and a point in its plane | comparison of all $K$, a projection in each "
            f"| nothing | {ERROR} | {FIT}",
            (1, 1, 0),
        ),
        (
            f"NMF | gae | numbers that are not negative | steps, for each datum | $z \\ge 0$ | {ERROR} | {FIT}",
            (2, 1, 0),
        ),
        (
            "LLE | family | a point of a map | eigenvectors, for all data together | mean 0, covariance $I$ over the "
            "data | minus the error of the neighbours' weights | nothing",
            (0, 0, 3),
        ),
        (
            "t-SNE | family | a point of a map | gradient steps, for all data together | nothing | minus a divergence "
            "of neighbourhoods | nothing",
            (2, 0, 3),
        ),
        (
            "GAE | gae | a vector | gradient steps, for each datum | $N(0, I)$, or nothing | "
            "$\\log q(z)\\,q(x \\mid z)$ at the code | images, if $N(0, I)$ was assumed",
            (2, 3, 0),
        ),
        (
            "deep image prior | image_prior | the weights of the network | gradient steps that stop early | the random "
            f"start | {ERROR}, for one image | nothing",
            (2, 1, 0),
        ),
        (f"autoencoder | autoencoder | a vector | encoder | nothing | {ERROR} | {FIT}", (3, 1, 0)),
        (
            "denoising autoencoder | denoising | a vector | encoder, of a corrupted image | nothing | the likelihood "
            "of the clean image given the corrupted one | images, by a chain",
            (3, 1, 1),
        ),
        (
            f"EAE | eae | a vector | encoder | pushed to $N(0, I)$ by its entropy | {ERROR}, plus the entropy of the "
            "codes | images",
            (3, 2, 0),
        ),
        (
            "VAE, IWAE, BN-VAE | vae | a vector | random encoder | $N(0, I)$ | a lower bound of the likelihood "
            "| images",
            (3, 3, 2),
        ),
        (
            "CVAE | cvae | a vector | random encoder that sees the label | $N(0, I)$ given the label | a lower bound "
            "of the likelihood given the label | images of a label",
            (3, 3, 2),
        ),
        ("GAN | energy | a vector | not at all | $N(0, I)$ | what a critic says of the samples | images", (4, 3, 4)),
        (
            "MEG | meg | a vector | not at all | $N(0, I)$ | minus a learned energy of the samples, plus a bound of "
            "their entropy | images",
            (4, 3, 4),
        ),
    )
)


def map_table() -> str:
    """The map of the family as a table in MyST, as it stands in the chapter."""
    lines = ["| model | the code is | it is found by | assumed of its distribution | maximised | can be sampled |"]
    lines.append("|---" * 6 + "|")
    for place in MAP:
        name = place.model if place.chapter == "family" else f"{{doc}}`{place.model} <{place.chapter}>`"
        cells = (name, place.latent, place.inference, place.assumed, place.maximised, place.sampled)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)
