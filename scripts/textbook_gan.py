"""A GAN in Lightning as tutorials write it, of the same networks: the other end of the scale for `bngan fit`.

    python scripts/textbook_gan.py --data_root data
    python scripts/textbook_gan.py --data_root data --network conv --hidden_dim 32 --batch 64

A DataLoader over PIL images with ToTensor and Normalize, a worker for every second core, both optimizers toggled, G run
anew for each update, real and fake images passed through D apart, cross-entropy on probabilities, every loss logged at every
step, a grid of samples each epoch, and a Trainer as it comes, with progress bar, TensorBoard and checkpoints.
The last line is JSON: images_per_s of the iterations after the warm-up.
"""

import argparse
import json
import os
import time
from pathlib import Path

import torch
import torchvision
from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.datasets import MNIST

from bngan.networks import ConvDiscriminator, ConvGenerator, Discriminator, Generator


class TextbookGAN(LightningModule):
    """Two networks, two optimizers, cross-entropy; `marks` are the times at which training steps began."""

    def __init__(self, generator: nn.Module, discriminator: nn.Module, latent_dim: int = 100) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.latent_dim = latent_dim
        self.generator, self.discriminator = generator, discriminator
        self.validation_z = torch.randn(8, latent_dim)
        self.marks: list[float] = []

    def forward(self, z: Tensor) -> Tensor:
        """Map latents (N, latent_dim) to images (N, 784) or (N, 1, 28, 28)."""
        return self.generator(z)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> None:
        """Update G, then D, on images (N, 1, 28, 28) and labels."""
        self.marks.append(time.perf_counter())
        images, _ = batch
        g_optimizer, d_optimizer = self.optimizers()  # pyright: ignore[reportGeneralTypeIssues]
        z = torch.randn(len(images), self.latent_dim).type_as(images)
        valid = torch.ones(len(images), 1).type_as(images)
        fake = torch.zeros(len(images), 1).type_as(images)

        self.toggle_optimizer(g_optimizer)
        g_loss = F.binary_cross_entropy(self.discriminator(self(z)), valid)
        self.manual_backward(g_loss)
        g_optimizer.step()
        g_optimizer.zero_grad()
        self.untoggle_optimizer(g_optimizer)

        self.toggle_optimizer(d_optimizer)
        real_loss = F.binary_cross_entropy(self.discriminator(images), valid)
        fake_loss = F.binary_cross_entropy(self.discriminator(self(z).detach()), fake)
        d_loss = (real_loss + fake_loss) / 2
        self.manual_backward(d_loss)
        d_optimizer.step()
        d_optimizer.zero_grad()
        self.untoggle_optimizer(d_optimizer)
        self.log_dict({"g_loss": g_loss, "d_loss": d_loss}, prog_bar=True)

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        """Return Adam for G and Adam for D, as DCGAN's authors set them."""
        return [torch.optim.Adam(net.parameters(), lr=2e-4, betas=(0.5, 0.999)) for net in (self.generator, self.discriminator)]

    def on_train_epoch_end(self) -> None:
        """Show what G draws."""
        samples = self(self.validation_z.type_as(next(self.generator.parameters())))
        grid = torchvision.utils.make_grid(samples.view(-1, 1, 28, 28))
        assert isinstance(self.logger, TensorBoardLogger)
        self.logger.experiment.add_image("generated_images", grid, self.current_epoch)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_root", type=Path, required=True, help="folder that holds MNIST")
    parser.add_argument("--network", choices=("mlp", "conv"), default="mlp")
    parser.add_argument("--hidden_dim", type=int, default=128)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--iterations", type=int, default=1000)
    parser.add_argument("--warm_up", type=int, default=100, help="iterations that are not timed")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    args = parser.parse_args()

    seed_everything(0)
    if args.network == "conv":
        gan = TextbookGAN(ConvGenerator(width=args.hidden_dim), ConvDiscriminator(width=args.hidden_dim))
    else:
        gan = TextbookGAN(Generator(hidden_dim=args.hidden_dim), Discriminator(hidden_dim=args.hidden_dim))
    transform = transforms.Compose([transforms.ToTensor(), transforms.Normalize((0.5,), (0.5,))])
    loader = DataLoader(
        MNIST(str(args.data_root), train=True, transform=transform),
        batch_size=args.batch,
        shuffle=True,
        drop_last=True,
        num_workers=(os.cpu_count() or 1) // 2,
    )
    # Lightning counts the steps of both optimizers.
    Trainer(accelerator=args.device, devices=1, max_epochs=-1, max_steps=2 * args.iterations).fit(gan, loader)
    seconds = gan.marks[-1] - gan.marks[args.warm_up]
    print(json.dumps({"images_per_s": (args.iterations - args.warm_up - 1) * args.batch / seconds}))


if __name__ == "__main__":
    main()
