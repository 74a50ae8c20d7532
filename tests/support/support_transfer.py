"""A small model with everything that freezing has to mind, and its training in stages."""

import itertools

import torch
from torch import nn

from glomo.data import BucketBatches
from glomo.training.distributed import World
from glomo.training.loop import Task
from glomo.training.train_config import TrainConfig
from glomo.transfer import chain_thaw, gradual_unfreezing, layer_groups, sequential_unfreezing, slanted_triangular


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


ALONE = World(0, 1, torch.device("cpu"))
CONFIG = TrainConfig(
    steps=20,
    batch_size=4,
    lr=0.05,
    eval_every=2,
    checkpoint_every=3,
    progress=0,
    device="cpu",
    weight_decay=0.1,
    keep=99,
)
METHODS = {
    "gradual": lambda groups: gradual_unfreezing(groups, 20, 4, 0.05, schedule=slanted_triangular),
    "chain-thaw": lambda groups: chain_thaw(groups, 20, 0.05, 0.01, patience=1),
    "sequential": lambda groups: sequential_unfreezing(groups, 20, 3, 0.05, 0.01),
}


class Carried:
    """A row for each of the batch's examples."""

    def __init__(self):
        self.rows = torch.zeros(4, 2)

    def state_dict(self):
        return {"rows": self.rows}

    def load_state_dict(self, state):
        self.rows = state["rows"]


def make_task(method, hook=lambda step: None):
    torch.manual_seed(3)
    net, carried = Net(), Carried()
    generator = torch.Generator().manual_seed(1)
    units, labels = torch.randint(7, (30, 5), generator=generator), torch.randint(3, (30,), generator=generator)
    steps = itertools.count(1)

    def loss(indices, generator):
        hook(next(steps))
        carried.rows[: len(indices)] += 0.1 * torch.rand(len(indices), 2, generator=generator)
        value = nn.functional.cross_entropy(net(units[indices]), labels[indices])
        return value * (1 + carried.rows.mean()), len(indices), 5

    def validate():
        net.eval()
        with torch.no_grad():
            return {"valid_loss": float(nn.functional.cross_entropy(net(units), labels))}

    batches = BucketBatches([1] * 30, 4, 0)
    return Task(net, batches, loss, validate, groups=PATTERNS, stages=METHODS[method], carried=carried)
