"""From a choice to the network on its device."""

import torch

from eval.features.choice import FeatureChoice, NetworkKind
from eval.features.effnetlite0 import EfficientNetFeatures
from eval.features.external import ExternalFeatures, load_python, load_torchscript
from eval.features.inception_script import ScriptedInception
from eval.features.network import FeatureNetwork


def open_network(choice: FeatureChoice, device: torch.device) -> FeatureNetwork:
    """Load the chosen network on a device, its hash checked.

    Raises:
        UserError: File missing, wrong hash, or not a network of the expected interface.
    """
    if choice.kind is NetworkKind.EFFNETLITE0:
        return EfficientNetFeatures(device)
    identity, location = choice.identity, choice.location
    assert location is not None
    if choice.kind is NetworkKind.INCEPTION:
        return ScriptedInception(location, identity, choice.resize, device)
    if choice.kind is NetworkKind.INCEPTION_STATE:
        # Brings torchvision's networks along: seconds, and 170 MB that every other evaluation can do without.
        from eval.features.inception_state import StateInception

        return StateInception(location, identity, choice.resize, device)
    if choice.kind is NetworkKind.TORCHSCRIPT:
        network = load_torchscript(location, identity.sha256, device)
    else:
        assert identity.function is not None
        network = load_python(location, identity.function, identity.sha256, device)
    return ExternalFeatures(network, identity, choice.convention, device)
