from typing import Any

import pytest

from data_pipeline.errors import UserError
from eval.features import EFFNETLITE0
from eval.plan import make_plan
from eval.protocol import ImageShape, ImportedFile, PictureSet, Protocol
from tests.support import tiny_recipe
from trainer.recipe_evaluation import BitsSpec, MetricName, SamplerName

OTHER: dict[str, Any] = {
    "spec": "other",
    "features": EFFNETLITE0.model_copy(update={"sha256": "1" * 64}),
    "reference": PictureSet(index_sha256="1" * 64, split="train"),
    "held_out": PictureSet(index_sha256="0" * 64, split="train"),
    "samples": 9,
    "sampler": SamplerName.ANCESTRAL,
    "steps": 3,
    "eta": 0.5,
    "ema": "raw",
    "ema_profile": {},
    "seed": 1,
    "image": ImageShape(size=16, channels=1),
    "chunk": 5,
    "feature_batch": 1,
    "splits": 10,
    "precision": "bfloat16",
    "quantisation": "round",
    "version": 2,
    "metrics": (MetricName.DISTANCE,),
    "constants": {MetricName.KERNEL: {"subsets": 1}},
    "bits": BitsSpec(),
    "reference_file": ImportedFile(kind="edm", sha256="1" * 64),
}


@pytest.fixture
def protocol() -> Protocol:
    return make_plan(tiny_recipe(), "quick", "0" * 64).protocol


def test_every_field_moves_the_hash(protocol: Protocol) -> None:
    assert set(OTHER) == set(Protocol.model_fields)
    directories = {protocol.model_copy(update={name: value}).directory for name, value in OTHER.items()}
    assert len(directories | {protocol.directory}) == len(OTHER) + 1


def test_name_and_round_trip(protocol: Protocol) -> None:
    again = Protocol.from_json(protocol.to_json(), "protocol.json")
    assert again == protocol
    assert again.directory == f"quick-{protocol.sha256[:12]}"


def test_the_hash_is_a_format() -> None:
    # Written once: folders of existing runs bear it. A change here orphans their results.
    frozen = Protocol(
        spec="quick",
        features=EFFNETLITE0,
        reference=PictureSet(index_sha256="0" * 64, split="train"),
        held_out=PictureSet(index_sha256="0" * 64, split="val"),
        samples=8,
        sampler=SamplerName.DDIM,
        steps=2,
        eta=0.0,
        ema="main",
        ema_profile={"decay": 0.9999, "per_images": 128},
        seed=0,
        image=ImageShape(size=8, channels=1),
        chunk=4,
        feature_batch=16,
        splits=1,
    )
    assert frozen.directory == "quick-cb1baf235aed"


def test_bad_specifications() -> None:
    recipe = tiny_recipe()
    with pytest.raises(UserError, match=r"evaluation\.slow: no such specification; known: quick"):
        make_plan(recipe, "slow", "0" * 64)
    with pytest.raises(UserError, match=r"evaluation\.quick\.steps=5000: .*=1000 ddim can take 1000; lower"):
        make_plan(tiny_recipe(["evaluation.quick.steps=5000"]), "quick", "0" * 64)
    solver = ["evaluation.quick.steps=1000", "evaluation.quick.sampler=unipc"]
    with pytest.raises(UserError, match=r"evaluation\.quick\.steps=1000: .* unipc can take 999; lower it"):
        make_plan(tiny_recipe(solver), "quick", "0" * 64)
    with pytest.raises(UserError, match="never downloaded silently"):
        make_plan(tiny_recipe(["evaluation.quick.features=inception"]), "quick", "0" * 64)
