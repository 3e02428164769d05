"""GAE: codes without an encoder, and the known methods that it contains."""

import numpy as np
import pytest
import torch
from sklearn.cluster import KMeans
from sklearn.datasets import load_digits
from sklearn.decomposition import NMF, PCA, FactorAnalysis
from sklearn.model_selection import train_test_split

from gae_core.models.gae import GAE
from gae_core.models.local_linear import factor_log_likelihood, fit_local_linear, nmf_step

TOL = {"rtol": 0, "atol": 1e-8}


@pytest.fixture(scope="module")
def digits():
    """Training and test images, (n, 64), in [0, 1]."""
    parts = train_test_split(load_digits().data / 16, test_size=0.25, random_state=0)
    return [torch.from_numpy(part) for part in parts]


def linear(W, mu):
    """The decoder mu + W z."""
    decoder = torch.nn.Linear(*W.shape[::-1], dtype=W.dtype)
    with torch.no_grad():
        decoder.weight.copy_(W)
        decoder.bias.copy_(mu)
    return decoder


def test_hard_assignment_is_lloyds_algorithm(digits):
    x = digits[0]
    start = x[torch.randperm(len(x), generator=torch.Generator().manual_seed(0))[:10]]
    fit = fit_local_linear(x, 10, 0, start=start)
    lloyd = KMeans(10, init=start.numpy(), n_init=1, max_iter=1000, tol=0, algorithm="lloyd").fit(x.numpy())
    torch.testing.assert_close(fit.model.mu, torch.from_numpy(lloyd.cluster_centers_), **TOL)
    assert float(fit.model.squared_distances(x).amin(1).sum()) == pytest.approx(lloyd.inertia_, abs=1e-8)


@pytest.mark.parametrize("q", [2, 10])
def test_one_component_is_pca_and_one_step_from_anywhere_its_code(digits, q):
    x, unseen = digits
    model = fit_local_linear(x, 1, q).model
    pca = PCA(q, svd_solver="full").fit(x.numpy())
    torch.testing.assert_close(model(unseen), torch.from_numpy(pca.inverse_transform(pca.transform(unseen))), **TOL)
    W = torch.from_numpy(pca.components_.T)
    gae = GAE(linear(W, torch.from_numpy(pca.mean_)), q, steps=1, step_size=1.0, prior="flat", n_starts=3)
    code = torch.from_numpy(pca.transform(unseen.numpy()))
    for z in gae.infer(unseen):  # starts: the origin, and two at random
        torch.testing.assert_close(z.detach(), code, **TOL)


def test_coordinate_descent_is_that_of_nmf(digits):
    x = digits[0]
    generator = torch.Generator().manual_seed(0)
    z, W = (torch.rand(shape, generator=generator, dtype=x.dtype) for shape in ((len(x), 10), (10, 64)))
    known = NMF(10, init="custom", solver="cd", max_iter=50, tol=0)
    theirs = known.fit_transform(x.numpy(), W=z.numpy().copy(), H=W.numpy().copy())
    for _ in range(50):
        z = nmf_step(x, z, W)
        W = nmf_step(x.mT, W.mT, z.mT).mT
    torch.testing.assert_close(z, torch.from_numpy(theirs), **TOL)
    torch.testing.assert_close(W, torch.from_numpy(known.components_), **TOL)


def test_the_likelihoods_of_factor_analysis_and_ppca_are_scikit_learns(digits):
    x = digits[0][:, digits[0].std(0) > 0.01].numpy()
    factors = FactorAnalysis(3).fit(x)
    arguments = (torch.from_numpy(np.asarray(v)) for v in (x, factors.mean_, factors.components_.T))
    ours = factor_log_likelihood(*arguments, torch.from_numpy(factors.noise_variance_))
    np.testing.assert_allclose(ours, factors.score_samples(x), **TOL)
    pca = PCA(5).fit(x)
    W = pca.components_.T * np.sqrt(pca.explained_variance_ - pca.noise_variance_)
    psi = np.full(x.shape[1], pca.noise_variance_)
    ours = factor_log_likelihood(*(torch.from_numpy(v) for v in (x, pca.mean_, W, psi)))
    np.testing.assert_allclose(ours, pca.score_samples(x), rtol=0, atol=1e-8)


def test_laplace_is_exact_for_a_linear_decoder():
    generator = torch.Generator().manual_seed(0)
    W, mu, x = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((6, 3), (6,), (5, 6)))
    gae = GAE(linear(W, mu), 3, steps=500, step_size=0.05, sigma=0.7)
    exact = factor_log_likelihood(x, mu, W, torch.full((6,), 0.49, dtype=torch.float64))
    torch.testing.assert_close(gae.laplace_nll(x).detach(), -exact, **TOL)
