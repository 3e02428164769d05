"""Gradients a second of ``gae_core.chains.mala``, of a Python loop over chains, and of blackjax's MALA.

``python benchmarks/mala.py`` prints a table; ``--write`` also puts it into benchmarks/README.md. All take the same
number of chains, step, energy and starts, in single precision, and keep their samples. Who is measured alternates
within one process, and each ratio is taken within a round. blackjax is mapped over the chains, scanned over the steps
and compiled; the compilation is not timed. The share of accepted proposals stands beside the speeds: it must agree.
"""

import argparse
import math
import os
import platform
import re
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from training import spread  # noqa: E402

from gae_core import nets  # noqa: E402
from gae_core.chains import Energy, mala  # noqa: E402

CHAINS = 256
STEPS = {"mala": 400, "a loop over chains": 8, "blackjax": 400}  # of each chain in a round
# energy -> dimension and step eps
TARGETS = {"N(0, I) in 16 dimensions": (16, 1.0), "network 2-128-128-1": (2, 0.5)}

Run = Callable[[int], tuple[float, float]]  # seed -> seconds, share of accepted proposals


def network() -> nn.Sequential:
    """The layers that the energy of the second target has."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        return nets.mlp([2, 128, 128, 1], activation=nn.SiLU).requires_grad_(False)


def torch_energy(target: str) -> Energy:
    """U for rows: a quadratic, or the network with a quadratic that holds it."""
    if target.startswith("N"):
        return lambda z: 0.5 * z.square().sum(1)
    layers = network()
    return lambda z: layers(z)[:, 0] + 0.5 * z.square().sum(1)


def jax_log_density(target: str) -> Callable:
    """-U for one point, with the same weights."""
    import jax
    import jax.numpy as jnp

    if target.startswith("N"):
        return lambda z: -0.5 * (z * z).sum()
    weights = [(jnp.array(m.weight.numpy()), jnp.array(m.bias.numpy())) for m in network() if isinstance(m, nn.Linear)]

    def log_density(z):
        h = z
        for i, (weight, bias) in enumerate(weights):
            h = weight @ h + bias
            h = jax.nn.silu(h) if i + 1 < len(weights) else h
        return -h[0] - 0.5 * (z * z).sum()

    return log_density


def starts(target: str) -> Tensor:
    """One start for each chain."""
    return torch.randn(CHAINS, TARGETS[target][0], generator=torch.Generator().manual_seed(0))


def of_mala(target: str, steps: int) -> Run:
    """``gae_core.chains.mala``, all chains at once."""
    energy, z0, eps = torch_energy(target), starts(target), TARGETS[target][1]

    def run(seed: int) -> tuple[float, float]:
        generator, start = torch.Generator().manual_seed(seed), time.perf_counter()
        found = mala(energy, z0, step_size=eps, n_steps=steps, target_acceptance=None, generator=generator)
        return time.perf_counter() - start, float(found.acceptance.mean())

    return run


def of_loop(target: str, steps: int) -> Run:
    """One chain after the other, with one gradient a step and no checks."""
    energy, z0, eps = torch_energy(target), starts(target), TARGETS[target][1]
    root = math.sqrt(eps)

    def value_and_gradient(z: Tensor) -> tuple[Tensor, Tensor]:
        z = z.requires_grad_()
        u = energy(z)
        (g,) = torch.autograd.grad(u, z)
        return u.detach(), g

    def run(seed: int) -> tuple[float, float]:
        generator, accepted, samples = torch.Generator().manual_seed(seed), 0, []
        start = time.perf_counter()
        for z in z0.split(1):
            u, g = value_and_gradient(z.clone())
            for _ in range(steps):
                xi = torch.randn(z.shape, generator=generator)
                proposal = z - 0.5 * eps * g + root * xi
                u1, g1 = value_and_gradient(proposal)
                proposal = proposal.detach()
                back = (z - proposal + 0.5 * eps * g1).square().sum()
                log_alpha = u - u1 + 0.5 * xi.square().sum() - back / (2 * eps)
                if torch.rand((), generator=generator).log() < log_alpha:
                    z, u, g = proposal, u1, g1
                    accepted += 1
                samples.append(z)
        return time.perf_counter() - start, accepted / (CHAINS * steps)

    return run


def of_blackjax(target: str, steps: int) -> Run:
    """MALA of blackjax, whose step is half of ours, mapped over chains, scanned over steps, compiled."""
    import blackjax
    import jax

    sampler = blackjax.mala(jax_log_density(target), TARGETS[target][1] / 2)
    z0 = starts(target).numpy()

    @jax.jit
    def sample(key):
        def step(states, key):
            states, info = jax.vmap(sampler.step)(jax.random.split(key, CHAINS), states)
            return states, (states.position, info.is_accepted.mean())

        return jax.lax.scan(step, jax.vmap(sampler.init)(z0), jax.random.split(key, steps))[1]

    def run(seed: int) -> tuple[float, float]:
        start = time.perf_counter()
        _, accepted = jax.block_until_ready(sample(jax.random.key(seed)))
        return time.perf_counter() - start, float(accepted.mean())

    return run


def measure(target: str, rounds: int, steps: dict[str, int] = STEPS) -> list[str]:
    """Lines of the table for one energy."""
    makers = {"mala": of_mala, "a loop over chains": of_loop, "blackjax": of_blackjax}
    runs: dict[str, Run] = {}
    for name, make in makers.items():
        try:
            runs[name] = make(target, steps[name])
        except ImportError as error:
            print(f"{name} is not measured: {error}; `pip install -e .[benchmarks]` brings it", file=sys.stderr)
    for run in runs.values():
        run(0)  # warm, and compiled
    speed, accepted = ({name: [] for name in runs} for _ in range(2))
    for i in range(rounds):
        names = list(runs)
        for name in names[i % len(names) :] + names[: i % len(names)]:
            seconds, share = runs[name](1 + i)
            speed[name].append(CHAINS * steps[name] / seconds)
            accepted[name].append(share)
    lines = []
    for name, values in speed.items():
        ratio = [ours / theirs for ours, theirs in zip(speed["mala"], values, strict=True)]
        over = "" if name == "mala" else spread(ratio, 1 if statistics.median(ratio) > 10 else 2)
        share = statistics.fmean(accepted[name])
        lines.append(f"| {target} | {name} | {share:.3f} | {spread(values, 0)} | {over} |")
    return lines


def place(text: str) -> None:
    """Put the table into benchmarks/README.md, between its marks."""
    path = ROOT / "benchmarks" / "README.md"
    marked = r"(<!-- mala -->\n).*?(<!-- end -->)"
    new = re.sub(marked, lambda m: m[1] + text + m[2], path.read_text(encoding="utf-8"), flags=re.S)
    path.write_text(new, encoding="utf-8")


def main() -> None:
    """Measure, print, and write where asked."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--cores", type=int, default=1, help="processor cores that all are confined to (Linux)")
    parser.add_argument("--note", default="", help="what else the reader should know of the machine")
    parser.add_argument("--write", action="store_true", help="into benchmarks/README.md")
    options = parser.parse_args()
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[-options.cores :])  # before jax counts them
    torch.set_num_threads(options.cores)
    lines = [
        f"CPU, cores: {options.cores}. {CHAINS} chains, {options.rounds} rounds, Python {platform.python_version()}, "
        f"torch {torch.__version__}{versions()}. {options.note}",
        "",
        "| energy | | accepted | gradients a second: median (smallest to largest) | speed of `mala` over it |",
        "|---|---|---:|---:|---:|",
    ]
    for target in TARGETS:
        lines += measure(target, options.rounds)
    text = "\n".join(lines) + "\n"
    print(text)
    if options.write:
        place(text)


def versions() -> str:
    """Of blackjax and jax, if they are there."""
    try:
        import blackjax
        import jax
    except ImportError:
        return ""
    return f", blackjax {blackjax.__version__}, jax {jax.__version__}"


if __name__ == "__main__":
    main()
