"""The quick way to step is torch's, to the last bit."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from bngan.adam import Adam
from bngan.networks import Discriminator


def weights(seed: int = 0) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in ((30, 20), (20,), (1, 5, 3, 3))]


def give_gradients(parameters: list[nn.Parameter], step: int) -> None:
    generator = torch.Generator().manual_seed(1000 + step)
    for parameter in parameters:
        parameter.grad = torch.randn(parameter.shape, generator=generator)


def trained(step: Callable[[Any], object], optimizer: torch.optim.Optimizer, steps: range) -> None:
    for number in steps:
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 / (1 + number)
        give_gradients(optimizer.param_groups[0]["params"], number)
        step(optimizer)


def plain(parameters: list[nn.Parameter], beta1: float) -> torch.optim.Adam:
    return torch.optim.Adam(parameters, lr=1e-2, betas=(beta1, 0.99), fused=True)


@pytest.mark.parametrize("beta1", [0.0, 0.5])
def test_update_is_torchs_step_whatever_the_learning_rate_becomes(beta1: float) -> None:
    ours, theirs = weights(), weights()
    quick, known = Adam(ours, lr=1e-2, betas=(beta1, 0.99)), plain(theirs, beta1)
    trained(Adam.update, quick, range(6))
    trained(torch.optim.Adam.step, known, range(6))
    assert all(torch.equal(own, other) for own, other in zip(ours, theirs, strict=True))
    trained(torch.optim.Adam.step, quick, range(6, 8))  # the two ways mix
    trained(Adam.update, quick, range(8, 10))
    trained(torch.optim.Adam.step, known, range(6, 10))
    assert all(torch.equal(own, other) for own, other in zip(ours, theirs, strict=True))
    assert not torch.equal(ours[0], weights()[0])
    state = zip(quick.state_dict()["state"].values(), known.state_dict()["state"].values(), strict=True)
    assert all(torch.equal(own[name], other[name]) for own, other in state for name in other)


def test_update_goes_on_from_the_state_that_a_checkpoint_brings() -> None:
    first = weights()
    before = Adam(first, lr=1e-2, betas=(0.5, 0.99))
    trained(Adam.update, before, range(3))
    then, state = [parameter.detach().clone() for parameter in first], copy.deepcopy(before.state_dict())
    trained(Adam.update, before, range(3, 6))

    second = [nn.Parameter(value) for value in then]
    after = Adam(second, lr=1e-2, betas=(0.5, 0.99))
    untouched = [nn.Parameter(value.clone()) for value in then]
    trained(Adam.update, after, range(2))  # it has lists of its own by now
    with torch.no_grad():
        for parameter, value in zip(second, untouched, strict=True):
            parameter.copy_(value)
    after.load_state_dict(state)
    trained(Adam.update, after, range(3, 6))
    assert all(torch.equal(own, other) for own, other in zip(first, second, strict=True))


def test_weight_without_a_gradient_stays() -> None:
    parameters = weights()
    optimizer = Adam(parameters, lr=1e-2, betas=(0.5, 0.99))
    trained(Adam.update, optimizer, range(2))
    before = [parameter.detach().clone() for parameter in parameters]
    give_gradients(parameters, 2)
    parameters[1].grad = None
    optimizer.update()
    assert [torch.equal(own, value) for own, value in zip(parameters, before, strict=True)] == [False, True, False]


def test_update_asks_nobody_and_step_does() -> None:
    asked: list[bool] = []
    optimizer = Adam(Discriminator().parameters(), lr=1e-2, betas=(0.5, 0.99))
    optimizer.register_step_pre_hook(lambda *_: asked.append(True))
    trained(torch.optim.Adam.step, optimizer, range(2))
    assert len(asked) == 2
    trained(Adam.update, optimizer, range(2, 4))
    assert len(asked) == 2
