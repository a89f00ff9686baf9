"""The others, one file each: how their network is built, in its documented best configuration."""

from benchmarks.peers.base import Peer
from benchmarks.peers.diffusers_unet import DIFFUSERS
from benchmarks.peers.lucidrains_unet import LUCIDRAINS
from benchmarks.peers.openai_unet import OPENAI

PEERS: dict[str, Peer] = {peer.name: peer for peer in (DIFFUSERS, OPENAI, LUCIDRAINS)}
"""By name."""
