"""One rank that trains several recipes for three updates each and tells what it took.

`python -m tests.trainer.memory_program CASES` with RANK, WORLD_SIZE and the rest in the environment. The last
line of rank 0 is JSON: for each case the most bytes of tensors, and the bytes sent in the last update.
"""

import gc
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from deepspeed.comm import comm
from torch import Tensor

from trainer.activations import Ledger
from trainer.distributed import Environment, Ranks
from trainer.ema import PartitionedEma
from trainer.engine import Engine, init_process_group
from trainer.recipe import load_recipe
from trainer.unet import UNet

BATCH = 4
# DeepSpeed's collectives: name and place of the argument that has the whole, how often it goes round a ring.
COLLECTIVES = {
    "all_reduce": ("tensor", 0, 2),
    "all_gather": ("tensor_list", 0, 1),
    "all_gather_into_tensor": ("output_tensor", 0, 1),
    "reduce_scatter_tensor": ("input_tensor", 1, 1),
}


class Sent:
    """Adds up what rings send for the collectives that DeepSpeed asks for."""

    def __init__(self, world: int) -> None:
        self.bytes = 0.0
        self._share = (world - 1) / world

    def counting(
        self, function: Callable[..., Any], name: str, place: int, passes: int
    ) -> Callable[..., Any]:
        def counted(*args: Any, **kwargs: Any) -> Any:
            whole = kwargs[name] if name in kwargs else args[place]
            tensors = [whole] if isinstance(whole, Tensor) else whole
            self.bytes += passes * self._share * sum(tensor.nbytes for tensor in tensors)
            return function(*args, **kwargs)

        return counted


@contextmanager
def counted(sent: Sent) -> Iterator[None]:
    with ExitStack() as stack:
        for name, about in COLLECTIVES.items():
            function = sent.counting(getattr(comm.cdb, name), *about)
            stack.enter_context(patch.object(comm.cdb, name, function))
        yield


def observe(overrides: list[str], micro_steps: int, ranks: Ranks) -> tuple[int, float]:
    """Bytes of tensors at most, from the network's making on, and bytes sent in the last update."""
    recipe = load_recipe("quickstart", overrides)
    image = recipe.image
    ledger = Ledger([])
    with ledger:
        engine = Engine(recipe, UNet(recipe.unet_config()), ranks, micro_steps)
        average = PartitionedEma(recipe.ema, engine.partition.masters)
        gc.collect()
        ledger.peak = ledger.held
        for update in range(3):
            sent = Sent(ranks.world)
            with counted(sent):
                for number in range(1, micro_steps + 1):
                    x = torch.randn(BATCH, image.channels, image.size, image.size)
                    loss = engine.forward(x, torch.zeros(BATCH, dtype=torch.int64)).square().mean()
                    engine.backward(loss)
                    del x, loss
                    if number < micro_steps:
                        engine.micro_step_done()
                assert engine.update(1e-3, 1e-8, lambda norm: norm > 0).applied
            average.update(update * BATCH, BATCH)
        engine.close()
    return ledger.peak, sent.bytes


def main() -> None:
    environment = Environment.from_launcher()
    init_process_group(environment, 60.0)
    ranks = Ranks(environment)
    found = []
    for overrides, micro_steps in json.loads(sys.argv[1]):
        found.append(observe(overrides, micro_steps, ranks))
        gc.collect()
    dist.destroy_process_group()
    print(json.dumps(found))


if __name__ == "__main__":
    main()
