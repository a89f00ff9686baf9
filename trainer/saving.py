"""Publishing a checkpoint: every rank writes its part of the state, rank 0 whole tensors and the manifest."""

import logging
import time
from collections.abc import Mapping, Sequence
from itertools import accumulate

import torch
from torch import Tensor

from trainer import checkpoint as checkpoints
from trainer.distributed import Ranks
from trainer.engine import Engine
from trainer.manifest import FileEntry, Manifest
from trainer.run import Run
from trainer.weights import assemble

log = logging.getLogger(__name__)


class CheckpointWriter:
    """Writes checkpoints of one attempt; all ranks call it together.

    Args:
        run: The run directory.
        ranks: The processes of the job.
        engine: What holds the state.
        shapes: Of the network's parameters, by name.
    """

    def __init__(self, run: Run, ranks: Ranks, engine: Engine, shapes: Mapping[str, torch.Size]) -> None:
        self._run, self._ranks, self._engine, self._shapes = run, ranks, engine, shapes

    def write(
        self, name: str, averages: Mapping[str, list[Tensor]], timesteps: Mapping[str, Tensor]
    ) -> tuple[list[FileEntry], dict[str, dict[str, Tensor]]]:
        """Write all parts of a checkpoint that is then to be published.

        Args:
            name: Of the checkpoint.
            averages: By EMA profile, laid out as the engine's masters.
            timesteps: The distribution of loss-aware timesteps; empty if there is none.

        Returns:
            The entries of its manifest, and by profile the averages' whole tensors (empty but on rank 0).
        """
        began = time.monotonic()
        run, ranks = self._run, self._ranks
        entries = [checkpoints.write_state(run, name, ranks.rank, self._engine.partition.slices(averages))]
        weights = self.weights()
        whole = {profile: self.whole(flats) for profile, flats in averages.items()}
        if ranks.is_main:
            entries.append(checkpoints.write_part(run, name, checkpoints.WEIGHTS_FILE, weights, "weights"))
            for profile, tensors in whole.items():
                file = checkpoints.ema_file(profile)
                entries.append(checkpoints.write_part(run, name, file, tensors, "ema", ema=profile))
            if timesteps:
                file = checkpoints.TIMESTEPS_FILE
                entries.append(checkpoints.write_part(run, name, file, timesteps, "timesteps"))
        files = [entry for part in ranks.gather(entries) for entry in part]
        log.info("parts of checkpoint %s written in %.2f s", name, time.monotonic() - began)
        return files, whole

    def publish(self, manifest: Manifest) -> None:
        """Publish a checkpoint whose parts are written; rank 0 alone."""
        checkpoints.publish(self._run, manifest)
        log.info("checkpoint %s published", manifest.name)

    def weights(self) -> Mapping[str, Tensor]:
        """Return the whole float32 weights on rank 0."""
        if self._engine.holds_weights:
            return dict(self._engine.module.named_parameters())
        return self.whole(self._engine.partition.masters)

    def whole(self, flats: Sequence[Tensor]) -> dict[str, Tensor]:
        """Return whole tensors on rank 0 of what every rank holds its part of, laid out as the masters."""
        begins = [0, *accumulate(flat.numel() for flat in flats)]
        layout = [
            (piece.parameter, piece.start, piece.stop, begins[piece.span] + piece.offset)
            for piece in self._engine.partition.pieces
        ]
        layouts = self._ranks.gather(layout)
        gathered = self._ranks.gather_to_main(torch.cat(list(flats)) if flats else torch.empty(0))
        if not self._ranks.is_main:
            return {}
        pieces = [
            (parameter, start, stop, gathered[rank][begin : begin + stop - start])
            for rank, pieces_of in enumerate(layouts)
            for parameter, start, stop, begin in pieces_of
        ]
        return assemble(self._shapes, pieces)
