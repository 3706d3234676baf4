"""fit, validate, test and predict: Lightning's command line around GAN and ImageDataModule, one folder per run."""

import argparse
import os
import shlex
from inspect import signature
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import Namespace, set_parsing_settings
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch import Trainer as LightningTrainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import TensorBoardLogger

from bngan import distributed, run
from bngan.callbacks import (
    AtomicCheckpointIO,
    BatchNormStatistics,
    CheckpointSaver,
    MeasureSamples,
    RunProgress,
    SampleImages,
    TensorBoardLayout,
)
from bngan.checkpoint import Content, check_networks, check_training, iterations, other_shape, read_checkpoint
from bngan.data import ImageDataModule
from bngan.distributed import print0
from bngan.effects import check_effects
from bngan.errors import UsageError
from bngan.files import write_whole
from bngan.gan import GAN
from bngan.messages import explain, filter_warnings
from bngan.recipes import (
    CLASSES,
    DEFAULT_CONFIG,
    check_class,
    check_nulls,
    expand_homes,
    flatten,
    names_foreign_code,
    read_config,
    to_yaml,
)
from bngan.rendezvous import agree_on_port
from bngan.run import Location, Start
from bngan.schedules import jumps
from bngan.settings import Settings
from bngan.trainer import Trainer, as_list

# Settings of a run that decide what it comes to or what is measured of it: to go on with others takes --override.
FROZEN = {
    "seed_everything",
    *(f"model.{name}" for name in signature(Settings).parameters.keys() - {"cuda_graph", "tf32"}),
    *(f"data.{name}" for name in ("name", "image_size", "channels", "background", "batch_size")),
    *(f"trainer.{name}" for name in ("precision", "sync_batchnorm", "limit_train_batches", "limit_val_batches")),
    *(f"metrics.{name}" for name in ("num_samples", "feature", "seed", "mode_threshold")),
    *(f"checkpoint.{name}" for name in ("monitor", "mode")),
}
# Settings of the machine, which a run that goes on may have left.
MACHINE = {
    *(f"trainer.{name}" for name in ("accelerator", "strategy", "devices", "num_nodes", "default_root_dir", "fast_dev_run")),
    *(f"data.{name}" for name in ("root", "num_workers", "in_memory_gb")),
}
# Settings that follow from others, and these others, which must be there.
LINKED = {"model.image_shape", "model.seed", "data.seed", "data.n_critic"}
SOURCES = "{seed_everything: 0, model: {n_critic: 1}}"
# Lightning would print floors and controls as metrics, in a second table, and keep all samples.
QUIET = {"validate": {"verbose": False}, "test": {"verbose": False}, "predict": {"return_predictions": False}}

# The order matters: samples are measured before the bar shows it and the best checkpoint is chosen by it.
CALLBACKS: dict[str, type[Callback]] = {
    "images": SampleImages,
    "batchnorm": BatchNormStatistics,
    "metrics": MeasureSamples,
    "progress": RunProgress,
    "checkpoint": CheckpointSaver,
}
KINDS: dict[str, type] = {"model": Settings, "data": ImageDataModule, "trainer": Trainer, **CALLBACKS}


def run_command(command: str, options: argparse.Namespace, settings: list[str]) -> None:
    """Do what fit, validate, test or predict is asked for.

    Args:
        command: one of these.
        options: what is about the run: configs (files of settings), ckpt_path, override, print_config, and run for fit.
        settings: the other arguments.

    Raises:
        UsageError: if a person can put right what is wrong.
    """
    filter_warnings()
    if "LOCAL_RANK" in os.environ:
        distributed.end_with_parent(int(os.environ.get(distributed.FIRST_PROCESS, os.getppid())))
    if command == "fit":
        run.check_restart(options.ckpt_path)
        agree_on_port()
    try:
        GanCLI(command, options, settings).carry_out()
    except Exception as error:
        if isinstance(error, UsageError) or (line := explain(error)) is None:
            raise
        raise UsageError(line) from error


class GanCLI(LightningCLI):
    """LightningCLI with one folder per run, and with the settings of the run that goes on or is measured.

    Args:
        command: fit, validate, test or predict.
        options: what is about the run, as for run_command.
        settings: the other arguments.
    """

    def __init__(self, command: str, options: argparse.Namespace, settings: list[str]) -> None:
        self.command, self.options = command, options
        self.content: Content | None = None  # of the checkpoint
        super().__init__(
            GAN,
            ImageDataModule,
            save_config_callback=RunRecord,
            trainer_class=Trainer,
            trainer_defaults={"callbacks": [TensorBoardLayout()]},
            seed_everything_default=0,
            # An abbreviated flag is accepted or not depending on what other flags there are: better not at all.
            parser_kwargs={"prog": f"bngan {command}", "exit_on_error": False, "allow_abbrev": False},
            args=settings,
            run=False,
            auto_configure_optimizers=False,
            # It would store the name of a function in the checkpoint, to be imported and called when that is loaded.
            load_from_checkpoint_support=False,
        )

    # The parser ---------------------------------------------------------------------------------------------------

    def add_default_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the settings that are in no group."""
        parser.add_argument("--seed_everything", type=int, default=0, help="Seed of all randomness.")
        parser.add_argument("--name", type=str, default="mnist", help="Name of the experiment: runs/<name>/<id>/.")

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the callbacks' settings, and let some settings follow from others."""
        for group, kind in CALLBACKS.items():
            parser.add_lightning_class_args(kind, group)
        parser.link_arguments("seed_everything", "model.seed")
        parser.link_arguments("seed_everything", "data.seed")
        parser.link_arguments("model.n_critic", "data.n_critic")
        parser.link_arguments("data.image_shape", "model.image_shape", apply_on="instantiate")

    # The settings -------------------------------------------------------------------------------------------------

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Take the settings of configs/default.yaml, above them those of the run that goes on, and above them those given."""
        # Lightning lets settings be read from any address that fsspec knows.
        set_parsing_settings(config_read_mode_fsspec_enabled=False, config_read_mode_urls_enabled=False)
        settings = [*(word for path in self.options.configs for word in ("--config", str(path))), *args]
        default = ["--config", str(DEFAULT_CONFIG)]
        given = expand_homes(parser.parse_args(["--config", SOURCES, *settings], defaults=False))
        checkpoint, recorded = None, {}
        if self.options.ckpt_path is not None:
            self.config = expand_homes(parser.parse_args([*default, *settings]))  # which say where runs lie
            checkpoint = self._find(self.options.ckpt_path, given.get("name"))
        if checkpoint is not None:
            recorded = _without_foreign_code(self._read_settings(checkpoint), given)
        elif self.options.override:
            raise UsageError("--override goes on with a run's checkpoint by other settings; add --ckpt_path, or leave it out")
        show = ["--print_config"] if self.options.print_config else []
        self.config = expand_homes(parser.parse_args([*default, "--config", to_yaml(recorded), *settings, *show]))
        if recorded:
            self._compare(recorded)
        typed = parser.parse_args(["--config", SOURCES, *args], defaults=False)
        check_effects(self.command, self.config, given, typed)
        self.start = self._start(checkpoint, given)

    def _find(self, asked: str, name: str | None) -> Path | None:
        """Return the checkpoint to go on from, which is a run's newest, or to measure, which is its best, or None."""
        if asked == "auto":
            return run.find_own(self._location)
        return run.find(asked, self._location.root, name, best=self.command != "fit")

    @property
    def _location(self) -> Location:
        return Location(Path(self.config.trainer.default_root_dir or "runs"), self.config.name, self.options.run)

    def _read_settings(self, checkpoint: Path) -> dict[str, Any]:
        """Return by full name the settings that a checkpoint brings along: for fit its run's, else its networks' and data's."""
        self.content = read_checkpoint(checkpoint)
        check_networks(checkpoint, self.content)
        folder = run.run_of(checkpoint)
        if self.command == "fit":
            check_training(checkpoint, self.content)
        if self.command == "fit" and folder is not None:
            settings = read_config(folder / "config.yaml")
        else:
            model, data = self.content["hyper_parameters"], self.content.get("datamodule_hyper_parameters", {})
            known = {name: data[name] for name in signature(ImageDataModule).parameters if name in data}
            settings = {"seed_everything": model["seed"], "model": model, "data": known}
        return {name: value for name, value in flatten(settings).items() if name not in MACHINE | LINKED}

    def _compare(self, recorded: dict[str, Any]) -> None:
        """Say which settings are not those recorded, and refuse those that decide the result."""
        now = flatten(yaml.safe_load(self.parser.dump(self.config, skip_none=False, format="yaml")))
        for name in [name for name in recorded if name in now and not is_same(name, now[name], recorded[name])]:
            # Measuring may use other data.
            if name in FROZEN and not self.options.override and (self.command == "fit" or not name.startswith("data.")):
                raise UsageError(
                    f"--{name} {now[name]} contradicts the run of {self.options.ckpt_path}, which has {recorded[name]}; leave "
                    "it out, add --override to go on with it all the same, or start a new run"
                )
            print0(f"--{name} is {now[name]}, and was {recorded[name]} in the run")

    def _start(self, checkpoint: Path | None, given: Namespace) -> Start:
        iteration = 0 if self.content is None else iterations(self.content)
        if self.command == "fit":
            own = None if checkpoint is None else run.run_of(checkpoint)
            placed = "name" in given or "trainer.default_root_dir" in given
            elsewhere = own is not None and placed and own.resolve().parent != run.new_folder(self._location).resolve().parent
            apart, auto = self.options.override or elsewhere, self.options.ckpt_path == "auto"
            return run.start_of(checkpoint, iteration, self._location, auto=auto, apart=apart)
        if checkpoint is None:
            raise UsageError(f"{self.command} needs a checkpoint: add --ckpt_path RUN/checkpoints/best.ckpt")
        return Start(run.new_folder(self._location), checkpoint, iteration, run.parent_of(checkpoint, iteration))

    # The Trainer --------------------------------------------------------------------------------------------------

    def before_instantiate_classes(self) -> None:
        """Refuse null where there must be something, and let settings name classes with plain values alone."""
        for group, kind in KINDS.items():
            check_nulls(kind, self.config.get(group) or {}, prefix=f"--{group}.")
        for group, name in (setting.split(".") for setting in CLASSES):
            for given in as_list(self.config[group][name]):
                if not isinstance(given, bool | str):
                    check_class(f"{group}.{name}", given)
        before = None if self.content is None else self.content.get("total_iterations")
        self.save_config_kwargs = {
            "save_to_log_dir": False,
            "start": self.start,
            "before": before if isinstance(before, float) and before >= 1 else None,  # a stranger's may be anything
            "override": self.options.override,
        }

    def instantiate_trainer(self, **kwargs: Any) -> LightningTrainer:
        """Return the Trainer, which writes into the run's folder."""
        self._check_shapes()
        settings, start = self.config_init["trainer"], self.start
        if settings.logger is not False:
            # What the folder holds of iterations that are now done again must not be shown beside them. A run killed in the
            # moment between a validation's last word and the checkpoint after it shows that validation twice, as the same
            # values: to purge its iteration as well would lose what training logged there.
            purge_step = None if not start.begun else 0 if start.checkpoint is None else start.iteration + 1
            # The first logger's folder is the run's, so one that a person names writes beside it.
            first = TensorBoardLogger(start.folder, name="", version="", default_hp_metric=False, purge_step=purge_step)
            kwargs["logger"] = [first, *([] if settings.logger is True else as_list(settings.logger))]
        trainer = super().instantiate_trainer(default_root_dir=str(start.folder), **kwargs)
        trainer.strategy.checkpoint_io = AtomicCheckpointIO()
        # The other ranks are told the folder by rank 0; what they think it is does not matter.
        if trainer.is_global_zero and not settings.fast_dev_run:
            run.check_writable(start.folder)
        return trainer

    def _check_shapes(self) -> None:
        """Refuse data or networks other than the checkpoint's."""
        if self.content is None:
            return
        shape, now = tuple(self.content["hyper_parameters"]["image_shape"]), self.model.settings.image_shape
        if shape != now:
            raise UsageError(
                f"the checkpoint makes images of shape {shape}, but the data has {now}; give the --data settings that it was "
                "trained with"
            )
        if mismatch := other_shape(self.model.state_dict(), self.content["state_dict"]):
            raise UsageError(f"{mismatch}: networks cannot be changed by --override; start a new run")

    # The command --------------------------------------------------------------------------------------------------

    def carry_out(self) -> None:
        """Do what the command says, from the checkpoint on if there is one."""
        if self.command == "fit":
            self._tell_what_begins()
        path = self.start.checkpoint
        do = getattr(self.trainer, self.command)
        # weights_only is said outright, so that TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD has no say.
        given = {"ckpt_path": None if path is None else str(path), "weights_only": True, **QUIET.get(self.command, {})}
        do(self.model, datamodule=self.datamodule, **given)
        if self.command == "fit":
            print0(f"Done: {self.start.folder}")

    def _tell_what_begins(self) -> None:
        ranks, batch_size = self.trainer.world_size, self.datamodule.batch_size
        self.model.check_batch(batch_size, ranks, synchronized=self.config.trainer.sync_batchnorm)
        shape = " x ".join(map(str, self.model.settings.image_shape))
        rates = f"learning rates G {self.model.settings.g_lr:g} and D {self.model.settings.d_lr:g}"
        device = self.trainer.strategy.root_device.type
        print0(f"{self.datamodule.data_name} images {shape}, batch {batch_size} over {ranks} x {device}, {rates}")
        classes = 1 if self.datamodule.folder is None else self.datamodule.classes
        if classes > 1 and not self.model.settings.classes:
            print0(f"G and D are not told the classes; with --model.classes {classes} they are, and each can be asked for")
        if ranks > 1 and any(self.model.batch_norms()):
            synchronized = self.config.trainer.sync_batchnorm
            together = "all devices' images together" if synchronized else "each device's images by themselves"
            print0(f"Batch norm normalizes {together} (--trainer.sync_batchnorm {str(synchronized).lower()})")
        if self.start.checkpoint is not None:
            print0(f"Goes on from {self.start.checkpoint}, iteration {self.start.iteration}")
            if run.run_of(self.start.checkpoint) is None:
                lone = f"{self.start.checkpoint} lies in no folder of a run of this version, with config.yaml and run.json"
                print0(f"{lone}, so how long to train and what to log are as given or as by default.")
        print0(f"Run folder {self.start.folder}")
        if self.config.trainer.logger is not False:
            root = shlex.quote(str(self.start.folder.parent.parent))
            print0(f"Watch it: tensorboard --logdir {root} --samples_per_plugin images=1000")


class RunRecord(SaveConfigCallback):
    """Writes config.yaml and run.json into the run's folder.

    Args:
        start: where this process starts; all of them must agree.
        before: iterations that the run which goes on was to have, None where it is not known.
        override: whether --override is given.
    """

    def __init__(self, *args: Any, start: Start, before: float | None, override: bool, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.start, self.before, self.override = start, before, override

    def setup(self, trainer: LightningTrainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse to train from several places at once, or with learning rates and noise that jump unasked.

        Raises:
            UsageError: if this process would start elsewhere than the first, or if they do.
        """
        own = str(self.start)
        first = trainer.strategy.broadcast(own)
        if not trainer.strategy.reduce_boolean_decision(first == own, all=True):
            raise UsageError(
                f"process {trainer.global_rank} would start {own}, but process 0 {first}; runs must lie in a folder that all "
                "machines share: see --trainer.default_root_dir"
            )
        if stage == "fit" and self.before is not None and isinstance(pl_module, GAN):
            self._check_length(trainer, pl_module, self.before)
        super().setup(trainer, pl_module, stage)

    def _check_length(self, trainer: LightningTrainer, gan: GAN, before: float) -> None:
        """Say what jumps because the run has another length now, as its schedules are functions of all of it."""
        data: ImageDataModule = trainer.datamodule  # pyright: ignore[reportAttributeAccessIssue]  # set from outside
        batches, limit = len(data.train_dataloader()), trainer.limit_train_batches
        now = gan.count_iterations(min(batches, limit) if isinstance(limit, int) else int(batches * limit))
        changed = jumps(gan.settings, self.start.iteration, before, now)
        if not changed or now <= self.start.iteration:
            return
        why = f"because the run's {before:,.0f} iterations became {now:,.0f}".replace("inf", "endless")
        if not self.override:
            raise UsageError(
                f"{changed}, {why}: leave --trainer.max_epochs and --trainer.max_steps as they were, or add --override, which "
                "goes on in a new folder"
            )
        print0(f"{changed}, {why}")

    def on_fit_end(self, trainer: LightningTrainer, pl_module: LightningModule) -> None:
        """Say so if there was nothing to train or to validate."""
        if trainer.global_step == self.start.iteration and not trainer.callback_metrics:
            print0("Nothing was left to do; to train longer raise --trainer.max_epochs, max_steps or max_time.")

    def save_config(self, trainer: LightningTrainer, pl_module: LightningModule, stage: str) -> None:
        """Write config.yaml, and add this start to run.json."""
        settings = self.parser.dump(self.config, skip_none=False, format="yaml")
        write_whole(self.start.folder / "config.yaml", settings.encode())
        run.record(self.start, trainer.strategy.root_device, trainer.world_size)


def is_same(name: str, one: Any, other: Any) -> bool:
    """Whether two values of a setting mean the same: a limit of 1 is one batch, and 1.0 is all of them."""
    return one == other and (type(one) is type(other) or not name.startswith("trainer.limit_"))


def _without_foreign_code(recorded: dict[str, Any], given: Namespace) -> dict[str, Any]:
    """Return a run's settings but those that name code of others, all of which must be given anew."""
    foreign = {name for name, value in recorded.items() if names_foreign_code(name, value)}
    if not_given := sorted(name for name in foreign if name not in given):
        raise UsageError(f"the run names code of its own; give these settings again, or null: --{', --'.join(not_given)}")
    return {name: value for name, value in recorded.items() if name not in foreign}
