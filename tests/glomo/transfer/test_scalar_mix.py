"""Scalar mix against its formula."""

import pytest
import torch

from glomo.transfer import ScalarMix


def test_the_formula():
    mix, layers = ScalarMix(3), torch.randn(3, 2, 5, 4)
    torch.testing.assert_close(mix(layers), layers.mean(0))
    with torch.no_grad():
        mix.weights.copy_(torch.tensor([0.0, 1.0, -2.0]))
        mix.gamma.fill_(0.7)
    e = torch.tensor([0.0, 1.0, -2.0]).exp()
    torch.testing.assert_close(mix(list(layers)), 0.7 * (e[:, None, None, None] * layers).sum(0) / e.sum())
    mix(layers).sum().backward()
    assert mix.weights.grad.any()
    assert mix.gamma.grad.any()


@pytest.mark.parametrize("layer_norm", [False, True])
def test_batch_mates_do_not_matter(layer_norm):
    mix, layers = ScalarMix(2, layer_norm), torch.randn(2, 3, 5, 4)
    other = layers.clone()
    other[:, 1:] *= 100
    torch.testing.assert_close(mix(layers)[0], mix(other)[0])
    if layer_norm:
        torch.testing.assert_close(mix(layers).mean(-1), torch.zeros(3, 5), atol=1e-6, rtol=0)


def test_mistakes():
    with pytest.raises(ValueError, match=r"2 layers of one shape are needed; given are \(2, 3\), \(2, 4\)"):
        ScalarMix(2)([torch.zeros(2, 3), torch.zeros(2, 4)])
    with pytest.raises(ValueError, match="layers is 0"):
        ScalarMix(0)
