"""The pinned classifier whose features measure digits."""

import hashlib
from pathlib import Path

import torch
from safetensors.torch import load
from torch import Tensor, nn
from torch.nn import functional as F

from bngan.errors import UsageError

WEIGHTS = Path(__file__).parent / "digit_net.safetensors"
SHA256 = "f06e33cdef82befef01970416b9e06b60e123ab519b2fd528cec56b78c5990db"


class DigitNet(nn.Module):
    """Convolutional classifier of 28 x 28 grey digits: features for FID and its kin, logits for counting modes.

    It has neither batch norm nor dropout at evaluation, so an image's features depend on that image alone.
    """

    num_features = 64
    num_classes = 10

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 32, kernel_size=5, stride=2, padding=2)
        self.conv2 = nn.Conv2d(32, 48, kernel_size=3, padding=1)
        self.conv3 = nn.Conv2d(48, 64, kernel_size=3, padding=1)
        self.embed = nn.Linear(64 * 3 * 3, self.num_features)
        self.classify = nn.Linear(self.num_features, self.num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Map images (N, 1, 28, 28) in [-1, 1] to features (N, 64).

        Raises:
            UsageError: if the images have another shape, as a data set may that --metrics.feature does not go with.
        """
        if images.ndim != 4 or images.shape[1:] != (1, 28, 28):
            raise UsageError(
                f"the digit net takes images of shape (N, 1, 28, 28), not {tuple(images.shape)}; for others give "
                "--metrics.feature auto, with --override where a run goes on"
            )
        x = F.relu(self.conv1(images))
        x = F.max_pool2d(F.relu(self.conv2(x)), 2)
        x = F.max_pool2d(F.relu(self.conv3(x)), 2)
        return F.relu(self.embed(x.flatten(1)))

    def logits(self, features: Tensor) -> Tensor:
        """Map features (N, 64) to class logits (N, 10)."""
        return self.classify(features)


def load_digit_net() -> DigitNet:
    """Load the pinned weights, frozen and in evaluation mode.

    Raises:
        UsageError: if the weights file does not have the recorded SHA-256.
    """
    content = WEIGHTS.read_bytes() if WEIGHTS.is_file() else b""
    found = hashlib.sha256(content).hexdigest()
    if found != SHA256:
        raise UsageError(f"{WEIGHTS} is missing or corrupt (SHA-256 {found}, expected {SHA256}); reinstall bngan")
    net = DigitNet()
    net.load_state_dict(load(content))
    # With channels last a processor is quicker.
    return net.to(memory_format=torch.channels_last).eval().requires_grad_(False)
