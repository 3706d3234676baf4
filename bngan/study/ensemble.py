"""How are many runs trained as one? By one iteration over their stacked weights, for a GPU that a single run leaves idle."""

import copy
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state, vmap

from bngan import rng
from bngan.batchnorm.statistics import AlsoRunning
from bngan.checkpoint import save_gan
from bngan.cuda_graph import CudaGraph
from bngan.gan import GAN
from bngan.iteration import Draws, Iteration, Observed
from bngan.networks import needs_reference
from bngan.schedules import Schedule, schedule_at
from bngan.settings import Settings

Images = Callable[[int], Tensor]
FRACTION_OF_MEMORY = 0.8  # of what is free, for libraries want some too, and not every iteration needs as much


class Ensemble:
    """R runs of one structure, each of which ends where it would by itself: seeds, rates and noise are their own.

    What dropout and the noisy norm draw is not what a run by itself draws; each run has draws of its own all the same. A run
    that diverges leaves the others as they are.

    Args:
        gans: of one `structure`, as they start, on the device and in the precision in which they are trained.
        total: iterations of the whole training, which the schedules follow.
        momenta: for which G's running statistics are kept beside its own; see AlsoRunning.

    Attributes:
        gan: one GAN whose weights and buffers are those of all, stacked: (R, ...).
        done: iterations done.
        also: G's running statistics of other momenta, stacked.

    Raises:
        ValueError: if the runs differ in more than an ensemble's may.
    """

    def __init__(self, gans: Sequence[GAN], total: int, momenta: Sequence[float] = ()) -> None:
        self.settings = [gan.settings for gan in gans]
        if len({structure(settings) for settings in self.settings}) != 1:
            raise ValueError("an ensemble's runs differ in seeds and in what the schedule holds alone; see structure")
        self.gan, self.total, self.done = stack(gans), total, 0
        self.also = [AlsoRunning(self.gan.generator, momentum) for momentum in momenta]
        first = self.settings[0]
        self._d_update, self._g_update = (
            Adam([*network.parameters()], len(gans), (first.beta1, first.beta2), clip)
            for network, clip in ((self.gan.discriminator, first.d_clip), (self.gan.generator, first.g_clip))
        )
        iteration, device = self._build_iteration(), self._weight.device
        self._graph = CudaGraph(iteration, device, len(gans)) if first.cuda_graph and device.type == "cuda" else None
        self._run, self._draws = iteration, Draws(device, len(gans))

    def _build_iteration(self) -> Iteration:
        single = self.gan.build_iteration(self._d_update, self._g_update)
        generator = over_runs(self.gan.generator, single.generator)
        for also in self.also:
            generator = also.following(generator)
        noise = single.instance_noise
        return replace(
            single,
            generator=generator,
            discriminator=over_runs(self.gan.discriminator, single.discriminator),
            instance_noise=None if noise is None else noise.view(-1, 1, 1, 1),
        )

    def train(self, images: Images, until: int, labels: Images | None = None) -> Observed | None:
        """Train on until so many iterations are done, and return what the last of them saw.

        Args:
            images: by the number of iterations done before, the images (n_critic * N, R, C, H, W) in [-1, 1] of the next.
            until: how many iterations are then done in all.
            labels: likewise the classes (n_critic * N, R) of these images; None where the GANs have no classes.
        """
        observed = None
        for done in range(self.done, until):
            batch, classes = images(done), None if labels is None else labels(done)
            if done == self.done == 0:
                self._begin(batch)
            schedules = [schedule_at(settings, done, self.total) for settings in self.settings]
            schedule = torch.tensor(schedules, dtype=torch.float64).T.to(self._weight)  # (4, R)
            seeds = [rng.key(settings.seed, rng.Stream.ITERATION, done) for settings in self.settings]
            self.gan.seed_layers(done)
            if self._graph is not None:
                observed = self._graph(batch, schedule, *seeds, labels=classes)
            else:
                observed = self._run(batch, Schedule(*schedule), self._draws.seeded(*seeds), classes)
            self.gan.iteration.add_(1)
            self.done = done + 1
        return observed

    def _begin(self, images: Tensor) -> None:
        """Take on what the first images tell."""
        size = len(images) // self.settings[0].n_critic
        self.gan.check_batch(size)
        self.gan.normalized_together.fill_(size)
        if needs_reference(self.gan.discriminator):
            reference = self.gan.discriminator.reference
            assert isinstance(reference, Tensor)  # (R, rows, ...)
            reference.copy_(images[: reference.shape[1]].transpose(0, 1).reshape(reference.shape))

    @property
    def failed(self) -> Tensor:
        """Which runs (R,) have weights or running statistics that are not finite."""
        values = (value for name, value in self.gan.state_dict().items() if not name.endswith("reference"))
        finite = [value.flatten(start_dim=1).isfinite().all(dim=1) for value in values if value.ndim > 1]
        return ~torch.stack(finite).all(dim=0)

    def member(self, run: int) -> GAN:
        """Return a run as a GAN of its own, with copies of its weights, buffers and average, as far as it has come."""
        with torch.random.fork_rng(devices=[]):  # the weights that are drawn are replaced at once
            gan = GAN(**asdict(self.settings[run])).to(self._weight.device, self._weight.dtype)
        gan.load_state_dict({name: value[run] for name, value in self.gan.state_dict().items()})
        return gan

    def save_member(self, run: int, path: Path, data: dict[str, Any] | None = None) -> None:
        """Write a run as a checkpoint like any other; see bngan.checkpoint.save_gan."""
        save_gan(self.member(run), path, self.total, data)

    def state_dict(self) -> dict[str, Any]:
        """Return all that training goes on from."""
        return {
            "done": self.done,
            "gan": self.gan.state_dict(),
            "adam": [update.state for update in (self._d_update, self._g_update)],
            "also": [also.statistics for also in self.also],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state of an ensemble of the same runs."""
        self.done = state["done"]
        self.gan.load_state_dict(state["gan"])
        tensors = [*self._d_update.state, *self._g_update.state, *(value for also in self.also for value in also.statistics)]
        saved = [value for part in (*state["adam"], *state["also"]) for value in part]
        for tensor, value in zip(tensors, saved, strict=True):
            tensor.copy_(value)

    @property
    def _weight(self) -> Tensor:
        """One of the weights, whose device and dtype are those of all."""
        return next(self.gan.parameters())


class Adam:
    """Adam for stacked weights (R, ...), each run with its rate and its gradient's norm (Kingma & Ba 2015, algorithm 1).

    Args:
        parameters: the weights; those that are frozen stay as they are.
        runs: how many runs R.
        betas: decay of the gradient's mean and of its square.
        clip: largest norm of each run's gradient; None means no limit.
        eps: added to the root of the mean square.
    """

    def __init__(
        self, parameters: Sequence[Tensor], runs: int, betas: tuple[float, float], clip: float | None, eps: float = 1e-8
    ) -> None:
        self._parameters = [parameter for parameter in parameters if parameter.requires_grad]
        self._runs, self._betas, self._clip, self._eps = runs, betas, clip, eps
        self._means, self._squares = ([torch.zeros_like(parameter) for parameter in self._parameters] for _ in range(2))
        self._steps = torch.zeros((), dtype=torch.float64, device=self._parameters[0].device)

    @property
    def state(self) -> list[Tensor]:
        """What the next step depends on: steps done, and the gradients' moments."""
        return [self._steps, *self._means, *self._squares]

    def __call__(self, loss: Tensor, lr: Tensor) -> Tensor:
        """Take one step of learning rates `lr` (R,) against a loss, the mean over runs; return the gradients' norms (R,)."""
        gradients = torch.autograd.grad(loss * self._runs, self._parameters)  # each run's as if it were alone
        norms = torch.stack([gradient.flatten(start_dim=1).square().sum(dim=1) for gradient in gradients]).sum(dim=0).sqrt()
        if self._clip is not None:
            scale = (self._clip / (norms + 1e-6)).clamp(max=1.0)
            gradients = tuple(gradient * _along(scale, gradient) for gradient in gradients)
        self._step(gradients, lr)
        return norms

    @torch.no_grad()
    def _step(self, gradients: Sequence[Tensor], lr: Tensor) -> None:
        beta1, beta2 = self._betas
        self._steps.add_(1)
        rates, correction = lr / (1 - beta1**self._steps), (1 - beta2**self._steps).sqrt()
        for weight, gradient, mean, square in zip(self._parameters, gradients, self._means, self._squares, strict=True):
            mean.lerp_(gradient, 1 - beta1)
            square.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
            weight.sub_(_along(rates, weight) * mean / ((square.sqrt() / correction) + self._eps))


class _Call(nn.Module):
    """A function of a network as the call of a module, which is all that functional_call knows."""

    def __init__(self, network: nn.Module, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.network, self.function = network, function

    def forward(self, *batches: Tensor) -> Tensor:
        return self.function(*batches)


def over_runs(network: nn.Module, function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Return the function of batches (N, R, ...) that for each run is `function` with that run's part of the network's tensors.

    Args:
        network: its weights and buffers are stacked (R, ...).
        function: of batches (N, ...), by that network: of images, say, and of labels.
    """
    module = _Call(network, function)
    tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    run = vmap(partial(functional_call, module), in_dims=(0, 1), out_dims=1, randomness="different")
    return lambda *batches: run(tensors, batches)


def stack(gans: Sequence[GAN]) -> GAN:
    """Return a GAN of the first one's settings whose weights and buffers are those of all, stacked: (R, ...)."""
    stacked = copy.deepcopy(gans[0])
    parameters, buffers = stack_module_state([*gans])
    for name, value in [*parameters.items(), *buffers.items()]:
        owner, _, own = name.rpartition(".")
        tensor = nn.Parameter(value.detach(), requires_grad=value.requires_grad) if name in parameters else value
        setattr(stacked.get_submodule(owner), own, tensor)
    return stacked


def structure(settings: Settings) -> Settings:
    """Return what the settings of an ensemble's runs must have in common: all but seeds and numbers that the schedule holds."""
    noisy, averaged = float(settings.instance_noise > 0), 0.5 * (settings.ema_decay > 0)
    free = {"seed": 0, "g_lr": 1.0, "d_lr": 1.0, "lr_decay_start": 1.0, "instance_noise_end": 1.0}
    return replace(settings, instance_noise=noisy, ema_decay=averaged, **free)


def chunk_size(free: int, bytes_a_run: int) -> int:
    """Return how many runs fit into `free` bytes of memory at once, 1 at least."""
    return max(1, int(FRACTION_OF_MEMORY * free) // bytes_a_run)


def _along(values: Tensor, tensor: Tensor) -> Tensor:
    """Return values (R,) so that they go with a tensor (R, ...)."""
    return values.reshape(-1, *[1] * (tensor.ndim - 1))
