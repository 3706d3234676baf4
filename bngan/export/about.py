"""What does an exported file say of the network in it?"""

import json
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from bngan import __version__
from bngan.batchnorm.statistics import EvalStatistics
from bngan.errors import UsageError
from bngan.sampler import Weights
from bngan.settings import LARGEST_BATCH, Settings, check_settings

KEY = "bngan.network"  # under which each form has it
FORMAT = 1
MOST_CHANNELS = 4  # that a picture has
Network = Literal["generator", "discriminator"]


def current_versions(packages: Sequence[str] = ("torch",)) -> dict[str, str]:
    """Return the versions of Python, bngan and packages, by their names."""
    return {"python": platform.python_version(), "bngan": __version__, **{name: version(name) for name in packages}}


@dataclass(frozen=True)
class About:
    """What is known of an exported network.

    Attributes:
        settings: of its GAN.
        batch_size: how many images training normalized together.
        iteration: how many iterations it was trained for.
        weights: G's own or their moving average; None for D.
        statistics: what normalizes its samples, precise ones having been put into the running ones; None without batch norm.
        network: which of the two it is.
        folded: whether batch norm is part of the layers before it.
        checkpoint: the name of the file that it was in.
        sha256: of that file.
        recipe: the name of its run's experiment, as config.yaml has it; None where there is no run.
        metrics: of its samples by name, as measured at that iteration; empty where they were not.
        floor: the same of as many real images.
        versions: of the programs that wrote the file, by name.
    """

    settings: Settings
    batch_size: int
    iteration: int
    weights: Weights | None = None
    statistics: EvalStatistics | None = None
    network: Network = "generator"
    folded: bool = False
    checkpoint: str = ""
    sha256: str = ""
    recipe: str | None = None
    metrics: dict[str, float] = field(default_factory=dict)
    floor: dict[str, float] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=current_versions)

    def to_json(self) -> str:
        """Return it as text that `from_json` reads."""
        return json.dumps({"format": FORMAT, **asdict(self)})

    @classmethod
    def from_json(cls, text: str) -> "About":
        """Return what a text says, of a stranger's file perhaps: its settings are checked as those of a checkpoint are.

        Raises:
            UsageError: if a setting is out of range, or the format another version's.
            ValueError, TypeError: if it is no such text.
        """
        content: dict[str, Any] = json.loads(text)
        if (found := content.pop("format")) != FORMAT:
            raise UsageError(f"its format is {found!r}, and this version of bngan reads {FORMAT}; export it anew")
        about = cls(**{**content, "settings": Settings(**content["settings"])})
        check_types(about)
        check_types(about.settings)
        check_settings(about.settings)
        if (channels := about.settings.image_shape[0]) > MOST_CHANNELS:
            raise ValueError(f"its images have {channels} channels, and no picture has more than {MOST_CHANNELS}")
        if not 0 < about.batch_size <= LARGEST_BATCH:
            raise ValueError(f"it says that {about.batch_size} images were normalized together")
        return about


def check_types(known: About | Settings) -> None:
    """Refuse what is not of the type that its field is annotated with.

    Raises:
        ValueError: naming the field.
    """
    for name, kind in get_type_hints(type(known)).items():
        if not _fits(value := getattr(known, name), kind):
            raise ValueError(f"{name} cannot be {value!r}")


def _fits(value: Any, kind: Any) -> bool:
    origin, parts = get_origin(kind), get_args(kind)
    if origin is Literal:
        return value in parts
    if origin in (Union, UnionType):
        return any(_fits(value, part) for part in parts)
    if origin is tuple:
        return isinstance(value, tuple) and len(value) == len(parts) and all(map(_fits, value, parts))
    if origin is dict:
        return isinstance(value, dict) and all(_fits(pair, tuple[parts]) for pair in value.items())
    return type(value) in ((int, float) if kind is float else (kind,))
