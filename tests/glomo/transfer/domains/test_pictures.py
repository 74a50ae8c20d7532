"""Coordinates against numpy's eigenvectors; what is drawn is a picture."""

import sys

import numpy as np
import pytest
import torch

from glomo.plots import domain_map
from glomo.transfer.domains import project


@pytest.mark.parametrize("shape", [(2, 2), (3, 7), (9, 2), (20, 5)])
def test_pca(shape):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * torch.arange(
        1, shape[1] + 1
    )
    points = project(x)
    centred = x.numpy() - x.numpy().mean(0)
    values, vectors = np.linalg.eigh(centred.T @ centred)
    for column, (value, vector) in enumerate(zip(values[::-1][:2], vectors.T[::-1][:2], strict=True)):
        if value < 1e-9:  # two examples lie on a line
            assert points[:, column].abs().max() < 1e-9
            continue
        vector = vector * np.sign(vector[np.abs(vector).argmax()])
        np.testing.assert_allclose(points[:, column].numpy(), centred @ vector, atol=1e-9)
    assert torch.equal(points, project(x, seed=3))


def test_pca_of_one_dimension_and_of_equal_examples():
    assert project(torch.tensor([[1.0], [4.0]])).tolist() == [[-1.5, 0.0], [1.5, 0.0]]
    assert not project(torch.ones(3, 4)).any()


def test_dtypes():
    x = torch.randn(5, 3, generator=torch.Generator().manual_seed(0)).bfloat16().requires_grad_()
    points = project(x)
    assert points.dtype == torch.float32
    assert not points.requires_grad
    torch.testing.assert_close(points, project(x.float()))


def test_tsne_keeps_neighbours():
    generator = torch.Generator().manual_seed(0)
    groups = torch.randn(3, 1, 8, generator=generator) * 20 + torch.randn(3, 15, 8, generator=generator)
    points = project(groups.flatten(0, 1), "tsne", seed=1)
    assert points.shape == (45, 2)
    assert torch.equal(points, project(groups.flatten(0, 1), "tsne", seed=1))
    nearest = (torch.cdist(points, points) + torch.eye(45) * 1e9).argmin(1)
    assert torch.equal(nearest // 15, torch.arange(45) // 15)


@pytest.mark.parametrize("shape", [(2, 3), (7, 3), (200, 1)])
def test_tsne_of_few_examples_and_of_one_dimension(shape):
    points = project(torch.randn(shape, generator=torch.Generator().manual_seed(0)), "tsne", seed=5)
    assert points.shape == (shape[0], 2)
    assert bool(points.isfinite().all())


def test_without_scikit_learn(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.manifold", None)
    with pytest.raises(ImportError, match=r"'tsne' needs the package scikit-learn, which is not installed"):
        project(torch.randn(5, 3), "tsne")


def test_mistakes():
    with pytest.raises(ValueError, match=r"shape \(1, 4\); \(examples, dim\), at least 2"):
        project(torch.zeros(1, 4))
    with pytest.raises(ValueError, match=r"shape \(4,\)"):
        project(torch.zeros(4))
    with pytest.raises(ValueError, match=r"not finite"):
        project(torch.tensor([[1.0], [float("nan")]]))
    with pytest.raises(ValueError, match=r"method is 'umap'; 'pca' or 'tsne'"):
        project(torch.zeros(2, 4), "umap")


def test_the_map(tmp_path):
    before, after = torch.randn(6, 2), torch.randn(6, 2).bfloat16().requires_grad_().detach()
    path = tmp_path / "new" / "map.png"
    domain_map(before, after, ["a$b"] * 4 + ["c"] * 2, ["x", "y", "x", "y", "x", "x"], path)
    assert path.read_bytes().startswith(b"\x89PNG")
    assert path.stat().st_size > 5000
    with pytest.raises(ValueError, match=r"6 points before and 5 after, 6 domains and 6 classes"):
        domain_map(before, after[:5], ["a"] * 6, ["x"] * 6, path)
