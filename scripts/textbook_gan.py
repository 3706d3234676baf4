"""A GAN in Lightning as tutorials write it, of the same networks: the other end of the scale for `bngan fit`.

    python scripts/textbook_gan.py --root data --epochs 2

A DataLoader over PIL images with ToTensor and Normalize, a worker for every second core, both optimizers toggled, G run
anew for each player, real and fake images passed through D apart, cross-entropy on probabilities, every loss logged at every
step, a grid of samples each epoch, and a Trainer as it comes, with progress bar, TensorBoard and checkpoints.
"""

import os

import torch
import torchvision
from benchmark import loop_parser
from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.loggers import TensorBoardLogger
from stopwatch import Stopwatch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.datasets import MNIST

from bngan.networks import Discriminator, Generator


class TextbookGAN(LightningModule):
    """Two networks, two optimizers, cross-entropy."""

    def __init__(self, latent_dim: int = 100, lr: float = 2e-4, b1: float = 0.5, b2: float = 0.999) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.automatic_optimization = False
        self.latent_dim, self.lr, self.betas = latent_dim, lr, (b1, b2)
        self.generator = Generator(input_dim=latent_dim)
        self.discriminator = Discriminator()
        self.validation_z = torch.randn(8, latent_dim)

    def forward(self, z: Tensor) -> Tensor:
        """Map latents (N, latent_dim) to images (N, 784)."""
        return self.generator(z)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> None:
        """Update G, then D, on images (N, 1, 28, 28) and labels."""
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
        """Return Adam for G and Adam for D."""
        networks = (self.generator, self.discriminator)
        return [torch.optim.Adam(network.parameters(), lr=self.lr, betas=self.betas) for network in networks]

    def on_train_epoch_end(self) -> None:
        """Show what G draws."""
        samples = self(self.validation_z.type_as(next(self.generator.parameters())))
        grid = torchvision.utils.make_grid(samples.view(-1, 1, 28, 28))
        assert isinstance(self.logger, TensorBoardLogger)
        self.logger.experiment.add_image("generated_images", grid, self.current_epoch)


def main() -> None:
    args = loop_parser(__doc__).parse_args()

    seed_everything(0)
    transform = transforms.Compose([transforms.ToTensor(), transforms.Normalize((0.5,), (0.5,))])
    loader = DataLoader(
        MNIST(str(args.root), train=True, transform=transform),
        batch_size=args.batch,
        shuffle=True,
        drop_last=True,
        num_workers=(os.cpu_count() or 1) // 2,
    )
    trainer = Trainer(
        accelerator=args.device,
        devices=1,
        max_epochs=args.epochs,
        limit_train_batches=args.limit,
        callbacks=[Stopwatch(args.warm_up)],
    )
    trainer.fit(TextbookGAN(), loader)


if __name__ == "__main__":
    main()
