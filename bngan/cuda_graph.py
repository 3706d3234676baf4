"""The iteration captured once as a CUDA graph and replayed, so that a GPU waits for one launch and not for some 150."""

import torch
from torch import Tensor

from bngan.distributed import print0
from bngan.iteration import Iteration, Observed
from bngan.schedules import Schedule

EAGER_BEFORE_CAPTURE = 3  # iterations in which optimizers and libraries set up what a capture may not


class CudaGraph:
    """An iteration whose fourth call is captured and, like all that follow, replayed.

    Between replays the same iteration may run eagerly, on the same weights. One that cannot be captured runs eagerly, which is
    said in a line.

    Args:
        iteration: what to capture.
        rng: draws all its random numbers, and is seeded by the caller before each call.
    """

    def __init__(self, iteration: Iteration, rng: torch.Generator) -> None:
        self._iteration, self._rng = iteration, rng
        self._calls = 0
        self._graph: torch.cuda.CUDAGraph | None = None
        self._inputs: tuple[Tensor, Tensor] | None = None
        self._observed: Observed | None = None

    def __call__(self, real_images: Tensor, schedule: Tensor) -> Observed:
        """Train as Iteration does, on images (n_critic * N, C, H, W) and the schedule's values (4,)."""
        self._calls += 1
        if self._calls == EAGER_BEFORE_CAPTURE + 1:
            self._capture(real_images, schedule)
        if self._graph is None or self._inputs is None or self._observed is None:
            return self._warm_up(real_images, schedule)
        for own, given in zip(self._inputs, (real_images, schedule), strict=True):
            own.copy_(given)
        self._graph.replay()
        return self._observed

    def _warm_up(self, real_images: Tensor, schedule: Tensor) -> Observed:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            observed = self._iteration(real_images, Schedule(*schedule), self._rng)
        torch.cuda.current_stream().wait_stream(side)
        return observed

    def _capture(self, real_images: Tensor, schedule: Tensor) -> None:
        graph, inputs, seed = torch.cuda.CUDAGraph(), (real_images.clone(), schedule.clone()), self._rng.initial_seed()
        graph.register_generator_state(self._rng)
        try:
            # Other threads, such as NCCL's watchdog, may call CUDA meanwhile.
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                self._observed = self._iteration(inputs[0], Schedule(*inputs[1]), self._rng)
        except RuntimeError as error:
            reason = str(error).strip().partition("\n")[0]
            print0(f"This training cannot be captured as a CUDA graph, so it runs eagerly ({reason}).")
        else:
            self._graph, self._inputs = graph, inputs
        self._rng.manual_seed(seed)  # a capture draws nothing, but must not have moved it either
