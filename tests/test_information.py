"""Bounds of mutual information against closed forms, other code and hostile input.

The chapter's equations are in test_mutual_information.py.
"""

import math

import pytest
import torch
from helpers import assert_z
from torch.distributions import MultivariateNormal, kl_divergence

from gae_core.information import (
    dv_terms,
    gaussian_information,
    info_nce_terms,
    jsd_terms,
    nwj_terms,
    permute_rows,
    reconstruction_terms,
)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=seeded(seed), dtype=torch.float64)


def covariance(*batch, d, seed=0):
    a = randn(*batch, d, d + 2, seed=seed)
    return a @ a.mT


# --- Gaussian information ---


@pytest.mark.parametrize("dim_x", [1, 2, 4])
def test_gaussian_information_is_the_divergence_from_the_product(dim_x):
    cov = covariance(3, d=5)
    apart = cov.clone()
    apart[:, :dim_x, dim_x:] = 0
    apart[:, dim_x:, :dim_x] = 0
    mean = torch.zeros(3, 5, dtype=torch.float64)
    expected = kl_divergence(MultivariateNormal(mean, cov), MultivariateNormal(mean, apart))
    torch.testing.assert_close(gaussian_information(cov, dim_x), expected, rtol=1e-9, atol=1e-12)


def test_gaussian_information_does_not_see_invertible_maps_of_either_part():
    cov, x_map, z_map = covariance(d=5), randn(2, 2, seed=1), randn(3, 3, seed=2)
    both = torch.block_diag(x_map, z_map)
    moved = both @ cov @ both.T
    torch.testing.assert_close(gaussian_information((moved + moved.T) / 2, 2), gaussian_information(cov, 2))


@pytest.mark.parametrize(
    ("cov", "dim_x", "message"),
    [
        (torch.eye(3, dtype=torch.int64), 1, "float32 or float64 of shape"),
        (torch.eye(3, dtype=torch.float16), 1, "float32 or float64 of shape"),
        (torch.ones(3), 1, "float32 or float64 of shape"),
        (torch.ones(2, 3), 1, "float32 or float64 of shape"),
        (torch.eye(3), 0, "dim_x must be a whole number between 1 and d - 1 = 2, got 0"),
        (torch.eye(3), 3, "dim_x must be a whole number between"),
        (torch.eye(3), 1.5, "dim_x must be a whole number between"),
        (torch.tensor([[1.0, 0.5], [0.1, 1.0]]), 1, "symmetric"),
        (torch.full((2, 2), math.nan), 1, "cov must be finite"),
        (torch.tensor([[1.0, 2.0], [2.0, 4.0]]), 1, "positive definite"),
    ],
)
def test_gaussian_information_refuses(cov, dim_x, message):
    with pytest.raises(ValueError, match=message):
        gaussian_information(cov, dim_x)


# --- reconstruction ---


@pytest.mark.parametrize("sigma", [0.3, torch.tensor([0.2, 1.0, 3.0], dtype=torch.float64)])
def test_reconstruction_terms_are_the_gaussian_likelihood_plus_the_entropy(sigma):
    z, z_hat = randn(7, 3), randn(7, 3, seed=1)
    scale = torch.as_tensor(sigma, dtype=torch.float64).expand(3)
    q = MultivariateNormal(z_hat, torch.diag(scale.square()))
    prior = MultivariateNormal(torch.zeros(3, dtype=torch.float64), torch.eye(3, dtype=torch.float64))
    torch.testing.assert_close(reconstruction_terms(z, z_hat, sigma), q.log_prob(z) + prior.entropy())
    torch.testing.assert_close(reconstruction_terms(z, z_hat, sigma, entropy=-2.0), q.log_prob(z) - 2.0)


def test_without_sigma_the_mean_is_minus_the_sum_of_log_rmse_and_nothing_is_higher():
    z = randn(200, 3)
    z_hat = z + randn(200, 3, seed=1) * torch.tensor([0.1, 0.5, 2.0], dtype=torch.float64)
    rmse = (z - z_hat).square().mean(0).sqrt()
    best = reconstruction_terms(z, z_hat).mean()
    torch.testing.assert_close(best, -rmse.log().sum())
    for factor in (0.9, 1.1):
        assert reconstruction_terms(z, z_hat, factor * rmse).mean() < best
    one = (z - z_hat).square().mean().sqrt()
    torch.testing.assert_close(reconstruction_terms(z, z_hat, one).mean(), -3 * one.log())
    assert reconstruction_terms(z, z_hat, one).mean() < best


def test_the_gradient_weighs_the_squared_error_by_half_the_precision():
    z, z_hat = randn(4, 2), randn(4, 2, seed=1).requires_grad_()
    reconstruction_terms(z, z_hat, 0.25).sum().backward()
    torch.testing.assert_close(z_hat.grad, (z - z_hat.detach()) / 0.25**2)


@pytest.mark.parametrize(
    ("z", "z_hat", "sigma", "message"),
    [
        (torch.ones(3), torch.ones(3), 1.0, "one shape"),
        (torch.ones(3, 2), torch.ones(3, 1), 1.0, "one shape"),
        (torch.ones(0, 2), torch.ones(0, 2), 1.0, "one shape"),
        (torch.ones(3, 2), torch.ones(3, 2), None, "must not equal z"),
        (torch.ones(3, 2), torch.ones(3, 2), 0.0, "sigma must be positive and finite"),
        (torch.ones(3, 2), torch.ones(3, 2), math.nan, "sigma must be positive and finite"),
        (torch.ones(3, 2), torch.ones(3, 2), torch.ones(3), r"a number or of shape \(2,\)"),
        (torch.ones(3, 2).long(), torch.ones(3, 2).long(), 1.0, "z must be floating point and finite, got torch.int64"),
        (torch.full((3, 2), math.nan), torch.ones(3, 2), 1.0, "z must be floating point and finite"),
        (torch.ones(3, 2), torch.full((3, 2), math.nan), None, "z_hat must be floating point and finite"),
    ],
)
def test_reconstruction_refuses(z, z_hat, sigma, message):
    with pytest.raises(ValueError, match=message):
        reconstruction_terms(z, z_hat, sigma)


@pytest.mark.parametrize("entropy", [math.nan, -math.inf])
def test_reconstruction_refuses_an_entropy_that_is_not_finite(entropy):
    with pytest.raises(ValueError, match="entropy must be finite"):
        reconstruction_terms(torch.ones(3, 2), torch.zeros(3, 2), 1.0, entropy=entropy)


# --- critics ---


def test_terms_against_their_formulas_written_out():
    joint, marginal = randn(5), randn(5, 3, seed=1)
    torch.testing.assert_close(
        jsd_terms(joint, marginal), joint.sigmoid().log() + (1 - marginal.sigmoid()).log().mean(1)
    )
    torch.testing.assert_close(dv_terms(joint, marginal), joint - marginal.exp().mean().log())
    torch.testing.assert_close(nwj_terms(joint, marginal), joint - marginal.exp().mean(1) / math.e)
    scores = randn(4, 4, seed=2)
    torch.testing.assert_close(
        info_nce_terms(scores), (scores.diagonal().exp() / scores.exp().mean(1)).log(), rtol=1e-12, atol=1e-12
    )
    torch.testing.assert_close(jsd_terms(joint, marginal[:, 0]), jsd_terms(joint, marginal[:, :1]))


def test_jsd_is_minus_twice_the_cross_entropy_of_telling_the_pairs_apart():
    joint, marginal = randn(6), randn(6, seed=1)
    labels = torch.cat([torch.ones(6), torch.zeros(6)]).double()
    loss = torch.nn.functional.binary_cross_entropy_with_logits(torch.cat([joint, marginal]), labels)
    torch.testing.assert_close(jsd_terms(joint, marginal).mean(), -2 * loss)


@pytest.mark.parametrize("scale", [1.0, 1e30])
def test_jsd_and_nce_keep_their_range_at_any_score(scale):
    joint, marginal = scale * randn(50).float(), scale * randn(50, seed=1).float()
    assert (jsd_terms(joint, marginal) <= 0).all()
    assert (jsd_terms(joint.abs(), -marginal.abs()) > -math.log(4) - 1e-6).all()
    scores = scale * randn(50, 50, seed=2).float()
    assert (info_nce_terms(scores) <= math.log(50) + 1e-5).all()


def test_the_jensen_shannon_objective_of_a_bad_critic_has_no_lower_limit():
    """Only the best value lies above -log 4: pairs taken for others, and others for pairs, cost what they are worth."""
    joint = torch.full((5,), -1e6, dtype=torch.float64)
    assert jsd_terms(joint, -joint).tolist() == pytest.approx([-2e6] * 5)


def test_a_critic_without_opinion_says_log_4_below_zero_or_zero():
    zero = torch.zeros(8, dtype=torch.float64)
    assert jsd_terms(zero, zero).mean() == pytest.approx(-math.log(4))
    assert dv_terms(zero, zero).mean() == pytest.approx(0)
    assert nwj_terms(zero + 1, zero + 1).mean() == pytest.approx(0)
    assert info_nce_terms(torch.zeros(8, 8)).mean() == pytest.approx(0, abs=1e-6)


def test_a_constant_added_to_the_scores_changes_nwj_alone_among_the_bounds_and_only_downwards():
    joint, marginal = randn(40) + 1, randn(40, 40, seed=1)
    torch.testing.assert_close(dv_terms(joint + 5, marginal + 5), dv_terms(joint, marginal))
    best = marginal.exp().mean().log()  # after this shift NWJ equals DV
    shifted = [nwj_terms(joint - best + 1 + c, marginal - best + 1 + c).mean() for c in (-0.3, 0.0, 0.3)]
    torch.testing.assert_close(shifted[1], dv_terms(joint, marginal).mean())
    assert shifted[0] < shifted[1] > shifted[2]


@pytest.mark.parametrize("terms", [jsd_terms, dv_terms, nwj_terms])
@pytest.mark.parametrize(
    ("joint", "marginal", "message"),
    [
        (torch.ones(3, 1), torch.ones(3), r"joint must have shape \(n,\)"),
        (torch.ones(3), torch.ones(4), r"joint must have shape \(n,\)"),
        (torch.ones(3), torch.ones(3, 0), r"joint must have shape \(n,\)"),
        (torch.ones(0), torch.ones(0), r"joint must have shape \(n,\)"),
        (torch.tensor([math.nan]), torch.ones(1), "joint must be floating point and finite"),
        (torch.ones(1), torch.tensor([math.inf]), "marginal must be floating point and finite"),
        (torch.ones(2).long(), torch.ones(2), "joint must be floating point and finite, got torch.int64"),
        (torch.ones(2), torch.ones(2).long(), "marginal must be floating point and finite, got torch.int64"),
    ],
)
def test_critics_terms_refuse(terms, joint, marginal, message):
    with pytest.raises(ValueError, match=message):
        terms(joint, marginal)


@pytest.mark.parametrize(
    ("scores", "message"),
    [
        (torch.ones(3, 4), r"\(n, n\)"),
        (torch.ones(1, 1), r"\(n, n\)"),
        (torch.ones(3), r"\(n, n\)"),
        (torch.full((2, 2), math.nan), "scores must be floating point and finite"),
        (torch.ones(2, 2).long(), "scores must be floating point and finite, got torch.int64"),
    ],
)
def test_nce_refuses(scores, message):
    with pytest.raises(ValueError, match=message):
        info_nce_terms(scores)


def test_nwj_refuses_scores_whose_exponential_overflows():
    with pytest.raises(ValueError, match="exponential is finite, got up to 200"):
        nwj_terms(torch.zeros(2), torch.tensor([0.0, 200.0]))


# --- permutation ---


@pytest.mark.parametrize("n", [2, 3, 17])
def test_no_row_stays_and_none_is_lost(n):
    rows = torch.arange(n)[:, None]
    for seed in range(20):
        moved = permute_rows(rows, generator=seeded(seed))
        assert (moved != rows).all()
        assert moved.sort(0).values.equal(rows)


def test_every_other_row_is_as_likely():
    n, replicates = 5, 3000
    generator = seeded()
    partner = torch.stack([permute_rows(torch.arange(n), generator=generator) for _ in range(replicates)])
    for i in range(n):
        for j in set(range(n)) - {i}:
            assert_z((partner[:, i] == j).double(), 1 / (n - 1))


def test_permutation_is_seeded_keeps_whole_rows_and_lets_gradients_through():
    z = randn(6, 2).requires_grad_()
    a, b = (permute_rows(z, generator=seeded(3)) for _ in range(2))
    assert a.equal(b)
    assert all((row == z).all(1).any() for row in a)
    weight = randn(6, 2, seed=1)
    (a * weight).sum().backward()
    torch.testing.assert_close(z.grad.sum(0), weight.sum(0))


@pytest.mark.parametrize("z", [torch.ones(1, 3), torch.tensor(1.0)])
def test_one_row_has_no_partner(z):
    with pytest.raises(ValueError, match="at least 2 rows"):
        permute_rows(z)
