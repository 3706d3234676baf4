"""What is answered in a line: a person's mistake, and a run that has gone wrong."""


class UsageError(ValueError):
    """A person's mistake. The message says what is wrong, what is allowed, and what to do."""


class NonFiniteLoss(RuntimeError):
    """A loss, a weight or an image became NaN or infinite: nothing trained from here on would mean anything."""


def check_at_least(least: float, prefix: str = "", **values: float | None) -> None:
    """Refuse numbers below `least`; what is unset may stay so.

    Raises:
        UsageError: naming the setting, after the prefix.
    """
    for name, value in values.items():
        if value is not None and not value >= least:  # so NaN is refused too
            raise UsageError(f"{prefix}{name} must be at least {least:g}, got {value}")
