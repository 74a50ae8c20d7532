"""Several processes, one model each, on shares of every batch: what `torchrun` starts. One process needs none of it."""

from __future__ import annotations

import atexit
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from glomo.errors import UserError
from glomo.nn.transformer_layers import Layer

State = TypeVar("State")


@dataclass(frozen=True)
class World:
    """Which process this is, of how many, and the device it computes on. Every method is a no-op when ``size`` is 1."""

    rank: int
    size: int
    device: torch.device

    def sum(self, values: list[float]) -> list[float]:
        """The sum of each number over all processes."""
        if self.size == 1:
            return values
        total = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        return total.tolist()

    def sum_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Replace every gradient by its sum over all processes; a missing one counts as zero, unless all lack it."""
        if self.size == 1:
            return
        trained = [p for p in parameters if p.requires_grad]
        counts = trained[0].new_tensor([p.grad is not None for p in trained])
        flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).reshape(-1) for p in trained] + [counts])
        dist.all_reduce(flat)
        *parts, counts = flat.split([p.numel() for p in trained] + [len(trained)])
        for parameter, part, count in zip(trained, parts, counts.tolist(), strict=True):
            parameter.grad = part.view_as(parameter) if count else None

    def mean_statistics(self, model: nn.Module) -> None:
        """Replace BatchNorm's running statistics, which each process takes of its own share, by their mean."""
        if self.size == 1:
            return
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None:
                for statistic in (module.running_mean, module.running_var):
                    assert statistic is not None
                    dist.all_reduce(statistic)
                    statistic /= self.size

    def rows(self, own: dict[str, Tensor]) -> dict[str, Tensor]:
        """Tensors of which this process has every `size`-th row, with all rows; every process has to ask."""
        if self.size == 1:
            return own
        parts: list[Any] = [None] * self.size
        dist.all_gather_object(parts, {name: t.cpu() for name, t in own.items()})
        whole = {}
        for name, t in own.items():
            whole[name] = t.new_empty(sum(len(part[name]) for part in parts), *t.shape[1:], device="cpu")
            for rank, part in enumerate(parts):
                whole[name][rank :: self.size] = part[name]
        return whole

    def shard(self, model: nn.Module) -> bool:
        """Divide the model's parameters among the processes (FSDP2), the Transformer's layer by layer; whether there
        is anybody to share with. Gradients and an optimizer's moments follow, and no process holds all of them."""
        if self.size == 1:
            return False
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh(self.device.type, (self.size,))
        for layer in [module for module in model.modules() if isinstance(module, Layer)]:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
        return True

    def whole(self, state: State) -> State:
        """Plain values with divided tensors put together; every process has to ask."""
        if self.size == 1:
            return state
        from torch.distributed.tensor import DTensor

        return tree_map_only(DTensor, lambda t: t.full_tensor(), state)

    def divided(self, whole: Tensor, like: Tensor) -> Tensor:
        """This process's share of a tensor that all have, if `like`, of the same shape, is divided."""
        if self.size == 1:
            return whole
        from torch.distributed.tensor import DTensor, distribute_tensor

        if not isinstance(like, DTensor) or like.shape != whole.shape:
            return whole
        return distribute_tensor(whole.to(self.device), like.device_mesh, like.placements, src_data_rank=None)

    def load(self, model: nn.Module, weights: dict[str, Tensor]) -> None:
        """model.load_state_dict of whole tensors."""
        here = model.state_dict()
        model.load_state_dict({name: self.divided(t, here.get(name, t)) for name, t in weights.items()})

    def load_optimizer(self, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
        """optimizer.load_state_dict of whole tensors."""
        parameters: Sequence[Tensor] = [p for group in optimizer.param_groups for p in group["params"]]
        divided = {
            number: {
                name: self.divided(v, parameters[number]) if isinstance(v, Tensor) else v for name, v in of.items()
            }
            for number, of in state["state"].items()
        }
        optimizer.load_state_dict({**state, "state": divided})

    def from_first(self, value: float | str | None) -> float | str | None:
        """The first process's ``value``, in every process."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, device=self.device)
        return box[0]


def is_first() -> bool:
    """Whether this process is the one that writes and talks."""
    return os.environ.get("RANK", "0") == "0"


def join(device: str = "auto") -> World:
    """Join the processes that `torchrun` started (gloo on the CPU, NCCL on GPUs), or be alone.

    ``device``: "auto" takes a GPU when there is one. Raises UserError for a device that is unknown or not there.
    """
    if device not in ("auto", "cpu", "cuda"):
        raise UserError(f"train.device is {device!r}; it must be auto, cpu or cuda")
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("train.device is 'cuda', but PyTorch finds no CUDA GPU here; auto or cpu is needed")
    size, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and size > 1:
        device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
        torch.cuda.set_device(device)
    if size > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if device.startswith("cuda") else "gloo")
        atexit.register(dist.destroy_process_group)
    return World(rank, size, torch.device(device))
