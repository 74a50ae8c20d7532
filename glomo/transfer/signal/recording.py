"""A teacher's outputs, computed once and kept in a file together with the fingerprint of the examples."""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from glomo.errors import UserError
from glomo.transfer.examples import all_outputs

Batch = Tensor | Sequence[Tensor]
"""the inputs of a model: one tensor, or several for `model(*inputs)`; the first dimension is the examples'"""


def record(model: nn.Module, batches: Iterable[Batch], path: str | os.PathLike[str]) -> Tensor:
    """Run a teacher over examples, in evaluation mode and without gradients, and write its outputs to a safetensors
    file. The modes of its modules are afterwards what they were.

    Args:
        model: gives one tensor (B, ...) for the inputs of a batch.
        batches: inputs, without labels, in the order of the examples; the sizes of the batches do not matter.
        path: the file, which is replaced if it is there.

    Returns:
        the outputs, (N, ...) on the CPU: row i is example i's, so that a shuffled batch takes `outputs[indices]`.

    Raises:
        TypeError: the model gives something else than one tensor.
        ValueError: there is no example; outputs are not one row for each, or of different shapes.
    """
    digest = hashlib.sha256()

    def noted() -> Iterator[tuple[Tensor, ...]]:
        for batch in batches:
            inputs = _inputs(batch)
            _add(digest, inputs)
            yield inputs

    outputs = all_outputs(model, noted())
    data = safetensors.torch.save({"outputs": outputs.contiguous()}, {"fingerprint": digest.hexdigest()})
    target = Path(path)
    temporary = target.with_name(f".tmp-{target.name}")  # a death while writing leaves the old file, or none
    temporary.write_bytes(data)
    temporary.replace(target)
    return outputs


def recorded(path: str | os.PathLike[str], batches: Iterable[Batch]) -> Tensor:
    """The outputs (N, ...) that `record` wrote, if they are those of these examples, in this order.

    Args:
        batches: inputs as given to `record`, in batches of any size. They are hashed, not run.

    Raises:
        UserError: (a ValueError) the file is no such record, or one of other examples.
        FileNotFoundError: there is no file.
    """
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            known = (file.metadata() or {})["fingerprint"]
            outputs: Tensor = file.get_tensor("outputs")
    except (safetensors.SafetensorError, KeyError) as error:
        raise UserError(f"{path} is no record of outputs, or is damaged ({error}); record them again") from None
    found = batches_fingerprint(batches)
    if found != known:
        raise UserError(
            f"{path} holds outputs for other examples: their fingerprint is {known[:12]}, and that of the given ones "
            f"{found[:12]}; the same examples in the same order are needed, or record them again"
        )
    return outputs


def batches_fingerprint(batches: Iterable[Batch]) -> str:
    """The sha256 (hex) of examples in their order, whatever the sizes of the batches; padding counts as content."""
    digest = hashlib.sha256()
    for batch in batches:
        _add(digest, _inputs(batch))
    return digest.hexdigest()


def _inputs(batch: Batch) -> tuple[Tensor, ...]:
    inputs = (batch,) if isinstance(batch, Tensor) else tuple(batch)
    sizes = [len(one) if isinstance(one, Tensor) and one.dim() else None for one in inputs]
    if not sizes or None in sizes or len(set(sizes)) != 1:
        raise ValueError(
            f"a batch must be tensors with as many examples each; the given one has {sizes or 'nothing'} (None stands "
            "for what is no tensor with a first dimension)"
        )
    return inputs


def _add(digest: hashlib._Hash, inputs: tuple[Tensor, ...]) -> None:
    kinds = "".join(f"{one.dtype}{tuple(one.shape[1:])}" for one in inputs).encode()
    columns = [one.detach().cpu().reshape(len(one), math.prod(one.shape[1:])).contiguous() for one in inputs]
    rows = [column.view(torch.uint8).numpy() for column in columns]
    for example in zip(*rows, strict=True):
        digest.update(b"".join([kinds, *(row.tobytes() for row in example)]))
