"""The peers compute what ours does, and a peer that does not is refused."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from benchmarks.network import CIFAR10, SMALL, Batch, count, our_network
from benchmarks.peers import PEERS
from benchmarks.peers.base import Peer, Twin
from benchmarks.peers.diffusers_unet import DIFFUSERS
from benchmarks.peers.openai_unet import OPENAI
from trainer.unet import UNet, UNetConfig

SAME_ARCHITECTURE = {peer.name: peer for peer in PEERS.values() if peer.comparable}
"""lucidrains' is another one, so it is not among the tests' requirements."""


@pytest.mark.parametrize("peer", SAME_ARCHITECTURE.values(), ids=SAME_ARCHITECTURE)
def test_peers_answer_like_ours(peer: Peer) -> None:
    check = peer.check(SMALL)
    assert check.same_parameters
    assert check.difference is not None
    assert check.scale is not None
    assert check.scale > 0.3  # not a comparison of zeros
    assert check.parameters == count(our_network(SMALL))
    assert "differs from ours by" in check.line()


def test_another_architecture_is_not_compared() -> None:
    foreign = replace(DIFFUSERS, twin=None)
    check = foreign.check(SMALL)
    assert check.difference is None
    assert not check.same_parameters
    assert "another architecture" in check.line()


@pytest.mark.parametrize("peer", SAME_ARCHITECTURE.values(), ids=SAME_ARCHITECTURE)
def test_peers_have_the_papers_parameters(peer: Peer) -> None:
    with torch.device("meta"):
        assert count(peer.build(CIFAR10)) == 35_746_307


def test_dropout_is_everyones() -> None:
    for peer in SAME_ARCHITECTURE.values():
        rates = {module.p for module in peer.build(SMALL).modules() if isinstance(module, nn.Dropout)}
        assert SMALL.dropout in rates, peer.name


def test_other_conventions_are_noticed() -> None:
    assert OPENAI.twin is not None
    wrong = replace(OPENAI, twin=replace(OPENAI.twin, config=lambda config: config))
    with pytest.raises(ValueError, match=r"openai differs from ours by .* nothing was timed"):
        wrong.check(SMALL)


def test_another_network_is_noticed() -> None:
    assert DIFFUSERS.twin is not None

    class Unloaded(Twin):
        def load(self, theirs: nn.Module, config: UNetConfig) -> None:
            pass

    wider = Unloaded(
        config=lambda config: replace(config, num_res_blocks=2), naming=DIFFUSERS.twin.naming, atol=1.0
    )
    with pytest.raises(ValueError, match=r"diffusers has .* parameters, ours .*: another network"):
        replace(DIFFUSERS, twin=wider).check(SMALL)


def test_a_missing_distribution_is_known() -> None:
    assert replace(DIFFUSERS, distribution="no-such-distribution").version is None
    assert DIFFUSERS.version is not None


def test_inputs_are_the_same_for_everyone() -> None:
    a, b = Batch.draw(SMALL, 3), Batch.draw(SMALL, 3)
    assert torch.equal(a.x_t, b.x_t)
    assert torch.equal(a.t, b.t)
    assert a.x_t.shape == (3, 3, 16, 16)
    assert isinstance(our_network(SMALL), UNet)
    assert not our_network(SMALL).training


@pytest.mark.parametrize("peer", SAME_ARCHITECTURE.values(), ids=SAME_ARCHITECTURE)
def test_peers_compile_into_one_graph(peer: Peer) -> None:
    assert peer.fullgraph
    one_level = replace(SMALL, channel_multipliers=(1,), attention_resolutions=(16,))
    network = peer.network(one_level)
    batch = Batch.draw(one_level, 1)
    # This backend only records: generating code takes minutes.
    traced = torch.compile(network, fullgraph=True, dynamic=False, backend="eager")
    with torch.no_grad():
        torch.testing.assert_close(traced(batch.x_t, batch.t), network(batch.x_t, batch.t), atol=1e-5, rtol=0)
