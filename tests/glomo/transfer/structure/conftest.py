"""What the tests of this folder share."""

import pytest
import torch
from torch import nn

from glomo.transfer.structure import Adapter


def _stir(model, seed=0, std=0.5):
    """Adapters that do something: random weights, the same for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, Adapter):
            for parameter in module.parameters():
                values = torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * std
                parameter.data.copy_(values)
    return model


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture
def stir():
    return _stir


class Reader(nn.Module):
    """Every module that the inference of widths knows, in one model."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(11, 6, padding_idx=0)
        self.lstm = nn.LSTM(6, 5, num_layers=2, bidirectional=True, batch_first=True, proj_size=3)
        self.attention = nn.MultiheadAttention(6, 2, batch_first=True)
        self.norm = nn.LayerNorm(6)
        self.convolution = nn.Conv1d(6, 4, 3, padding=1)
        self.head = nn.Linear(4, 3)

    def forward(self, units):
        h = self.lstm(self.embedding(units))[0]
        h = self.norm(h + self.attention(h, h, h)[0])
        return self.head(self.convolution(h.transpose(1, 2)).mean(-1))


@pytest.fixture
def reader():
    torch.manual_seed(0)
    return Reader().double()


@pytest.fixture
def units():
    return torch.randint(1, 11, (3, 5), generator=torch.Generator().manual_seed(1))
