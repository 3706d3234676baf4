"""TensorBoard's layout: the settings with the metric they are judged by, and charts that show G beside D."""

from collections.abc import Sequence

from lightning.pytorch import Callback, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from torch.utils.tensorboard.summary import hparams

from bngan.callbacks.monitor import QUALITY, measured
from bngan.gan import GAN

CHARTED = ("fid", "distance", "precision", "recall", "coverage", "class_kl", "class_precision")
BESIDE = ("floor", "dropped", "blurred", "repeated")
READINGS = {  # what a loss's readings of D are, by the name of the first
    "d_real_prob": "D's probability of real, for real and fake images",
    "d_pair_accuracy": "pairs with real above fake: fraction, and D's probability of it",
    "d_real_logit": "D's logits of real and fake images",
}

Charts = dict[str, list]
Layout = dict[str, Charts]  # of each category, by title


class TensorBoardLayout(Callback):
    """Writes the hyperparameters and the layout of the custom scalars, once, when training starts."""

    def on_train_start(self, trainer: Trainer, gan: GAN) -> None:
        names = measured(trainer, gan)
        # The metrics are only named here; their values come with each validation.
        metrics = {name: 0.0 for name in QUALITY if name in names}
        charted = [name for name in CHARTED if f"val/{name}" in names]
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger) and trainer.is_global_zero:
                data = getattr(trainer, "datamodule", None)
                for summary in hparams(_settings({**gan.hparams, **getattr(data, "hparams", {})}), metrics):
                    logger.experiment.file_writer.add_summary(summary)
                batch_norms = [name for name, _ in gan.batch_norms()]
                logger.experiment.add_custom_scalars(_layout(gan.loss.readings, charted, batch_norms))


def _settings(hyperparameters: dict[str, object]) -> dict[str, bool | int | float | str]:
    """Return the hyperparameters as values that TensorBoard takes."""
    return {
        name: value if isinstance(value, bool | int | float | str) else str(value) for name, value in hyperparameters.items()
    }


def _layout(readings: Sequence[str], metrics: Sequence[str], batch_norms: Sequence[str]) -> Layout:
    """Return the charts of a GAN whose loss has these readings of D, by names of metrics and of batch norm layers."""
    layout: Layout = {
        "G and D": {
            "losses": _together("train/d_loss", "train/g_loss"),
            READINGS[readings[0]]: _together(*(f"train/{reading}" for reading in readings)),
            "gradient norms": _together("train/d_grad_norm", "train/g_grad_norm"),
        },
    }
    if metrics:
        layout["Quality"] = {name: _together(f"val/{name}", *(f"{other}/{name}" for other in BESIDE)) for name in metrics}
    if batch_norms:
        layout["Batch norm, G and D"] = {
            "batch against running statistics (KL, nats), and its floor": _together(
                *(f"bn/{name}/{quantity}" for name in batch_norms for quantity in ("kl_to_running", "kl_floor"))
            ),
            "running mean, over channels": _together(*(f"bn/{name}/running_mean/mean" for name in batch_norms)),
            "running variance, over channels": _together(*(f"bn/{name}/running_var/mean" for name in batch_norms)),
        }
    return layout


def _together(*tags: str) -> list:
    return ["Multiline", [f"^{tag}$" for tag in tags]]
