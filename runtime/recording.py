"""Work that is the same every time, recorded once on a GPU and replayed: one launch instead of hundreds."""

from collections.abc import Callable

import torch


class Recorded:
    """A function without arguments whose tensors keep shape and place, so that CUDA can replay it as one graph.

    The first call runs it, which warms it up, and records it. Every later call replays the recording. On other devices
    every call runs it.
    """

    def __init__(self, function: Callable[[], None], device: torch.device) -> None:
        """Record nothing yet."""
        self.function = function
        self.device = device
        self.replay: Callable[[], None] | None = None

    def __call__(self) -> None:
        """Run or replay the function."""
        if self.replay is not None:
            self.replay()
            return
        self.function()
        if self.device.type == "cuda":
            self.replay = self.record()

    def record(self) -> Callable[[], None]:
        """What replays the function; recording it computes nothing."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.function()
        return graph.replay
