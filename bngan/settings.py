"""What can be set of a GAN, and which of it means something?"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

from bngan.batching import BATCHINGS, Batching
from bngan.batchnorm.statistics import EVAL_STATISTICS, EvalStatistics
from bngan.ema import EMA_BUFFERS, EmaBuffers
from bngan.errors import UsageError, check_at_least
from bngan.norms import BATCH_COUPLED

Initialization = Literal["default", "he"]
LARGEST_BATCH = 2**20  # images normalized together, that a file from elsewhere may speak of
MOST_LAYERS = 64  # hidden ones; a file from elsewhere could ask for a million


@dataclass(frozen=True)
class Settings:
    """The settings of a GAN, by the names that the command line and checkpoints have for them.

    Args:
        network: mlp, the source's fully connected networks; conv, DCGAN's; pacgan, PacGAN's for 28 x 28 images; or points,
            PacGAN's for points in the plane.
        image_shape: (channels, height, width); the command line takes it from the data.
        latent_dim: size of the latent z, which is standard normal.
        hidden_dim: the source's hidden_dim for mlp, the number of filters at full resolution for conv and pacgan (64 as
            published), the width of G's hidden layers for points (400 as published).
        classes: kinds of images that G can be asked for, as many as the data has: each has a gamma and a beta of its own in G's
            batch norm (de Vries et al. 2017) and a term of its own in D's logit (Miyato & Koyama 2018). 0 asks for none.
        g_depth: hidden layers of G for mlp and points, 64 at most; unset means the network's own, 2 and 4.
        initialization: default, the network's own, or he: hidden layers' weights as He et al. 2015 have them, biases 0.
        g_norm: norm of the generator: batch, none, layer, group, instance, spectral, reference, ghost, noisy or virtual.
        d_norm: norm of the discriminator, likewise.
        d_norm_first: whether D's first hidden layer is normalized, too; unset means the network's own way: mlp and points do,
            conv and pacgan do not.
        bn_eps: what batch norm adds to the variance.
        bn_momentum: weight of the new batch in batch norm's running statistics.
        ghost_groups: groups of the batch that norm ghost normalizes, each by itself.
        d_dropout: fraction of D's hidden activations dropped in training.
        minibatch_stddev: images in a group whose standard deviation D's last layer is told; 0 tells it nothing.
        pack: images that D judges together, stacked by channels, by one logit (PacGAN, Lin et al. 2018).
        loss: non_saturating, minimax, least_squares, hinge, wasserstein or relativistic.
        label_smoothing: how far below 1 the real label lies, for losses with labels.
        r1: weight of the gradient penalty on real images.
        r2: weight of the gradient penalty on fake images.
        gradient_penalty: weight of WGAN-GP's penalty between them; unset means 10 for wasserstein and 0 for other losses.
        allow_batch_coupled_penalty: takes these penalties beside a d_norm that makes D's output for one image depend on the
            others, for a study of what comes of it. Images and the interpolates between them are each normalized in their own
            batch, and the gradient goes through its statistics: an image's has what it does to the others' logits in it.
        batching: joint normalizes D's real and fake images together, separate each by themselves.
        update_d_stats_in_g_step: whether D's running statistics also move in G's update.
        n_critic: updates of D in an iteration.
        g_steps: updates of G in an iteration.
        g_lr: Adam's learning rate for G.
        d_lr: Adam's learning rate for D.
        beta1: Adam's decay of the gradient's mean.
        beta2: Adam's decay of the gradient's square.
        lr_decay_start: fraction of the run after which both learning rates fall linearly to 0; 1 keeps them constant.
        instance_noise: standard deviation of the Gaussian noise added to every image that D sees, at the start of the run.
        instance_noise_end: fraction of the run over which the noise falls linearly to 0.
        g_clip: largest norm of G's gradient; unset means no limit.
        d_clip: largest norm of D's gradient; unset means no limit.
        ema_decay: decay per iteration of the moving average of G's weights, from which samples are drawn; 0 keeps none.
        ema_buffers: running statistics of that average: copy takes G's own, average averages them like the weights,
            precise works them out anew, on the averaged weights, when samples are drawn.
        eval_statistics: statistics that normalize samples: running, batch (those of the samples' own batch, as in training),
            or precise (pooled over 64 fresh batches).
        cuda_graph: whether training on a GPU replays its iteration as a CUDA graph.
        tf32: whether float32 products on a GPU go through TF32, with 10 bits of mantissa.
        seed: seed of latents and noise.
    """

    network: Literal["mlp", "conv", "pacgan", "points"] = "mlp"
    image_shape: tuple[int, int, int] = (1, 28, 28)
    latent_dim: int = 100
    hidden_dim: int = 128
    classes: int = 0
    g_depth: int | None = None
    initialization: Initialization = "default"
    g_norm: str = "batch"
    d_norm: str = "batch"
    d_norm_first: bool | None = None
    bn_eps: float = 1e-5
    bn_momentum: float = 0.1
    ghost_groups: int = 1
    d_dropout: float = 0.0
    minibatch_stddev: int = 0
    pack: int = 1
    loss: str = "relativistic"
    label_smoothing: float = 0.0
    r1: float = 0.0
    r2: float = 0.0
    gradient_penalty: float | None = None
    allow_batch_coupled_penalty: bool = False
    batching: Batching = "joint"
    update_d_stats_in_g_step: bool = False
    n_critic: int = 1
    g_steps: int = 1
    g_lr: float = 2e-3
    d_lr: float = 2e-3
    beta1: float = 0.0
    beta2: float = 0.999
    lr_decay_start: float = 0.5
    instance_noise: float = 1.0
    instance_noise_end: float = 1.0
    g_clip: float | None = None
    d_clip: float | None = None
    ema_decay: float = 0.999
    ema_buffers: EmaBuffers = "average"
    eval_statistics: EvalStatistics = "running"
    cuda_graph: bool = True
    tf32: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        # A file of settings and a checkpoint may have a list.
        object.__setattr__(self, "image_shape", tuple(self.image_shape))

    @property
    def wgan_gp(self) -> float:
        """Weight of WGAN-GP's penalty, where none is given the loss's own."""
        if self.gradient_penalty is not None:
            return self.gradient_penalty
        return 10.0 if self.loss == "wasserstein" else 0.0

    def usual_statistics(self, *, averaged: bool) -> EvalStatistics:
        """Return what normalizes samples of G, or of its weights' average, in the run itself."""
        precise = averaged and self.ema_buffers == "precise" and self.eval_statistics == "running"
        return "precise" if precise else self.eval_statistics

    @property
    def is_penalized_in_batches(self) -> bool:
        """Whether a gradient penalty meets a norm that makes D's output for one image depend on the others."""
        return self.d_norm in BATCH_COUPLED and bool(self.r1 or self.r2 or self.wgan_gp)

    @property
    def groups(self) -> int | None:
        """Groups that a ghost norm cuts a batch into, None where there is no such norm."""
        return self.ghost_groups if "ghost" in (self.g_norm, self.d_norm) else None


# Which numbers mean something; an unset one does.
COUNTS = ("n_critic", "g_steps", "ghost_groups", "pack", "latent_dim")
RANGES: tuple[tuple[str, Callable[[float], bool], str], ...] = (
    ("g_lr d_lr g_clip d_clip instance_noise_end bn_eps", lambda value: 0 < value < math.inf, "above 0"),
    ("classes r1 r2 gradient_penalty instance_noise", lambda value: 0 <= value < math.inf, "at least 0"),
    ("beta1 beta2 label_smoothing ema_decay", lambda value: 0 <= value < 1, "in [0, 1)"),
    ("bn_momentum", lambda value: 0 < value <= 1, "above 0 and at most 1"),
    ("lr_decay_start", lambda value: 0 <= value <= 1, "in [0, 1]"),
    ("g_depth", lambda value: 1 <= value <= MOST_LAYERS, f"at least 1 and at most {MOST_LAYERS}"),
    ("minibatch_stddev", lambda value: value == 0 or value >= 2, "0 or at least 2"),
)
CHOICES = {
    "batching": BATCHINGS,
    "ema_buffers": EMA_BUFFERS,
    "eval_statistics": EVAL_STATISTICS,
    "initialization": get_args(Initialization),
}


def check_settings(settings: Settings) -> None:
    """Refuse numbers out of range and combinations without meaning.

    Raises:
        UsageError: naming the setting and what is allowed.
    """
    check_at_least(1, **{name: getattr(settings, name) for name in COUNTS})
    for names, fits, words in RANGES:
        for name in names.split():
            value = getattr(settings, name)
            if value is not None and not fits(value):
                raise UsageError(f"{name} must be {words}, got {value}")
    if not all(size >= 1 for size in settings.image_shape):
        raise UsageError(f"image_shape must be of numbers that are at least 1, got {settings.image_shape}")
    for name, allowed in CHOICES.items():
        if getattr(settings, name) not in allowed:
            raise UsageError(f"unknown {name} {getattr(settings, name)!r}; choose from {', '.join(allowed)}")
    if settings.d_norm == "virtual" and (settings.pack > 1 or settings.minibatch_stddev):
        raise UsageError(
            "d_norm virtual cannot be combined with pack or minibatch_stddev: its reference batch is of single images, and "
            "what D says of an image would depend on the others again; use --model.d_norm layer, group, spectral or none"
        )
    if settings.classes and settings.pack > 1:
        raise UsageError(
            f"classes {settings.classes} cannot be combined with pack {settings.pack}: D judges a pack by one logit, and the "
            "images in it are of several classes; use --model.pack 1"
        )
    if settings.is_penalized_in_batches and not settings.allow_batch_coupled_penalty:
        raise UsageError(
            f"d_norm {settings.d_norm!r} cannot be combined with r1, r2 or gradient_penalty: a gradient penalty is defined "
            "for each image by itself, but batch norm makes D's output for one image depend on the others; use --model.d_norm "
            "layer, group, spectral or none"
        )


def check_update(settings: Settings, size: int, ranks: int, *, synchronized: bool) -> None:
    """Refuse updates on batches of a size that cannot be packed, grouped and normalized as the settings say.

    Args:
        settings: of the GAN.
        size: images per update over all ranks.
        ranks: number of ranks.
        synchronized: whether batch norm normalizes the ranks' images together.

    Raises:
        UsageError: naming the setting and what would fit.
    """
    pack, group, packs = settings.pack, settings.minibatch_stddev, size // settings.pack
    if pack > 1 and size % (pack * ranks):
        raise UsageError(
            f"--data.batch_size {size} must be a multiple of {pack * ranks}, for --model.pack {pack} on {ranks} devices"
        )
    unit = "images" if pack == 1 else f"packs of {pack} images"
    if group and packs // ranks % group:
        raise UsageError(
            f"--model.minibatch_stddev {group} must divide the {packs // ranks} {unit} that each of {ranks} devices has of "
            f"--data.batch_size {size}"
        )
    for norm, rows, of in ((settings.g_norm, size, "images"), (settings.d_norm, packs, unit)):
        if norm in BATCH_COUPLED:
            groups = settings.ghost_groups if norm == "ghost" else None
            check_batch(rows, ranks, groups, synchronized=synchronized, unit=of)


def check_batch(size: int, ranks: int, groups: int | None, *, synchronized: bool, unit: str = "images") -> None:
    """Refuse batches of a size that batch norm cannot be trained on.

    Args:
        size: rows per update over all ranks.
        ranks: number of ranks.
        groups: groups into which ghost batch norm cuts what it normalizes, None where there is none.
        synchronized: whether that is the ranks' rows together.
        unit: what a row is.

    Raises:
        UsageError: if the batch cannot be cut into the groups, each on one rank, or if they are too small.
    """
    groups_on_all_ranks = ranks if groups is None else groups if synchronized else groups * ranks
    if groups is not None and (size % groups_on_all_ranks or groups_on_all_ranks % ranks):
        raise UsageError(
            f"--model.ghost_groups {groups} must divide the {size} {unit} of --data.batch_size on {ranks} devices, and be a "
            f"multiple of {ranks} where they are normalized together (--trainer.sync_batchnorm true)"
        )
    if size // groups_on_all_ranks < 2:
        raise UsageError(
            f"batch norm needs at least 2 {unit} at a time on each device, and here has {size // groups_on_all_ranks}: raise "
            "--data.batch_size" + (" or lower --model.ghost_groups" if groups is not None else "")
        )
