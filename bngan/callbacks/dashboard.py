"""TensorBoard's frame: the settings with the metric they are judged by, and charts that show G beside D."""

from typing import Any, cast

from lightning.pytorch import Callback, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from torch.utils.tensorboard.summary import hparams

from bngan.gan import GAN

METRIC = "val/fid"
CHARTED = ("fid", "precision", "recall", "coverage", "class_kl")


class Dashboard(Callback):
    """Writes the hyperparameters and the layout of the custom scalars, once, when training starts."""

    def on_train_start(self, trainer: Trainer, pl_module: GAN) -> None:
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger) and trainer.is_global_zero:
                writer = logger.experiment
                settings = {
                    name: value if isinstance(value, bool | int | float | str) else str(value)
                    for name, value in {**pl_module.hparams, **getattr(cast(Any, trainer).datamodule, "hparams", {})}.items()
                }
                # The metric is only named here; its values come with each validation.
                for summary in hparams(settings, {METRIC: 0.0}):
                    writer._get_file_writer().add_summary(summary)
                writer.add_custom_scalars(_layout(pl_module))


def _layout(gan: GAN) -> dict[str, dict[str, list]]:
    def together(*tags: str) -> list:
        return ["Multiline", [f"^{tag}$" for tag in tags]]

    layout = {
        "G and D": {
            "losses": together("train/d_loss", "train/g_loss"),
            "D's probability of real": together("train/d_real", "train/d_fake"),
            "gradient norms": together("train/d_grad_norm", "train/g_grad_norm"),
        },
    }
    layout["Quality"] = {
        name: together(f"val/{name}", f"floor/{name}", f"dropped/{name}", f"blurred/{name}") for name in CHARTED
    }
    names = [name for name, _ in gan.batch_norms()]
    if names:
        layout["Batch norm, G and D"] = {
            "batch against running statistics (KL, nats)": together(*(f"bn/{name}/divergence" for name in names)),
            "running mean, over channels": together(*(f"bn/{name}/running_mean/mean" for name in names)),
            "running variance, over channels": together(*(f"bn/{name}/running_var/mean" for name in names)),
        }
    return layout
