"""The iteration captured once as a CUDA graph and replayed: a GPU then waits for one launch, not for one of each kernel."""

import torch
from torch import Tensor

from bngan.distributed import print0
from bngan.iteration import Draws, Iteration, Observed
from bngan.schedules import Schedule

Inputs = tuple[Tensor, Tensor, Tensor | None]  # images, schedule, labels
EAGER_BEFORE_CAPTURE = 3  # iterations in which optimizers and libraries set up what a capture may not


class CudaGraph:
    """An iteration whose fourth call is captured and, like all that follow, replayed.

    Between replays the same iteration may run eagerly, on the same weights. One that cannot be captured runs eagerly, which is
    said in a line.

    Args:
        iteration: what to capture.
        device: on which it runs.
        runs: how many runs it trains at once; None means a single one.
    """

    def __init__(self, iteration: Iteration, device: torch.device, runs: int | None = None) -> None:
        self._iteration = iteration
        # Two, for one that a failed capture has left may be of no more use.
        self._draws, self._captured_draws = Draws(device, runs), Draws(device, runs)
        self._calls = 0
        self._graph: torch.cuda.CUDAGraph | None = None
        self._inputs: Inputs | None = None
        self._observed: Observed | None = None

    def __call__(self, real_images: Tensor, schedule: Tensor, *seeds: int, labels: Tensor | None = None) -> Observed:
        """Train as Iteration does, on images (n_critic * N, C, H, W), the schedule's values (4,) and draws from a seed.

        Labels are (n_critic * N,), for a GAN without classes None. Of many runs these are images (n_critic * N, R, C, H, W),
        values (4, R), R seeds, and labels (n_critic * N, R).
        """
        given = real_images, schedule, labels
        self._calls += 1
        if self._calls == EAGER_BEFORE_CAPTURE + 1:
            self._capture(given)
        if self._graph is None or self._inputs is None or self._observed is None:
            return self._run_eagerly(given, *seeds)
        for own, value in zip(self._inputs, given, strict=True):
            if own is not None and value is not None:
                own.copy_(value)
        self._captured_draws.seeded(*seeds)
        self._graph.replay()
        return self._observed

    def _run_eagerly(self, given: Inputs, *seeds: int) -> Observed:
        real_images, schedule, labels = given
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            observed = self._iteration(real_images, Schedule(*schedule), self._draws.seeded(*seeds), labels)
        torch.cuda.current_stream().wait_stream(side)
        return observed

    def _capture(self, given: Inputs) -> None:
        graph, (real_images, schedule, labels) = torch.cuda.CUDAGraph(), given
        inputs = real_images.clone(), schedule.clone(), None if labels is None else labels.clone()
        for generator in self._captured_draws.generators:
            graph.register_generator_state(generator)
        try:
            # The outer block goes back to this stream also where a capture fails. Other threads, such as NCCL's watchdog, may
            # call CUDA meanwhile.
            with torch.cuda.stream(torch.cuda.current_stream()), torch.cuda.graph(graph, capture_error_mode="thread_local"):
                self._observed = self._iteration(inputs[0], Schedule(*inputs[1]), self._captured_draws, inputs[2])
        except RuntimeError as error:
            reason = str(error).strip().partition("\n")[0]
            print0(f"This training cannot be captured as a CUDA graph, so it runs eagerly ({reason}).")
        else:
            self._graph, self._inputs = graph, inputs
