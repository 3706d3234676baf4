"""What the samples are worth: plain torchmetrics on the features of a pinned network."""
