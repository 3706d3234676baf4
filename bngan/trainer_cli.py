"""fit, validate, test and predict: Lightning's command line around GAN and ImageDataModule, one folder per run."""

import json
import logging
import os
import platform
import re
import secrets
import shlex
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import yaml
from jsonargparse import set_parsing_settings
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.plugins.environments import SLURMEnvironment

from bngan import distributed
from bngan.callbacks import BatchNormStatistics, Checkpoints, Dashboard, Quality, RunProgress, SampleImages, WholeCheckpoints
from bngan.data import ImageDataModule
from bngan.distributed import SynchronizedBatchNorms
from bngan.gan import GAN
from bngan.jobs import interrupted_run, join_job
from bngan.sampling import check_networks, read_checkpoint
from bngan.trainer_settings import as_list, check_trainer_settings

SUBCOMMANDS = ("fit", "validate", "test", "predict")
REPOSITORY = Path(__file__).resolve().parents[1]
DEFAULT_CONFIG = REPOSITORY / "configs" / "default.yaml"
# Settings of the model that come from elsewhere, and where from.
LINKED = {"image_shape": "data.image_shape", "seed": "seed_everything"}
# Settings of the data that a checkpoint brings along; where the files lie depends on the machine.
DATA_KEPT = ("name", "folder", "image_size", "channels", "batch_size")
# Groups of settings that a run goes on with, and what of them depends on the machine.
RUN_KEPT: dict[str, set[str]] = {
    "trainer": {"accelerator", "devices", "num_nodes", "strategy", "default_root_dir", "fast_dev_run"},
    "images": set(),
    "batchnorm": set(),
    "metrics": set(),
    "checkpoint": set(),
}


class GanCLI(LightningCLI):
    """LightningCLI with one folder per run and settings that a checkpoint brings along."""

    def __init__(self, arguments: list[str]) -> None:
        self.arguments = arguments
        # An abbreviated flag is accepted or not depending on what other flags there are: better not at all.
        parser_options: dict[str, Any] = {"exit_on_error": False, "allow_abbrev": False}
        super().__init__(
            GAN,
            ImageDataModule,
            save_config_callback=RunRecord,
            save_config_kwargs={"overwrite": True},
            trainer_defaults={"callbacks": [Dashboard()], "use_distributed_sampler": False, "sync_batchnorm": True},
            seed_everything_default=0,
            parser_kwargs={
                **parser_options,
                **{name: {"default_config_files": [str(DEFAULT_CONFIG)], **parser_options} for name in SUBCOMMANDS},
            },
            args=arguments,
            auto_configure_optimizers=False,
            # It would store the name of a function in the checkpoint, to be imported and called when that is loaded.
            load_from_checkpoint_support=False,
        )

    def add_default_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument("--seed_everything", type=int, default=0, help="Seed of all randomness.")
        parser.add_argument("--name", type=str, default="mnist", help="Name of the experiment: runs/<name>/<time>-<id>/.")
        parser.add_argument(
            "--override",
            action="store_true",
            help="With --ckpt_path: let settings that contradict the checkpoint replace its own.",
        )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_lightning_class_args(SampleImages, "images")
        parser.add_lightning_class_args(BatchNormStatistics, "batchnorm")
        # The order matters: quality is measured before the bar shows it and the best checkpoint is chosen by it.
        parser.add_lightning_class_args(Quality, "metrics")
        parser.add_lightning_class_args(RunProgress, "progress")
        parser.add_lightning_class_args(Checkpoints, "checkpoint")
        parser.link_arguments("seed_everything", "model.seed")
        parser.link_arguments("seed_everything", "data.seed")
        parser.link_arguments("model.n_critic", "data.updates_per_batch")
        parser.link_arguments("model.accumulate", "data.parts_per_update")
        parser.link_arguments("data.image_shape", "model.image_shape", apply_on="instantiate")

    def _prepare_subcommand_parser(self, klass: type, subcommand: str, **kwargs: Any) -> LightningArgumentParser:
        parser = super()._prepare_subcommand_parser(klass, subcommand, **kwargs)
        if subcommand in ("validate", "test"):
            # Lightning would print floors and controls as metrics, in a second table.
            parser.set_defaults(verbose=False)
        return parser

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        self.contents = [read_config_file(path) for path in config_files(self.arguments)]
        # Lightning lets settings be read from any address that fsspec knows.
        set_parsing_settings(config_read_mode_fsspec_enabled=False, config_read_mode_urls_enabled=False)
        # Lightning warns whenever arguments are handed over rather than read from sys.argv.
        with replaced_argv(["bngan"]):
            super().parse_arguments(parser, args)

    def _parse_ckpt_path(self) -> None:
        """Take the model's settings from the checkpoint; refuse those on the command line that contradict it."""
        settings = self.config[self.config.subcommand]
        self._find_interrupted_run()
        path = settings.get("ckpt_path")
        if path is None:
            if self.config.subcommand != "fit":
                raise ValueError(f"{self.config.subcommand} needs a checkpoint: add --ckpt_path RUN/checkpoints/best.ckpt")
            return
        if path == "last":
            path = settings.ckpt_path = str(newest_checkpoint(Path(settings.trainer.default_root_dir or "runs"), settings.name))
        content = read_checkpoint(Path(path))
        check_networks(Path(path), content)
        saved, datas = content["hyper_parameters"], content.get("datamodule_hyper_parameters", {})
        self._saved_iteration = int(content["state_dict"]["iteration"])
        self._saved_shape = tuple(saved["image_shape"])
        model = {name: value for name, value in saved.items() if name not in LINKED}
        data = {name: datas[name] for name in DATA_KEPT if name in datas}
        seed = {"seed_everything": saved["seed"]}
        for known, group, prefix in ((model, settings.model, "model."), (data, settings.data, "data."), (seed, settings, "")):
            for name in given_settings(self.arguments, self.contents, prefix) & known.keys():
                # Measuring may use other data, and pictures may have been moved.
                moved = prefix == "data." and (self.config.subcommand != "fit" or name == "folder")
                if group[name] != known[name] and not settings.override and not moved:
                    raise ValueError(
                        f"--{prefix}{name} {group[name]} contradicts {path}, which has {known[name]}; leave it out, add "
                        "--override to go on with it all the same, or start a new run"
                    )
                del known[name]
        run = self._run_settings(Path(path)) if self.config.subcommand == "fit" else {}
        brought = {self.config.subcommand: {**run, "model": model, "data": data, **seed}}
        self.config = self.parser.parse_object(brought, self.config)
        self._saved_state = content["state_dict"]

    def _run_settings(self, checkpoint: Path) -> dict[str, Any]:
        """Return the plain settings of the run that made the checkpoint, where none are given: it goes on as it was."""
        path = checkpoint.resolve().parents[1] / "config.yaml"
        if not path.is_file():
            print(f"There is no {path}, so how long to train and what to log are as given or as by default.", flush=True)
            return {}
        record = read_config_file(path)
        found: dict[str, Any] = {}
        for group, left in RUN_KEPT.items():
            taken = left | given_settings(self.arguments, self.contents, f"{group}.")
            found[group] = {name: value for name, value in record.get(group, {}).items() if name not in taken}
        # A folder from a stranger must not decide which code is run.
        coded = {f"trainer.{name}": value for name, value in found["trainer"].items() if isinstance(value, dict | list)}
        if found["metrics"].get("feature", "digits") not in ("digits", "inception"):
            coded["metrics.feature"] = found["metrics"]["feature"]
        if coded:
            raise ValueError(
                f"{path} names code of its own; give these settings again, or null: --{', --'.join(sorted(coded))}"
            )
        return found

    def _find_interrupted_run(self) -> None:
        """If torchrun or SLURM started this job again, go on in its run's folder, from its last checkpoint if it has one."""
        settings = self.config[self.config.subcommand]
        self._jobs = join_job() if self.config.subcommand == "fit" else []
        runs = Path(settings.trainer.default_root_dir or "runs") / settings.name
        self._interrupted = interrupted_run(runs, self._jobs, shlex.join(sys.argv))
        self._saved_iteration: int | None = None
        if self._interrupted is not None and (last := self._interrupted / "checkpoints" / "last.ckpt").is_file():
            settings.ckpt_path = str(last)

    def before_instantiate_classes(self) -> None:
        settings = self.config[str(self.subcommand)]
        check_trainer_settings(settings.trainer)
        if settings.weights_only is False:
            raise ValueError("--weights_only false would run whatever code a checkpoint holds; leave it out")
        settings.weights_only = True  # said outright, so that TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD has no say
        root = Path(settings.trainer.default_root_dir or "runs")
        self.run_folder = self._interrupted or new_run_folder(root, settings.name)
        start = "at the beginning"
        if self._saved_iteration is not None:
            # Machines may have the folder in different places.
            start = f"from {'/'.join(Path(settings.ckpt_path).parts[-3:])} (iteration {self._saved_iteration})"
        self.save_config_kwargs |= {"jobs": self._jobs, "start": start}

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        saved_shape = getattr(self, "_saved_shape", self.model.image_shape)
        if saved_shape != self.model.image_shape:
            raise ValueError(
                f"the checkpoint makes images of shape {saved_shape}, but the data has {self.model.image_shape}; give the "
                "--data settings that it was trained with"
            )
        if hasattr(self, "_saved_state"):
            check_weights(self.model, self._saved_state)
        settings = self.config_init[str(self.subcommand)].trainer
        if settings.logger is not False:
            # What the folder holds of iterations that are now done again must not be shown beside them. A run killed in the
            # moment between a validation's last word and the checkpoint after it shows that validation twice, as the same
            # values: to purge its iteration as well would lose what training logged there.
            done = 0 if self._saved_iteration is None else self._saved_iteration + 1
            purge_step = None if self._interrupted is None else done
            # The first logger's folder is the run's, so one that a person names writes beside it.
            first = TensorBoardLogger(self.run_folder, name="", version="", default_hp_metric=False, purge_step=purge_step)
            kwargs["logger"] = [first, *([] if settings.logger is True else as_list(settings.logger))]
        kwargs["plugins"] = [*as_list(settings.plugins), WholeCheckpoints()]
        if settings.sync_batchnorm:
            kwargs["plugins"].append(SynchronizedBatchNorms())
            kwargs["sync_batchnorm"] = False  # which would be torch's, for GPUs alone
        if quiet := settings.enable_progress_bar is False:
            kwargs["enable_progress_bar"] = True  # false is an error where a callback is a progress bar, as ours is
        trainer = super().instantiate_trainer(default_root_dir=str(self.run_folder), **kwargs)
        environment = getattr(trainer.strategy, "cluster_environment", None)
        if isinstance(environment, SLURMEnvironment):
            environment.auto_requeue = False  # which would save and requeue from within a signal handler, beside Checkpoints
        # The other ranks are told the folder by rank 0; what they think it is does not matter.
        if trainer.is_global_zero and not settings.fast_dev_run:
            make_folder(self.run_folder)
        if trainer.strategy.root_device.type == "cpu":
            # Lightning sets it, and then each step of an optimizer looks for a driver, which takes longer than the step.
            os.environ.pop("PYTORCH_NVML_BASED_CUDA_CHECK", None)
        if quiet and trainer.progress_bar_callback is not None:
            trainer.progress_bar_callback.disable()
        return trainer

    def before_fit(self) -> None:
        self.model.check_batch(self.datamodule.batch_size // self.trainer.world_size * self.model.n_critic)
        optimum = self.model.hparams
        self._say(
            f"{self.datamodule.data_name} images {shape_text(self.model.image_shape)}, batch {self.datamodule.batch_size} over "
            f"{self.trainer.world_size} x {self.trainer.strategy.root_device.type}, learning rates G {optimum['g_lr']:g} "
            f"and D {optimum['d_lr']:g}"
        )
        if self.trainer.world_size > 1 and any(self.model.batch_norms()):
            synchronized = self.config_init[str(self.subcommand)].trainer.sync_batchnorm
            kind = "all devices' images together" if synchronized else "each device's images by themselves"
            self._say(f"Batch norm normalizes {kind} (--trainer.sync_batchnorm {str(synchronized).lower()})")
        path = self.config_init[str(self.subcommand)].ckpt_path
        if self._interrupted is not None:
            where = "anew" if self._saved_iteration is None else f"from iteration {self._saved_iteration}"
            self._say(f"This job was started again: its run goes on {where}")
        elif path is not None:
            self._say(f"Goes on from {path}, iteration {self._saved_iteration}")
        self._say(f"Run folder {self.run_folder}")
        self._say(f"Watch it: tensorboard --logdir {self.run_folder.parent.parent}")

    def after_fit(self) -> None:
        validated = self.trainer.fit_loop.epoch_loop.val_loop._has_run
        if self.model.iterations_done == self._saved_iteration and not validated:
            self._say("Nothing was left to do; to train longer raise --trainer.max_epochs or --trainer.max_steps.")
        self._say(f"Done: {self.run_folder}")

    def _say(self, line: str) -> None:
        if self.trainer.is_global_zero:
            print(line, flush=True)


class RunRecord(SaveConfigCallback):
    """Writes config.yaml and run.json (command, job, versions, git commit, machine) into the run's folder.

    Args:
        jobs: names of the jobs that this run belongs to.
        start: where this process starts, in words; all of them must agree.
    """

    def __init__(self, *args: Any, jobs: list[str], start: str, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.jobs, self.start = jobs, start

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        assert trainer.log_dir is not None  # asking for it is a message between ranks: all must ask
        self.folder = Path(trainer.log_dir)
        first = trainer.strategy.broadcast(self.start)
        if not trainer.strategy.reduce_boolean_decision(first == self.start, all=True):
            raise ValueError(
                f"process {trainer.global_rank} would start {self.start}, but process 0 {first}; runs must lie in a folder "
                "that all machines share: see --trainer.default_root_dir"
            )
        super().setup(trainer, pl_module, stage)

    def save_config(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        packages = (
            "bngan",
            "torch",
            "torchvision",
            "lightning",
            "torchmetrics",
            "tensorboard",
            "jsonargparse",
            "numpy",
        )
        record = {
            "command": shlex.join(sys.argv),
            "folder": os.getcwd(),
            "job": self.jobs,
            "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "git": git_commit(),
            "python": platform.python_version(),
            "versions": {name: version(name) for name in packages},
            "machine": {
                "system": platform.platform(),
                "cores": os.cpu_count(),
                "threads": torch.get_num_threads(),
                "device": device_name(trainer.strategy.root_device),
                "devices": trainer.world_size,
            },
        }
        (self.folder / "run.json").write_text(json.dumps(record, indent=2) + "\n")


def run(arguments: list[str]) -> None:
    """Parse the arguments of fit, validate, test or predict and do it."""
    quieten()
    if "LOCAL_RANK" in os.environ:
        distributed.end_with_parent()
    if not DEFAULT_CONFIG.is_file():
        raise FileNotFoundError(f"{DEFAULT_CONFIG} is missing; install bngan from its source folder by pip install -e .")
    GanCLI(arguments)


def print_full_help(subcommand: str) -> None:
    """Print every setting of a subcommand."""
    quieten()
    GanCLI([subcommand, "--help"])


def new_run_folder(root: Path, name: str) -> Path:
    """Return a path for a new run.

    Raises:
        ValueError: if the name cannot be a folder's.
    """
    if not re.fullmatch(r"[\w.-]+", name) or name in (".", ".."):
        raise ValueError(f"--name {name!r} becomes a folder's name: use letters, digits, '.', '_' and '-'")
    return root / name / f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(2)}"


def newest_checkpoint(root: Path, name: str) -> Path:
    """Return the last.ckpt that was written latest among the runs of that name.

    Raises:
        ValueError: if there is none.
    """
    found = sorted((root / name).glob("*/checkpoints/last.ckpt"), key=lambda path: path.stat().st_mtime)
    if not found:
        where = "see --name and --trainer.default_root_dir"
        raise ValueError(f"--ckpt_path last: no run in {root / name} has a checkpoint; {where}")
    return found[-1]


def make_folder(folder: Path) -> None:
    """Create the run's folder, so that one that cannot be written is noticed before training.

    Raises:
        OSError: saying which folder and what to do.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(f"cannot write to {folder}: {error.strerror}; choose another --trainer.default_root_dir") from error


def config_files(arguments: list[str]) -> Iterator[Path]:
    """Yield the files named after --config or -c."""
    for number, argument in enumerate(arguments):
        option, equals, value = argument.partition("=")
        if option in ("--config", "-c"):
            if not equals and number + 1 == len(arguments):
                raise ValueError("--config needs the name of a YAML file")
            yield Path(value if equals else arguments[number + 1])


def read_config_file(path: Path) -> dict[str, Any]:
    """Return the settings in a file, none of which are checked but for their groups' names.

    Raises:
        ValueError: if it is missing or malformed, saying what is wrong in which line.
    """
    try:
        content = yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"--config {path} cannot be read ({error.__class__.__name__}); name a YAML file") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" at line {mark.line + 1}" if mark else ""
        raise ValueError(f"--config {path} is not valid YAML{where}: {getattr(error, 'problem', error)}") from error
    if not isinstance(content, dict):
        raise ValueError(f"--config {path} holds no settings; it should have lines such as 'model:' and '  g_lr: 0.001'")
    groups = ("model", "data", "trainer", "images", "batchnorm", "metrics", "progress", "checkpoint")
    for name in content:
        if name not in (*groups, "seed_everything", "name", "ckpt_path", "verbose", "weights_only", "override"):
            raise ValueError(f"--config {path}: unknown group {name!r}; choose from {', '.join(groups)}")
        if name in groups and not isinstance(content[name], dict):
            raise ValueError(f"--config {path}: {name} should hold settings, not {content[name]!r}")
    return content


def given_settings(arguments: list[str], contents: list[dict[str, Any]], prefix: str) -> set[str]:
    """Return the names of the settings of a group, such as "model.", on the command line or in the contents of its files."""
    found = {match[1] for argument in arguments if (match := re.match(rf"--{re.escape(prefix)}(\w+)", argument))}
    for content in contents:
        found |= (content.get(prefix.removesuffix("."), {}) if prefix else content).keys()
    return found


def check_weights(gan: GAN, state: dict[str, torch.Tensor]) -> None:
    """Refuse a checkpoint's weights that do not fit the networks.

    Raises:
        ValueError: saying which.
    """
    shapes = {name: tuple(value.shape) for name, value in gan.state_dict().items()}
    saved = {name: tuple(value.shape) for name, value in state.items()}
    for name in shapes.keys() | saved.keys():
        if shapes.get(name) != saved.get(name):
            raise ValueError(
                f"the settings build {name} as {shapes.get(name, 'nothing')} and the checkpoint has "
                f"{saved.get(name, 'nothing')}: networks cannot be changed by --override; start a new run"
            )


def git_commit() -> str | None:
    """Return the commit of this source tree, with +changes if it was modified; None outside a repository."""
    command = ["git", "-C", str(REPOSITORY)]
    try:
        commit = subprocess.run([*command, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        status = subprocess.run([*command, "status", "--porcelain"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return None
    return f"{commit}+changes" if status else commit


def device_name(device: torch.device) -> str:
    """Return the card's name, or the processor's kind."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()


def shape_text(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape))


@contextmanager
def replaced_argv(argv: list[str]) -> Iterator[None]:
    original = sys.argv
    sys.argv = argv
    try:
        yield
    finally:
        sys.argv = original


def quieten() -> None:
    """Silence libraries' remarks that a user of this command can do nothing about."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    logging.getLogger("lightning.fabric").setLevel(logging.WARNING)
    # It tells which process has died and that the others are ended for that.
    logging.getLogger("lightning.fabric.strategies.launchers.subprocess_script").setLevel(logging.INFO)
    for message in (
        ".*does not have many workers.*",
        ".*were no .* available.*",
        ".*`tensorboardX` has been removed.*",
        ".*treespec, LeafSpec.*",
        ".*Metric `Frechet Inception Distance` will save all extracted features in buffer.*",
        ".*Metric `Kernel Inception Distance` will save all extracted features in buffer.*",
        ".*You are using a custom batch sampler.*",
        ".*sync_dist=True.*",
        ".*The number of training batches .* is smaller than the logging interval.*",
    ):
        warnings.filterwarnings("ignore", message=message)
