"""The data rooms: pictures -> indexed WebDataset shards in any storage -> batches in a reproducible order."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from data_pipeline.stream import ImageStream

__all__ = ["ImageStream"]


def __getattr__(name: str) -> Any:
    # Lazy (PEP 562): the pure rooms must be importable without storage and decoders.
    if name == "ImageStream":
        from data_pipeline.stream import ImageStream

        return ImageStream
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
