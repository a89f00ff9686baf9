"""What our kept deviations from the paper's code do to training, measured on the quick start's digits.

`python -m benchmarks.deviations [--steps 600 --seeds 3 --json FILE]` trains the quick start's network by
plain PyTorch from the same weights, pictures, timesteps and noise, changing one thing at a time:

* `per-shard clipping`: as the authors ran it, each of 8 shards' gradients is clipped to norm 1, then
  averaged;
* `torch epsilon`: Adam's epsilon after the bias correction instead of TensorFlow's place;
* `bf16`: the network under autocast (few steps: slow on processors without bfloat16 units).

Reported against the baseline (clipping of the average, TensorFlow's epsilon, float32): the loss of the
last quarter of the steps, the relative distance of the final weights, and how often clipping bound. The
`repeat` row is the baseline with other noise and timesteps: what chance alone does.
"""

import argparse
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import Tensor

from trainer.clock import adam_epsilon, learning_rate
from trainer.diffusion.losses import l_simple
from trainer.randomness import Purpose, bits, normal, timesteps
from trainer.recipe import Recipe, load_recipe
from trainer.recipe_sections import EpsilonForm
from trainer.unet import UNet

SHARDS = 8


@dataclass(frozen=True)
class Variant:
    """One way to train."""

    name: str
    per_shard_clipping: bool = False
    epsilon_form: EpsilonForm = EpsilonForm.TENSORFLOW
    bf16: bool = False
    noise_seed: int = 0


@dataclass(frozen=True)
class Trained:
    """What came of it."""

    losses: list[float]
    bound: int
    weights: Tensor


def main() -> None:
    """Run all variants and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--bf16", action="store_true", help="also train under bfloat16 autocast")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the raw numbers")
    options = parser.parse_args()
    variants = [
        Variant("repeat", noise_seed=1),
        Variant("per-shard clipping", per_shard_clipping=True),
        Variant("torch epsilon", epsilon_form=EpsilonForm.TORCH),
    ]
    if options.bf16:
        variants.append(Variant("bf16", bf16=True))
    rows = list(compare(variants, options.steps, options.seeds))
    print(f"{'variant':20} {'loss':>8} {'baseline':>8} {'change':>8} {'weights':>8} {'clipping bound':>14}")
    for row in rows:
        print(
            f"{row['variant']:20} {row['loss']:8.5f} {row['baseline']:8.5f} {row['change']:+7.2%} "
            f"{row['distance']:8.4f} {row['bound']:14.1%}"
        )
    if options.json:
        options.json.write_text(json.dumps({"schema": "deviations/1", "rows": rows}, indent=2))


def compare(variants: list[Variant], steps: int, seeds: int) -> Iterator[dict[str, object]]:
    """Train every variant and the baseline from `seeds` initial weights."""
    baselines = [train(Variant("baseline"), steps, seed) for seed in range(seeds)]
    for variant in variants:
        runs = [train(variant, steps, seed) for seed in range(seeds)]
        tail = steps // 4
        loss = float(np.mean([run.losses[-tail:] for run in runs]))
        base = float(np.mean([run.losses[-tail:] for run in baselines]))
        pairs = list(zip(runs, baselines, strict=True))
        distance = [float((a.weights - b.weights).norm() / b.weights.norm()) for a, b in pairs]
        yield {
            "variant": variant.name,
            "settings": asdict(variant),
            "loss": loss,
            "baseline": base,
            "change": loss / base - 1,
            "distance": float(np.mean(distance)),
            "bound": float(np.mean([run.bound / steps for run in runs])),
            "losses": [run.losses for run in runs],
        }


def train(variant: Variant, steps: int, seed: int) -> Trained:
    """Train the quick start's network by plain PyTorch."""
    recipe = load_recipe("quickstart", [f"optimizer.epsilon_form={variant.epsilon_form}"])
    pictures = torch.from_numpy(load_digits().images).float().unsqueeze(1) / 8 - 1
    diffusion = recipe.build_diffusion()
    model = UNet(recipe.unet_config(), torch.Generator().manual_seed(seed))
    adam = torch.optim.Adam(model.parameters(), lr=recipe.optimizer.learning_rate)
    losses, bound, batch = [], 0, recipe.batch.total
    for step in range(steps):
        n = torch.arange(step * batch, (step + 1) * batch)
        x0 = pictures[bits(seed, Purpose.CODEC, n, 1)[:, 0] % len(pictures)]
        t = timesteps(variant.noise_seed, n, diffusion.num_timesteps)
        noise = normal(variant.noise_seed, Purpose.NOISE, n, tuple(x0.shape[1:]))
        x_t = diffusion.q_sample(x0, t, noise)
        with torch.autocast("cpu", torch.bfloat16, enabled=variant.bf16):
            output = model(x_t, t)
        each = l_simple(diffusion, output.float(), x0, x_t, t, noise)
        bound += backward(model, each, recipe, variant.per_shard_clipping)
        for group in adam.param_groups:
            group["lr"] = learning_rate(recipe.optimizer, step * batch)
            group["eps"] = adam_epsilon(recipe.optimizer, step)
        adam.step()
        losses.append(float(each.detach().mean()))
    weights = torch.cat([parameter.detach().flatten() for parameter in model.parameters()])
    return Trained(losses, bound, weights)


def backward(model: UNet, losses: Tensor, recipe: Recipe, per_shard: bool) -> bool:
    """Leave the clipped gradient in the parameters; tell whether clipping bound."""
    parameters, limit = list(model.parameters()), recipe.optimizer.clip_norm
    if not per_shard:
        grads = list(torch.autograd.grad(losses.mean(), parameters))
        norm = clip(grads, limit)
    else:
        shards = losses.view(SHARDS, -1).mean(1).unbind()
        found = [list(torch.autograd.grad(loss, parameters, retain_graph=True)) for loss in shards]
        norm = max(clip(grads, limit) for grads in found)
        grads = [torch.stack(parts).mean(0) for parts in zip(*found, strict=True)]
    for parameter, grad in zip(parameters, grads, strict=True):
        parameter.grad = grad
    return norm > limit


def clip(grads: list[Tensor], limit: float) -> float:
    """Scale gradients in place to a global norm of at most `limit`; return the norm before."""
    norm = float(torch.stack([grad.norm() for grad in grads]).norm())
    for grad in grads:
        grad.mul_(min(1.0, limit / (norm + 1e-6)))
    return norm


if __name__ == "__main__":
    main()
