"""The truncation trick: latents within a threshold, distributed as if all others had been drawn anew."""

import torch

from bngan.truncation import truncated


def test_truncated_latents_are_those_of_a_truncated_normal() -> None:
    z = torch.randn(200_000, generator=torch.Generator().manual_seed(0))
    for threshold in (0.5, 1.0, 2.0):
        found = truncated(z, threshold)
        assert found.abs().max() <= threshold
        redrawn = z[z.abs() <= threshold]  # as BigGAN has them, who draws the others anew
        levels = torch.linspace(0.01, 0.99, 25)
        torch.testing.assert_close(found.quantile(levels), redrawn.quantile(levels), rtol=0, atol=0.02)
        assert (found.argsort() == z.argsort()).float().mean() > 0.99, "in the same order"
    torch.testing.assert_close(truncated(z, 9.0), z, rtol=0, atol=1e-4)
    assert truncated(torch.tensor([-60.0, 60.0]), 1.5).tolist() == [-1.5, 1.5]
