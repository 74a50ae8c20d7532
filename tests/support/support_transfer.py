"""A small model with everything that freezing has to mind."""

import torch
from torch import nn

from glomo.transfer import layer_groups


class Net(nn.Module):
    """An embedding, two layers with BatchNorm and dropout, a head; the head's weight is the embedding's."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(7, 4)
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.BatchNorm1d(4, affine=False))
            for _ in range(2)
        )
        self.head = nn.Linear(4, 3)

    def forward(self, units):
        x = self.embedding(units).mean(1)
        for layer in self.layers:
            x = x + layer(x)
        return self.head(x)


PATTERNS = ["embedding", r"layers\.(\d+)", "head"]


def net_and_groups():
    torch.manual_seed(0)
    net = Net()
    return net, layer_groups(net, PATTERNS)


def step(net, optimizer, seed=0):
    generator = torch.Generator().manual_seed(seed)
    units, labels = (torch.randint(n, (6, *shape), generator=generator) for n, shape in ((7, (5,)), (3, ())))
    optimizer.zero_grad(set_to_none=True)
    nn.functional.cross_entropy(net(units), labels).backward()
    optimizer.step()


def moved(net, before):
    """Names in the state_dict whose values are others than before."""
    return {name for name, value in net.state_dict().items() if not torch.equal(value, before[name])}


def copy_of(net):
    return {name: value.clone() for name, value in net.state_dict().items()}
