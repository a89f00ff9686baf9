"""Weights for inference, and weights in and out of the formats of other code bases."""

from trainer.weights.inference import Loaded, assemble, load_for_inference

__all__ = ["Loaded", "assemble", "load_for_inference"]
