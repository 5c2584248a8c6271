"""Root finding by halving."""

import torch

from scoresde.numerics import bisect


def test_bisect_inverts_elementwise():
    """Every entry of any shape is inverted on its own; ends may be numbers or tensors."""
    target = torch.linspace(-2, 2, 12, dtype=torch.float64).reshape(3, 4)
    got = bisect(torch.sinh, target, -3.0, torch.full_like(target, 4.0))
    torch.testing.assert_close(got, torch.asinh(target), rtol=0, atol=2e-15)
    assert bisect(torch.sinh, target.float(), -3.0, 4.0).dtype == torch.float64


def test_bisect_beyond_the_ends():
    """A target outside the function's values gives the nearest end."""
    got = bisect(lambda x: x, torch.tensor([-5.0, 5.0], dtype=torch.float64), 0.0, 2.0)
    torch.testing.assert_close(got, torch.tensor([0.0, 2.0], dtype=torch.float64), rtol=0, atol=1e-15)
