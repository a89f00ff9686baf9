"""How many bytes one rank of a job needs, at each ZeRO stage, before anything is started.

The state (weights, gradients, masters, moments, averages) follows from numbers of parameters; what is said
about DeepSpeed is what version 0.19.8 does, and each statement names where. Activations are measured by
`trainer.activations`. Of two moments the fuller one counts: the backward pass, when activations and
communication meet, and the update.
"""

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import torch
from pydantic import BaseModel, ConfigDict, ValidationError, computed_field

from trainer.activations import Activations, measure_activations
from trainer.deepspeed_config import build_config
from trainer.recipe import Recipe
from trainer.recipe_sections import Precision
from trainer.unet import UNet
from trainer.unet_config import UNetConfig

_WHOLE_REDUCTION: Final = 500_000_000  # runtime/engine.py:MEMORY_OPT_ALLREDUCE_SIZE
# runtime/zero/config.py:DeepSpeedZeroConfig has these as defaults.
_REUSE_DISTANCE: Final = 1_000_000_000
_PERSISTENT: Final = 100_000
_MOMENTS: Final = 2  # of Adam


class RankMemory(BaseModel):
    """What one rank holds, in bytes.

    Attributes:
        zero_stage: What is partitioned, see `DeepSpeedSection`.
        offload_optimizer: Whether masters, moments and averages are in the host's memory.
        parameters: Weights the network computes with; at stage 3 this rank's part, and all those gathered.
        gradients: As they are accumulated.
        masters: float32 weights that the optimizer updates, where they are tensors of their own.
        moments: Adam's two.
        averages: Those of all EMA profiles.
        communication: Buffers in which gradients are reduced during the backward pass.
        activations: Kept by a micro-step's forward pass for its backward pass.
        transient: Beyond them at the fullest moment of the two passes.
        update: Beside weights, gradients, masters, moments and averages after the backward pass: gradients
            being reduced, or the copies that the optimizer's step takes.
        host: In the host's memory, by the optimizer's offloading.
    """

    model_config = ConfigDict(frozen=True)

    zero_stage: int
    offload_optimizer: bool
    parameters: int
    gradients: int
    masters: int
    moments: int
    averages: int
    communication: int
    activations: int
    transient: int
    update: int
    host: int

    @computed_field  # type: ignore[prop-decorator]
    @property
    def fixed(self) -> int:
        """What does not depend on the number of images, in the backward pass."""
        return self._state + self.communication

    @computed_field  # type: ignore[prop-decorator]
    @property
    def device(self) -> int:
        """The most this rank holds on its device."""
        return self._state + max(self.communication + self.activations + self.transient, self.update)

    @property
    def _state(self) -> int:
        return self.parameters + self.gradients + self.masters + self.moments + self.averages


@dataclass(frozen=True)
class Network:
    """What of a network decides about the bytes of its state.

    Attributes:
        sizes: Numbers in each parameter.
        itemsize: Bytes of a number in parameters and gradients.
        master_itemsize: Bytes of a number in masters, moments and averages.
    """

    sizes: tuple[int, ...]
    itemsize: int
    master_itemsize: int

    @property
    def numel(self) -> int:
        """Numbers in all parameters."""
        return sum(self.sizes)

    @property
    def largest(self) -> int:
        """Numbers in the largest parameter."""
        return max(self.sizes)

    def part(self, ranks: int, stage: int) -> int:
        """Numbers of the state that one rank owns, padding included."""
        match stage:
            case 0:  # trainer/partition.py:of_whole_model
                return math.ceil(self.numel / ranks)
            case 3:  # each parameter by itself: runtime/zero/partition_parameters.py:Init._aligned_size
                return sum(math.ceil(size / ranks) for size in self.sizes)
        # Together, aligned to 2 numbers a rank: stage_1_and_2.py:flatten_dense_tensors_aligned
        return 2 * math.ceil(self.numel / (2 * ranks))


@functools.cache
def network_of(config: UNetConfig, precision: Precision) -> Network:
    """Describe the network of a configuration in a precision."""
    with torch.device("meta"):
        sizes = tuple(parameter.numel() for parameter in UNet(config).parameters())
    itemsize = {Precision.FP16: 2, Precision.FP64: 8}.get(precision, 4)
    return Network(sizes, itemsize, max(itemsize, 4))


def memory_by_stage(recipe: Recipe, ranks: int, micro_steps: int, micro_batch: int) -> list[RankMemory]:
    """Return what a rank holds at each ZeRO stage, without and with offloading, that the recipe allows.

    Args:
        recipe: What is trained.
        ranks: Processes of the job, each with a GPU of its own.
        micro_steps: Forward and backward passes per update.
        micro_batch: Most images that pass together.
    """
    activations = measure_activations(recipe.unet_config(), recipe.precision, micro_batch)
    return [
        rank_memory(layout, ranks, micro_steps, activations)
        for offload in (False, True)
        for stage in range(4)
        if (layout := _with_layout(recipe, stage, offload)) is not None
    ]


def rank_memory(
    recipe: Recipe, ranks: int, micro_steps: int, activations: Activations, *, on_gpu: bool = True
) -> RankMemory:
    """Return what a rank holds in the recipe's own layout.

    Args:
        recipe: What is trained.
        ranks: Processes of the job.
        micro_steps: Forward and backward passes per update.
        activations: Of a micro-step.
        on_gpu: Whether it trains on GPUs.
    """
    network = network_of(recipe.unet_config(), recipe.precision)
    stage, offload = recipe.deepspeed.zero_stage, recipe.deepspeed.offload_optimizer
    zero = build_config(recipe, micro_steps, network.numel, on_gpu=on_gpu)["zero_optimization"]
    plan = _Plan(network, ranks, micro_steps, offload, zero)
    part = network.part(ranks, stage)
    state = {
        "masters": network.master_itemsize * part if stage else 0,
        "moments": network.master_itemsize * _MOMENTS * (part if stage else network.numel),
        "averages": network.master_itemsize * part * len(recipe.ema),
    }
    match stage:
        case 0:
            needs = plan.stage_0()
        case 3:
            needs = plan.stage_3()
        case _:
            needs = plan.stage_1_or_2(partitioned=stage == 2)
    host = needs.host + sum(state.values()) if offload else 0
    return RankMemory(
        zero_stage=stage,
        offload_optimizer=offload,
        parameters=needs.parameters,
        gradients=needs.gradients,
        communication=needs.communication,
        update=needs.update,
        activations=activations.kept,
        transient=activations.transient,
        host=host,
        **(dict.fromkeys(state, 0) if offload else state),
    )


@dataclass(frozen=True)
class _Needs:
    """Bytes by purpose; `host` is what offloading needs beside masters, moments and averages."""

    parameters: int
    gradients: int
    communication: int
    update: int
    host: int = 0


@dataclass(frozen=True)
class _Plan:
    """What DeepSpeed allocates beside masters and moments."""

    network: Network
    ranks: int
    micro_steps: int
    offload: bool
    zero: Mapping[str, Any]

    @property
    def bucket(self) -> int:
        """Numbers that are reduced together."""
        return int(self.zero["reduce_bucket_size"])

    def stage_0(self) -> _Needs:
        """Nothing is partitioned; gradients are reduced when all are there, as copies in one tensor."""
        whole = self.network.itemsize * self.network.numel
        # runtime/engine.py:allreduce_bucket flattens what allreduce_no_retain puts together.
        copied = min(self.network.numel, _WHOLE_REDUCTION + self.network.largest)
        return _Needs(whole, whole, 0, self.network.itemsize * copied)

    def stage_1_or_2(self, *, partitioned: bool) -> _Needs:
        """Masters and moments are partitioned, at stage 2 the gradients too.

        The parameters are views of one flat tensor, and each rank's part of it has a master of its own, in
        float32 too: single_partition_of_fp32_groups is a clone (stage_1_and_2.py:__init__).
        """
        network, item = self.network, self.network.itemsize
        part = network.part(self.ranks, 1)
        # Whole parameters, of which the part may cut two: copy_grads_in_partition.
        owned = min(part + 2 * network.largest, network.numel)
        accumulates = self.micro_steps > 1
        overlaps = bool(self.zero["overlap_comm"])
        if not partitioned and (accumulates or not overlaps):
            gradients = network.numel
        elif self.offload:
            gradients = network.largest  # temp_grad_buffer_for_gpu_offload
        else:
            # The sum so far is kept while new ones are collected: independent_gradient_partition_epilogue.
            gradients = owned * (2 if accumulates else 1)
        # setup_buckets makes one buffer, or two where communication overlaps. allreduce_bucket copies what is
        # in it: in the midst of the backward pass, unless all gradients fit in.
        buffers, copy = self.bucket * (2 if overlaps else 1), min(self.bucket, network.numel)
        communication = item * (buffers + (copy if self.bucket < network.numel else 0))
        flat = (
            0 if self.offload else part * (item + (0 if item == 4 else 4))
        )  # step: flatten, then to float32
        update = max(item * (buffers + copy), flat)
        host = 0
        if self.offload:
            # Masters' .grad, param_buffer_of_bit16_for_cpu_offload_groups, temp_grad_buffer_for_cpu_offload
            host = 4 * part + item * (part + network.largest)
            host += item * owned if accumulates else 0  # accumulated_grads_in_cpu
        parameters = item * part * self.ranks
        return _Needs(parameters, item * gradients, communication, update, host)

    def stage_3(self) -> _Needs:
        """Parameters are partitioned too, and gathered while they are used.

        The masters are copies in float32 as well: stage3.py:_create_fp32_partitions would share them, but
        compares a torch.device with its name. Small parameters stay gathered for ever (parameter_offload.py:
        mark_persistent_parameters), others until the backward pass has used them, if it comes to that within
        the reuse distance (partitioned_param_coordinator.py:__params_to_release). DeepSpeed's default of 10^9
        keeps all of any network below half of that.
        """
        network, item = self.network, self.network.itemsize
        part = network.part(self.ranks, 3)
        prefetch = _setting(self.zero, "prefetch_bucket_size", 0)
        within = persistent_numbers(network, self.zero) + reuse_distance(self.zero)
        gathered = min(network.numel, within + prefetch + network.largest)
        # grad_partitions_flat_buffer is there from the start, and on the host with offloading.
        gradients = network.largest if self.offload else part
        # So is the bucket's buffer; coalesced_collectives.py:reduce_scatter_coalesced copies what is in it.
        bucket = max(self.bucket, network.largest)
        communication = item * (2 if bucket < network.numel else 1) * bucket
        flat = 0 if self.offload else part * (item + (0 if item == 4 else 4))
        update = item * bucket + max(item * bucket, flat)
        host = part * (item + 4) if self.offload else 0
        return _Needs(item * (part + gathered), item * gradients, communication, update, host)


def largest_micro_batch(recipe: Recipe, memory: RankMemory, device_bytes: int) -> int:
    """Return how many images can pass together within a device's memory; 0 if not one can.

    Args:
        recipe: What is trained.
        memory: Of a rank; its activations do not matter.
        device_bytes: What may be used.
    """
    config, precision = recipe.unet_config(), recipe.precision
    # The peak is the largest of several sums, each of which grows by so much for every image.
    peaks = {batch: measure_activations(config, precision, batch).peak for batch in (1, 64, 128)}
    room = device_bytes - memory.fixed
    fitting = [
        few + (room - peaks[few]) * (many - few) // (peaks[many] - peaks[few])
        for few, many in ((1, 64), (64, 128))
    ]
    return max(0, min(fitting))


def persistent_numbers(network: Network, zero: Mapping[str, Any]) -> int:
    """How many numbers ZeRO 3 keeps gathered all the time: small parameters.

    Args:
        network: The network.
        zero: DeepSpeed's configuration of ZeRO.
    """
    threshold = _setting(zero, "param_persistence_threshold", _PERSISTENT)
    return sum(size for size in network.sizes if size <= threshold)


def reuse_distance(zero: Mapping[str, Any]) -> int:
    """Within how many numbers of its next use ZeRO 3 does not let a gathered parameter go."""
    return _setting(zero, "max_reuse_distance", _REUSE_DISTANCE)


def _setting(zero: Mapping[str, Any], name: str, default: int) -> int:
    """A number of stage 3, which DeepSpeed's configuration knows by two names."""
    return int(zero.get(f"stage3_{name}", zero.get(name, default)))


def _with_layout(recipe: Recipe, stage: int, offload: bool) -> Recipe | None:
    """The recipe at another stage; None if it refuses that."""
    content = recipe.model_dump(mode="json")
    content["deepspeed"] |= {"zero_stage": stage, "offload_optimizer": offload}
    try:
        return Recipe.model_validate(content)
    except ValidationError:
        return None
