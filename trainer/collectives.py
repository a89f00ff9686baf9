"""What the ranks of a job send each other for one update."""

from trainer.deepspeed_config import build_config
from trainer.memory import network_of, persistent_numbers, reuse_distance
from trainer.recipe import Recipe


def bytes_sent(recipe: Recipe, ranks: int, micro_steps: int) -> int:
    """Return how many bytes each rank sends, and receives, for one update.

    Counted are gradients and parameters as rings send them: to reduce or to gather x bytes each of N ranks
    sends x (N - 1) / N. DeepSpeed (0.19.8) reduces with all-reduce, which is both, at every stage but 3
    (stage_1_and_2.py:allreduce_and_scatter); from stage 2 on it does so in every micro-step.
    """
    network = network_of(recipe.unet_config(), recipe.precision)
    whole = network.numel
    match recipe.deepspeed.zero_stage:
        case 0:
            numbers = 2 * whole
        case 1:
            numbers = 2 * whole + whole  # the updated weights are gathered
        case 2:
            numbers = 2 * whole * micro_steps + whole
        case _:
            zero = build_config(recipe, micro_steps, whole, on_gpu=True)["zero_optimization"]
            small = persistent_numbers(network, zero)  # gathered after the update, and kept
            times = (
                1 if reuse_distance(zero) >= 2 * whole else 2
            )  # for forward and backward together, or each
            numbers = whole * micro_steps + small + (whole - small) * times * micro_steps
    return numbers * network.itemsize * (ranks - 1) // ranks
