"""fit, validate, test and predict: Lightning's command line around GAN and ImageDataModule, one folder per run."""

import json
import logging
import os
import platform
import re
import secrets
import shlex
import shutil
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator, Set
from contextlib import contextmanager, nullcontext
from importlib.metadata import version
from inspect import signature
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml
from jsonargparse import set_parsing_settings
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.plugins.environments import SLURMEnvironment
from lightning.pytorch.profilers import PassThroughProfiler

from bngan import distributed
from bngan.callbacks import BatchNormStatistics, Checkpoints, Dashboard, Quality, RunProgress, SampleImages, WholeCheckpoints
from bngan.data import ImageDataModule
from bngan.distributed import SynchronizedBatchNorms
from bngan.gan import GAN
from bngan.jobs import interrupted_run, join_job
from bngan.memory import keep_freed_memory
from bngan.sampling import check_networks, config_beside, other_shape, read_checkpoint
from bngan.trainer_settings import PROFILERS, as_list, check_trainer_settings

REPOSITORY = Path(__file__).resolve().parents[1]
DEFAULT_CONFIG = REPOSITORY / "configs" / "default.yaml"
GROUPS = ("model", "data", "trainer", "images", "batchnorm", "metrics", "progress", "checkpoint")


# Of glibc's malloc.h.


class Kept(NamedTuple):
    """What a run that goes on does with the settings of a group that it was begun with.

    Attributes:
        binding: they decide what training comes to or what is measured of it, so others are refused without --override.
        left: they come from elsewhere or depend on the machine, so they are as given now. All others are as they were, or as
            given now.
    """

    binding: Set[str] = frozenset()
    left: Set[str] = frozenset()


# By group, "" for settings in none. The run's config.yaml has those of trainer and below, the checkpoint itself the others.
KEPT = {
    "": Kept(binding={"seed_everything"}),
    "model": Kept(binding=signature(GAN).parameters.keys() - {"compile"}, left={"image_shape", "seed"}),
    "data": Kept(
        binding={"name", "image_size", "channels", "batch_size"},
        left={"root", "num_workers", "in_memory_gb", "predict_samples", "seed", "updates_per_batch", "parts_per_update"},
    ),
    "trainer": Kept(
        binding={"precision", "sync_batchnorm", "limit_train_batches", "limit_val_batches"},
        left={"accelerator", "devices", "num_nodes", "strategy", "default_root_dir", "fast_dev_run"},
    ),
    "images": Kept(),
    "batchnorm": Kept(),
    "metrics": Kept(binding={"num_samples", "feature", "seed"}),
    "checkpoint": Kept(binding={"monitor", "mode"}),
}
# What else a value is written as; of limits 1 is not the same as 1.0.
SAME: dict[str, dict[str, str]] = {
    "trainer.precision": {"None": "32-true", "32": "32-true", "64": "64-true", "16": "16-mixed", "bf16": "bf16-mixed"},
    "trainer.limit_train_batches": {"None": "1.0"},
    "trainer.limit_val_batches": {"None": "1.0"},
}
# Settings of a run that may name code, and what they may say without doing so.
CODELESS: dict[str, tuple[object, ...]] = {
    "trainer.callbacks": (None, []),
    "trainer.logger": (None, True, False, []),
    "trainer.plugins": (None, []),
    "trainer.profiler": (None, *PROFILERS),
    "metrics.feature": ("digits", "inception"),
}


class GanCLI(LightningCLI):
    """LightningCLI with one folder per run and settings that a checkpoint brings along."""

    def __init__(self, arguments: list[str]) -> None:
        self.arguments = arguments
        self._saved_place: dict[str, int] = {}
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
                arguments[0]: {"default_config_files": [str(DEFAULT_CONFIG)], **parser_options},
            },
            args=arguments,
            auto_configure_optimizers=False,
            # It would store the name of a function in the checkpoint, to be imported and called when that is loaded.
            load_from_checkpoint_support=False,
        )

    def subcommands(self) -> dict[str, set[str]]:
        """Leave out the subcommands that are not asked for: each parser of all settings takes 60 ms to build."""
        return {name: skipped for name, skipped in super().subcommands().items() if name == self.arguments[0]}

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
        refuse_whole_groups(self.arguments)
        self.contents = [read_config_file(path) for path in config_files(self.arguments)]
        # Lightning lets settings be read from any address that fsspec knows.
        set_parsing_settings(config_read_mode_fsspec_enabled=False, config_read_mode_urls_enabled=False)
        # Lightning warns whenever arguments are handed over rather than read from sys.argv.
        with replaced_argv(["bngan"]):
            super().parse_arguments(parser, args)

    def _parse_ckpt_path(self) -> None:
        """Take the settings of the checkpoint and of its run where none are given; refuse those that contradict it."""
        settings = self.config[self.config.subcommand]
        fit = self.config.subcommand == "fit"
        if settings.ckpt_path == "last":
            settings.ckpt_path = str(newest_checkpoint(Path(settings.trainer.default_root_dir or "runs"), settings.name))
        if fit and settings.ckpt_path is not None and "name" not in self._given(""):
            config = config_beside(Path(settings.ckpt_path))
            settings.name = settings.name if config is None else str(read_config_file(config).get("name", settings.name))
        self._find_interrupted_run()
        if settings.ckpt_path is None:
            if not fit:
                raise ValueError(f"{self.config.subcommand} needs a checkpoint: add --ckpt_path RUN/checkpoints/best.ckpt")
            return
        path = Path(settings.ckpt_path)
        content = read_checkpoint(path)
        check_networks(path, content)
        if fit:
            check_training(path, content)
        model = content["hyper_parameters"]
        self._saved_iteration = int(content["state_dict"]["iteration"])
        self._saved_shape = tuple(model["image_shape"])
        self._saved_state = content["state_dict"]
        if fit:
            self._saved_place = place_in_data(content["loops"]["fit_loop"])
        # Whatever else a stranger's checkpoint has there is left where it is.
        data = content.get("datamodule_hyper_parameters", {})
        data = {name: data[name] for name in signature(ImageDataModule).parameters if name in data}
        found = {"": {"seed_everything": model["seed"]}, "model": model, "data": data}
        if fit:
            found |= self._run_settings(path)
        for group, known in found.items():
            prefix = f"{group}." if group else ""
            found[group] = {name: value for name, value in known.items() if name not in KEPT[group].left}
            for name in self._given(prefix) & found[group].keys():
                saved, given = found[group].pop(name), settings[prefix + name]
                # Measuring may use other data.
                binding = name in KEPT[group].binding and (fit or group != "data")
                if binding and not settings.override and not is_same(prefix + name, given, saved):
                    raise ValueError(
                        f"--{prefix}{name} {given} contradicts the run of {path}, which has {saved}; leave it out, add "
                        "--override to go on with it all the same, or start a new run"
                    )
        self.config = self.parser.parse_object({self.config.subcommand: {**found.pop(""), **found}}, self.config)
        settings = self.config[self.config.subcommand]
        group = data.get("alternations_per_step") or 1  # where it is unset and steps are counted through epochs, it is 1
        counted = fit and settings.trainer.check_val_every_n_epoch is None
        if counted and (settings.data.alternations_per_step or 1) != group:
            raise ValueError(
                f"--data.alternations_per_step must stay {group} where --trainer.check_val_every_n_epoch is null, which counts "
                "steps from the run's beginning"
            )

    def _given(self, prefix: str) -> set[str]:
        return given_settings(self.arguments, self.contents, prefix)

    def _run_settings(self, checkpoint: Path) -> dict[str, dict[str, Any]]:
        """Return the settings that the run which made the checkpoint has in its config.yaml alone, by group.

        Raises:
            ValueError: if any that is not given anew would run code.
        """
        path = config_beside(checkpoint)
        if path is None:
            lone = f"{checkpoint} lies in no run's folder, beside its config.yaml and run.json"
            print(f"{lone}, so how long to train and what to log are as given or as by default.", flush=True)
            return {}
        record = read_config_file(path)
        found = {group: record[group] for group in KEPT if group in record and group not in ("model", "data")}
        # A folder from a stranger must not decide which code is run.
        coded = [
            f"{group}.{name}"
            for group, values in found.items()
            for name in values.keys() - KEPT[group].left - self._given(f"{group}.")
            if values[name] not in CODELESS.get(f"{group}.{name}", (values[name],)) or "." in str(name)
        ]
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
        if hasattr(self, "_saved_state") and (odd := other_shape(self.model.state_dict(), self._saved_state)):
            raise ValueError(f"{odd}: networks cannot be changed by --override; start a new run")
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
        if settings.profiler is None:
            kwargs["profiler"] = NoProfiler()
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
        self.datamodule.resumed = self._saved_place
        if self.model.compiled:
            self._check_compile()
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

    def _check_compile(self) -> None:
        """Refuse --model.compile where torch.compile would fail, which takes a minute and hundreds of lines."""
        synchronized = self.config_init[str(self.subcommand)].trainer.sync_batchnorm
        if self.trainer.world_size > 1 and synchronized and any(self.model.batch_norms()):
            raise ValueError(
                "--model.compile cannot be combined with batch norm over several devices, whose messages cannot be compiled; "
                "leave it out, or add --trainer.sync_batchnorm false"
            )
        compiler = os.environ.get("CXX", "g++")
        if self.trainer.strategy.root_device.type == "cpu" and shutil.which(compiler) is None:
            raise ValueError(
                f"--model.compile needs a C++ compiler, and there is no {compiler}; install g++, set CXX, or leave it out"
            )

    def after_fit(self) -> None:
        validated = self.trainer.fit_loop.epoch_loop.val_loop._has_run
        if self.model.iterations_done == self._saved_iteration and not validated:
            self._say("Nothing was left to do; to train longer raise --trainer.max_epochs or --trainer.max_steps.")
        self._say(f"Done: {self.run_folder}")

    def _say(self, line: str) -> None:
        if self.trainer.is_global_zero:
            print(line, flush=True)


class NoProfiler(PassThroughProfiler):
    """Times nothing. Lightning's own makes a new context for each of the 50 things that it would time in a step."""

    _context = nullcontext()

    def profile(self, action_name: str) -> Any:
        """Return a context that does nothing."""
        return self._context


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
    keep_freed_memory()
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


def refuse_whole_groups(arguments: list[str]) -> None:
    """Refuse settings that are given as a group, in which none could be told from those that a checkpoint brings along.

    Raises:
        ValueError: saying how to give them.
    """
    for argument in arguments:
        if (option := argument.partition("=")[0].rstrip("+")) in [f"--{group}" for group in GROUPS]:
            raise ValueError(
                f"{option} is not taken as a whole; give settings one by one, {option}.NAME VALUE, or by --config FILE"
            )


def config_files(arguments: list[str]) -> Iterator[Path]:
    """Yield the files named after --config or -c, to which a name may be joined."""
    for number, argument in enumerate(arguments):
        option, _, value = argument.partition("=")
        if argument.startswith("-c"):
            option, value = "-c", argument[2:].removeprefix("=")
        if option in ("--config", "-c"):
            if not value and number + 1 == len(arguments):
                raise ValueError("--config needs the name of a YAML file")
            yield Path(value or arguments[number + 1])


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
    for name in content:
        if name not in (*GROUPS, "seed_everything", "name", "ckpt_path", "verbose", "weights_only", "override"):
            raise ValueError(f"--config {path}: unknown group {name!r}; choose from {', '.join(GROUPS)}")
        if name in GROUPS and not isinstance(content[name], dict):
            raise ValueError(f"--config {path}: {name} should hold settings, not {content[name]!r}")
    return content


def given_settings(arguments: list[str], contents: list[dict[str, Any]], prefix: str) -> set[str]:
    """Return the names of the settings of a group, such as "model.", on the command line or in the contents of its files."""
    found = {match[1] for argument in arguments if (match := re.match(rf"--{re.escape(prefix)}(\w+)", argument))}
    for content in contents:
        found |= (content.get(prefix.removesuffix("."), {}) if prefix else content).keys()
    return found


def check_training(checkpoint: Path, content: dict[str, Any]) -> None:
    """Refuse a checkpoint that has the networks but not all that their training needs to go on: the Trainer would not say so.

    Raises:
        ValueError: saying what is missing.
    """
    iteration = int(content["state_dict"]["iteration"])
    loops, optimizers = content.get("loops"), content.get("optimizer_states")
    if not isinstance(loops, dict) or not isinstance(loops.get("fit_loop"), dict):
        reason = "it does not say how far its epoch was (loops)"
    elif not isinstance(optimizers, list) or len(optimizers) != 2:
        reason = f"it has the states of {len(optimizers) if isinstance(optimizers, list) else 0} optimizers, not of 2"
    elif not all(isinstance(state, dict) and state.get("param_groups") and state.get("state") for state in optimizers):
        reason = "one of its optimizers' states is empty"
    elif content.get("global_step") != iteration:
        reason = f"its networks are of iteration {iteration}, and the rest of it of {content.get('global_step')}"
    else:
        return
    raise ValueError(f"{checkpoint} is damaged, and training cannot go on from it: {reason}; use another one")


def place_in_data(fit_loop: dict[str, Any]) -> dict[str, int]:
    """Return what a checkpoint's loader says of its place in the data, or nothing if it says none."""
    state = fit_loop.get("state_dict")
    loaders = state.get("combined_loader") if isinstance(state, dict) else None
    place = loaders[0] if isinstance(loaders, list) and loaders else None
    return place if isinstance(place, dict) and isinstance(place.get("batches"), int) else {}


def is_same(name: str, given: Any, saved: Any) -> bool:
    """Tell whether two values of a setting mean the same."""
    if name not in SAME:
        return given == saved
    one, other = (SAME[name].get(str(value), str(value)) for value in (given, saved))
    return one == other


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
