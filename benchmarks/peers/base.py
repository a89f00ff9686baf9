"""What every peer's file says about it, and the comparison that comes before any timing."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from benchmarks.harness import Layout
from benchmarks.network import Batch, count, our_network
from benchmarks.report import Check, installed
from trainer.unet import UNetConfig
from trainer.weights.names import Naming, Network, correspondences, to_theirs


@dataclass(frozen=True)
class Twin:
    """How our network is made equal to a peer's of the same parameters.

    Attributes:
        config: Our configuration -> the one in which ours computes what theirs does.
        naming: Their names of our parameters.
        atol: Largest difference of the outputs in float32 that rounding explains. Against float64 either
            side of the CIFAR-10 network is off by 1.5e-5, at a scale of 3.5; one wrong eps is 1e-4.
        prefix: What stands before their names in the module that `Peer.build` returns.
    """

    config: Callable[[UNetConfig], UNetConfig]
    naming: Naming
    atol: float
    prefix: str = ""

    def load(self, theirs: nn.Module, config: UNetConfig) -> None:
        """Copy the weights of our network into theirs."""
        config = self.config(config)
        state = to_theirs(correspondences(self.naming, Network.of(config)), our_network(config).state_dict())
        theirs.load_state_dict({self.prefix + name: tensor for name, tensor in state.items()})


@dataclass(frozen=True)
class Peer:
    """Someone else's network.

    Attributes:
        name: In tables, options and bars.
        distribution: What pip calls it.
        source: Where its documentation or code stands.
        build: Our configuration -> their network, called like ours: (x [B, C, H, W], t int64 [B]) -> like x.
        twin: How our network computes what theirs does; None: theirs is another architecture.
        layouts: Those its documentation speaks of; if compiled, it runs in the last one.
        fullgraph: Whether the whole network compiles into one graph.
    """

    name: str
    distribution: str
    source: str
    build: Callable[[UNetConfig], nn.Module]
    twin: Twin | None = None
    layouts: tuple[Layout, ...] = (Layout.CONTIGUOUS,)
    fullgraph: bool = True

    @property
    def version(self) -> str | None:
        """Of the installed distribution; None if it is not installed."""
        return installed(self.distribution)

    @property
    def comparable(self) -> bool:
        """Whether it has our architecture, so that bars are about it."""
        return self.twin is not None

    def network(self, config: UNetConfig) -> nn.Module:
        """Their network in evaluation mode, with our weights where it is the same architecture."""
        model = self.build(config).eval()
        if self.twin is not None:
            self.twin.load(model, config)
        return model

    def check(self, config: UNetConfig) -> Check:
        """Compare their answer with ours.

        Args:
            config: The network to be measured.

        Raises:
            ValueError: If they differ by more than rounding explains: then timings would compare nothing.
        """
        theirs = self.network(config)
        batch = Batch.draw(config, 2)
        with torch.no_grad():
            output = theirs(batch.x_t, batch.t)
        if output.shape != batch.x_t.shape:
            raise ValueError(f"{self.name} answers {list(output.shape)} to {list(batch.x_t.shape)}")
        difference = scale = None
        if self.twin is not None:
            ours = our_network(self.twin.config(config))
            if count(ours) != count(theirs):
                raise ValueError(
                    f"{self.name} has {count(theirs):,} parameters, ours {count(ours):,}: another network"
                )
            with torch.no_grad():
                expected = ours(batch.x_t, batch.t)
            difference = float((output - expected).abs().max())
            scale = float(expected.abs().max())
            if not difference <= self.twin.atol:
                raise ValueError(
                    f"{self.name} differs from ours by {difference:.1e} (atol {self.twin.atol}): nothing was "
                    "timed; its configuration or the copy of the weights is wrong"
                )
        return Check(
            peer=self.name,
            version=self.version or "not installed",
            source=self.source,
            parameters=count(theirs),
            same_parameters=self.comparable,
            difference=difference,
            scale=scale,
            atol=None if self.twin is None else self.twin.atol,
        )
