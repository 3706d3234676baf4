"""Trains tiny GANs in several precisions on one or more processes and writes what came out: run by test_precision.py.

    python -m tests.integration.precisions DEVICES FOLDER CASES

CASES is a JSON list of the GANs' settings, each with `precision`, and `count` where messages between ranks are counted.
"""

from collections import Counter
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, Trainer, seed_everything
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from bngan import GAN
from tests.integration.ranks import fit, main

BATCH = 16
ITERATIONS = 2
# Adam's first steps are that large whatever the gradient, so rounding that turns a gradient's sign moves a weight by twice it.
LR = 1e-4
# Iterations whose messages are counted, after some in which DDP may still set itself up.
COUNTED = range(3, 6)


class Watch(Callback):
    """Notes the weights at the start, the dtypes that batch norm layers are given, and the messages between ranks."""

    def __init__(self, *, count: bool) -> None:
        self.before: dict[str, Tensor] = {}
        self.seen: set[str] = set()
        self.messages: Counter[str] = Counter()
        self.profile = profile(activities=[ProfilerActivity.CPU]) if count else None

    def on_train_start(self, trainer: Trainer, pl_module: GAN) -> None:
        self.before = {name: value.detach().clone() for name, value in pl_module.named_parameters()}
        for _, layer in pl_module.batch_norms():
            layer.register_forward_pre_hook(lambda _, inputs: self.seen.add(str(inputs[0].dtype)))

    def on_train_batch_start(self, trainer: Trainer, pl_module: GAN, batch: object, batch_idx: int) -> None:
        if self.profile is None:
            return
        if batch_idx == COUNTED.start:
            self.profile.start()
        elif batch_idx == COUNTED.stop:
            self.profile.stop()
            for event in self.profile.key_averages():
                if event.key.startswith("c10d::"):
                    self.messages[event.key] += event.count


def train(devices: int, folder: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """Return what one case came to on this rank."""
    precision, count = settings.pop("precision"), settings.pop("count", False)
    seed_everything(0, verbose=False)
    small = {"image_shape": (1, 4, 4), "latent_dim": 8, "hidden_dim": 8}
    gan = GAN(**{**small, "instance_noise": 0.1, "lr_decay_start": 1.0, "g_lr": LR, "d_lr": LR, **settings})
    watch = Watch(count=count)
    steps = COUNTED.stop + 1 if count else ITERATIONS
    fit(gan, devices, folder, watch, precision=precision, batch=BATCH, steps=steps, synchronized=True)
    after = dict(gan.named_parameters())
    assert gan.observed is not None
    return {
        "losses": [float(gan.observed.d_loss), float(gan.observed.g_loss)],
        "unmoved": [
            name for name, value in watch.before.items() if not name.startswith("generator_ema") and value.equal(after[name])
        ],
        "state": gan.state_dict(),
        "seen": sorted(watch.seen),
        "messages": dict(watch.messages),
    }


if __name__ == "__main__":
    main(train)
