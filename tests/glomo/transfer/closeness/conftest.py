"""Small models that the tests of this folder share."""

import pytest
import torch
from torch import nn


class Net(nn.Module):
    """Embedding, LayerNorm, dropout, a linear layer, a head tied to the embedding, and what nothing reads."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(7, 4)
        self.norm = nn.LayerNorm(4)
        self.dropout = nn.Dropout(0.5)
        self.layer = nn.Linear(4, 4)
        self.head = nn.Linear(4, 7)
        self.head.weight = self.embedding.weight
        self.unused = nn.Parameter(torch.randn(2, 3))

    def forward(self, units):
        x = self.dropout(self.norm(self.embedding(units)))
        return self.head(torch.tanh(self.layer(x)).mean(1))


@pytest.fixture
def net():
    return Net()


@pytest.fixture
def make_net():
    return Net


@pytest.fixture
def units():
    return torch.randint(7, (11, 5), generator=torch.Generator().manual_seed(5))
