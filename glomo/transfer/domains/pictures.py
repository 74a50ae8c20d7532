"""Features as points of a plane."""

from __future__ import annotations

from importlib import import_module
from typing import Literal

import torch
from torch import Tensor

from glomo.nn.precision import wide


def project(features: Tensor, method: Literal["pca", "tsne"] = "pca", seed: int = 0) -> Tensor:
    """Two coordinates for each example, (N, 2), on the CPU; `glomo.plots.domain_map` draws them.

    .. code-block:: text

        pca:  (X - mean) V_2, the two directions in which the features vary most
        tsne: a picture in which neighbours stay neighbours; distances between groups mean little

    A direction of `pca` has the sign that makes its largest number positive, so that pictures can be compared. `tsne`
    needs scikit-learn, and takes a perplexity of 30, or a third of the other examples if there are fewer than 90.

    Args:
        features: (N, dim), of all domains together; at least 2.
        method: "pca" or "tsne".
        seed: of `tsne`.

    Raises:
        ValueError: another shape, fewer than 2 examples, a feature that is no number, or an unknown method.
        ImportError: `tsne` without scikit-learn.

    Source: van der Maaten & Hinton, JMLR 2008 (t-SNE).
    """
    if features.dim() != 2 or len(features) < 2 or not features.size(1):
        raise ValueError(f"features have the shape {tuple(features.shape)}; (examples, dim), at least 2, are needed")
    features = wide(features.detach().cpu())
    if not bool(features.isfinite().all()):
        raise ValueError("features hold a number that is not finite; finite ones are needed")
    if method == "pca":
        return _principal(features)
    if method == "tsne":
        return _neighbours(features, seed)
    raise ValueError(f"method is {method!r}; 'pca' or 'tsne' is needed")


def _principal(features: Tensor) -> Tensor:
    centred = features - features.mean(0)
    directions = torch.linalg.svd(centred, full_matrices=False).Vh[:2]
    largest = directions.gather(1, directions.abs().argmax(1, keepdim=True))
    points = centred @ (directions * largest.sign()).T
    return torch.nn.functional.pad(points, (0, 2 - points.size(1)))  # features of one dimension have one direction


def _neighbours(features: Tensor, seed: int) -> Tensor:
    try:
        manifold = import_module("sklearn.manifold")
    except ImportError:
        raise ImportError(
            "method 'tsne' needs the package scikit-learn, which is not installed: pip install 'glomo[tsne]'"
        ) from None
    perplexity = min(30.0, (len(features) - 1) / 3)
    init = "pca" if min(features.shape) > 1 else "random"
    tsne = manifold.TSNE(n_components=2, perplexity=perplexity, init=init, random_state=seed)
    return torch.as_tensor(tsne.fit_transform(features.numpy()), dtype=features.dtype)
