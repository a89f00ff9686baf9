"""The configuration of the network: what fits together, and how it says what does not."""

from dataclasses import replace
from typing import Any

import pytest

from tests.trainer.unet_support import SMALL, TINY
from trainer.unet import CONVENTIONS, Profile


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_size": 9}, "image_size 9 cannot be halved 1 times: make it a multiple of 2"),
        ({"image_size": 0}, "image_size must be at least 1"),
        ({"base_channels": 7}, "base_channels must be even"),
        ({"base_channels": 2, "norm_groups": 1}, "at least 4"),
        ({"norm_groups": 32}, "set norm_groups to a divisor of base_channels 8, e.g. 8"),
        ({"norm_groups": 16, "channel_multipliers": (2, 4)}, "does not divide a width of 8 channels"),
        (
            {"attention_resolutions": (16, 4)},
            r"attention_resolutions \[16\] never occur: the levels are \[8, 4\] high",
        ),
        ({"dropout": 1.0}, r"dropout must lie in \[0, 1\)"),
        ({"channel_multipliers": ()}, "at least one level"),
        ({"channel_multipliers": (1, 0)}, "channel_multipliers must be at least 1"),
        ({"num_res_blocks": 0}, "num_res_blocks must be at least 1"),
        ({"block_size": 0}, "block_size must be at least 1, got 0"),
        ({"num_classes": 0}, "num_classes must be at least 1, got 0"),
        ({"num_heads": 0}, "num_heads must be at least 1, got 0"),
        ({"head_channels": -1}, "head_channels must be at least 1, got -1"),
        (
            {"block_size": 8},
            "image_size 8 cannot be cut into blocks of 8 and halved 1 times: make it a multiple of 16",
        ),
        ({"block_size": 4}, r"attention_resolutions \[4\] never occur: the levels are \[2, 1\] high"),
        ({"num_heads": 2, "head_channels": 4}, "num_heads 2 and head_channels 4 both say .*give one of them"),
        (
            {"num_heads": 3},
            "num_heads 3 does not divide a width of 16 channels that has attention: set num_heads",
        ),
        ({"num_heads": 3, "attention_resolutions": ()}, "num_heads 3 does not divide a width of 16"),
        ({"head_channels": 6}, "head_channels 6 does not divide a width of 16 channels .*e.g. 2, or change"),
        (
            {
                "base_channels": 4,
                "norm_groups": 2,
                "profile": Profile.DIFFUSERS,
                "channel_multipliers": (1, 3),
            },
            "head_channels 8, the default of diffusers, does not divide a width of 12 channels",
        ),
        (
            {"base_channels": 6, "norm_groups": 2, "profile": Profile.OPENAI, "channel_multipliers": (1, 3)},
            "num_heads 4, the default of openai, does not divide a width of 18 channels",
        ),
    ],
)
def test_impossible_configurations(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(TINY, **change)


def test_resolutions_and_widths() -> None:
    assert SMALL.widths == (32, 64, 64)
    assert SMALL.resolutions == (16, 8, 4)
    deep = replace(SMALL, block_size=2, attention_resolutions=(4,))
    assert deep.resolutions == (8, 4, 2)
    assert [deep.attends(level) for level in range(3)] == [False, True, False]


def test_heads() -> None:
    assert [replace(SMALL, profile=profile).heads(64) for profile in Profile] == [1, 4, 8]
    assert replace(SMALL, num_heads=2).heads(64) == 2
    assert replace(SMALL, head_channels=16).heads(64) == 4
    assert replace(SMALL, profile=Profile.DIFFUSERS, num_heads=2).heads(64) == 2
    assert replace(SMALL, profile=Profile.OPENAI, head_channels=32).heads(64) == 2


def test_profiles_are_data() -> None:
    assert set(CONVENTIONS) == set(Profile)
    assert replace(SMALL, profile=Profile("openai")).conventions is CONVENTIONS[Profile.OPENAI]
