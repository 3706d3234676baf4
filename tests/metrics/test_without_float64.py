"""On a device without float64, as Apple's is, samples are measured all the same: a stand-in for it, on the processor."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from bngan.batchnorm.layers import ReferenceBatchNorm
from bngan.batchnorm.statistics import set_precise_statistics
from bngan.metrics.features import load_feature_net
from bngan.metrics.sample_metrics import SampleMetrics

MPS, CPU = torch.device("mps"), torch.device("cpu")


class WithoutFloat64(TorchFunctionMode):
    """Marks tensors that would lie on the device `mps`, and what is computed from them, and refuses float64 there."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.device:
            return func(*args, **kwargs)
        given = [*args, *kwargs.values()]
        here = any(hasattr(item, "on_mps") for part in given for item in (part if isinstance(part, list | tuple) else (part,)))
        devices = [item for item in given if isinstance(item, torch.device)]
        on_cpu = [CPU if isinstance(item, torch.device) else item for item in args]
        result = func(*on_cpu, **{name: CPU if isinstance(item, torch.device) else item for name, item in kwargs.items()})
        if func in (Tensor.to, Tensor.cpu):
            result = result.detach()  # another tensor, where torch returns the same one
        if MPS in devices or (here and CPU not in devices and func is not Tensor.cpu):
            mark(result)
        return result


def mark(result: Any) -> None:
    for tensor in result if isinstance(result, list | tuple) else (result,):
        if isinstance(tensor, Tensor):
            if tensor.dtype == torch.float64:
                raise TypeError("MPS has no float64")
            tensor.on_mps = True  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize("name", ["digits", "random"])
def test_samples_are_measured_with_the_values_of_a_processor(name: str) -> None:
    real, fake = 2 * torch.rand(2, 40, 1, 28, 28) - 1
    found = []
    for device in (CPU, MPS):
        with WithoutFloat64():
            metrics = SampleMetrics(load_feature_net(name), (1, 28, 28), device)
            metrics.set_real([real])
            found.append(metrics.measure([fake]))
            found.append({"probe": metrics.net.probe(real[:5].to(device)).tolist()})
    assert found[0] == pytest.approx(found[2], rel=1e-6, abs=1e-9)
    assert found[1]["probe"] == pytest.approx(found[3]["probe"], rel=1e-6)


def test_precise_statistics_are_those_of_a_processor() -> None:
    batches, found = torch.randn(3, 20, 4), []
    for device in (CPU, MPS):
        layer = ReferenceBatchNorm(4, eps=1e-5, momentum=0.1)
        with WithoutFloat64():
            set_precise_statistics(layer.to(device), [batch.to(device) for batch in batches])
        found.append(layer.running_var)
    assert torch.equal(*found)
    torch.testing.assert_close(found[0], batches.flatten(end_dim=1).var(dim=0))


def test_stand_in_refuses_what_the_device_would() -> None:
    with WithoutFloat64():
        there = torch.zeros(3).to(MPS)
        with pytest.raises(TypeError, match="no float64"):
            (there + 1).double()
        with pytest.raises(TypeError, match="no float64"):
            torch.zeros(3, dtype=torch.float64).to(MPS)
        assert there.cpu().double().dtype == torch.zeros(3).double().dtype == torch.float64
