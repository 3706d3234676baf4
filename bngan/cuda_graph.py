"""The iteration captured once as a CUDA graph and replayed: a GPU then waits for one launch, not for one of each kernel."""

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
        device: on which it runs.
    """

    def __init__(self, iteration: Iteration, device: torch.device) -> None:
        self._iteration = iteration
        # Two, for one that a failed capture has left may be of no more use.
        self._rng, self._captured_rng = torch.Generator(device), torch.Generator(device)
        self._calls = 0
        self._graph: torch.cuda.CUDAGraph | None = None
        self._inputs: tuple[Tensor, Tensor] | None = None
        self._observed: Observed | None = None

    def __call__(self, real_images: Tensor, schedule: Tensor, seed: int) -> Observed:
        """Train as Iteration does, on images (n_critic * N, C, H, W), the schedule's values (4,) and draws from a seed."""
        self._calls += 1
        if self._calls == EAGER_BEFORE_CAPTURE + 1:
            self._capture(real_images, schedule)
        if self._graph is None or self._inputs is None or self._observed is None:
            return self._run_eagerly(real_images, schedule, seed)
        for own, given in zip(self._inputs, (real_images, schedule), strict=True):
            own.copy_(given)
        self._captured_rng.manual_seed(seed)
        self._graph.replay()
        return self._observed

    def _run_eagerly(self, real_images: Tensor, schedule: Tensor, seed: int) -> Observed:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            observed = self._iteration(real_images, Schedule(*schedule), self._rng.manual_seed(seed))
        torch.cuda.current_stream().wait_stream(side)
        return observed

    def _capture(self, real_images: Tensor, schedule: Tensor) -> None:
        graph, inputs = torch.cuda.CUDAGraph(), (real_images.clone(), schedule.clone())
        graph.register_generator_state(self._captured_rng)
        try:
            # The outer block goes back to this stream also where a capture fails. Other threads, such as NCCL's watchdog, may
            # call CUDA meanwhile.
            with torch.cuda.stream(torch.cuda.current_stream()), torch.cuda.graph(graph, capture_error_mode="thread_local"):
                self._observed = self._iteration(inputs[0], Schedule(*inputs[1]), self._captured_rng)
        except RuntimeError as error:
            reason = str(error).strip().partition("\n")[0]
            print0(f"This training cannot be captured as a CUDA graph, so it runs eagerly ({reason}).")
        else:
            self._graph, self._inputs = graph, inputs
