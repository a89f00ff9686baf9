"""Which timestep each training sample gets: uniform, stratified over the batch, or by the losses seen.

The timestep of stream position n is a function of (seed, n) and, if loss-aware, of a distribution that is
frozen between named image counts. Ranks gather its histogram in integers, so neither their number nor the
order of samples changes it, and it is saved with every checkpoint.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from trainer.clock import is_due
from trainer.diffusion.timesteps import LossHistogram, Proposal, TimestepKind, stratified
from trainer.distributed import Ranks
from trainer.randomness import Purpose, bits, timesteps
from trainer.recipe import Recipe


class TimestepSource:
    """Timesteps of the samples of one run, on one rank.

    Args:
        recipe: The run's recipe.
        device: Where the samples are.
    """

    def __init__(self, recipe: Recipe, device: torch.device) -> None:
        self._section, self._seed, self._batch = recipe.loss, recipe.seed, recipe.batch.total
        self._num_timesteps = recipe.diffusion.num_timesteps
        self._proposal = Proposal.uniform(self._num_timesteps, device)
        self._total = LossHistogram(self._num_timesteps, device)
        self._fresh = LossHistogram(self._num_timesteps, device)

    @property
    def is_loss_aware(self) -> bool:
        """Whether there is anything to observe, merge and save."""
        return self._section.timesteps is TimestepKind.LOSS_AWARE

    def draw(self, n: Tensor) -> tuple[Tensor, Tensor]:
        """Choose the timesteps of samples.

        Args:
            n: int64 [b] stream positions.

        Returns:
            int64 [b] timesteps and float32 [b] weights 1 / (T p(t)) that keep the expected loss that of
            uniform timesteps.
        """
        match self._section.timesteps:
            case TimestepKind.UNIFORM:
                t = timesteps(self._seed, n, self._num_timesteps)
            case TimestepKind.STRATIFIED:
                t = stratified(self._words(n), n, self._batch, self._num_timesteps)
            case TimestepKind.LOSS_AWARE:
                t = self._proposal.draw(self._words(n))
                return t, self._proposal.weights(t)
        return t, torch.ones_like(t, dtype=torch.float32)

    def observe(self, t: Tensor, losses: Tensor) -> None:
        """Take note of the unweighted losses float32 [b] of an update that was applied."""
        if self.is_loss_aware:
            self._fresh.add(t, losses)

    def after_update(self, before: int, after: int, ranks: Ranks) -> None:
        """Freeze a new distribution if one is due; all ranks call this alike.

        Args:
            before: Images seen before the update.
            after: Images seen after it.
            ranks: The processes of the job.
        """
        every = self._section.refresh_every_images
        if every is None or not is_due(every, before, after):
            return
        self._merge(ranks)
        self._proposal = self._total.proposal(self._section.uniform_share)
        self._total.halve()  # losses of the past fade by half at each refresh

    def tensors(self, ranks: Ranks) -> dict[str, Tensor]:
        """Return copies of what a checkpoint must hold, equal on every rank; all ranks call this alike."""
        if not self.is_loss_aware:
            return {}
        self._merge(ranks)
        content = {**self._total.tensors(), **self._proposal.tensors()}
        return {name: tensor.detach().to("cpu", copy=True) for name, tensor in content.items()}

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Go on from what `tensors` returned."""
        self._total.load(tensors)
        self._proposal = Proposal.from_tensors(tensors, self._total.counts.device)

    def _merge(self, ranks: Ranks) -> None:
        """Add what all ranks have seen since the last time to the common histogram."""
        fresh = {name: ranks.total(tensor.cpu()) for name, tensor in self._fresh.tensors().items()}
        self._total.add_counts(fresh)
        self._fresh.reset()

    def _words(self, n: Tensor) -> Tensor:
        """The random word of each sample's timestep: int64 [b] in [0, 2^32)."""
        return bits(self._seed, Purpose.TIMESTEP, n, 1)[:, 0]
