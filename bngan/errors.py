"""What is answered in a line: a person's mistake, and a run that has gone wrong."""


class UsageError(ValueError):
    """A person's mistake. The message says what is wrong, what is allowed, and what to do."""


class NonFiniteLoss(RuntimeError):
    """A loss, a weight or an image became NaN or infinite: nothing trained from here on would mean anything."""
