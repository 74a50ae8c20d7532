"""What a model's layers compute: the outputs of its submodules over a data set."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from glomo.nn.precision import at_least_fp32
from glomo.transfer.probing.evaluation import first_tensor, hooked, named, numbered, observing

Pool = Literal["units", "mean", "last", "max"]


def layer_features(
    model: nn.Module,
    modules: Sequence[str] | Literal["all"],
    batches: Iterable[Any],
    lengths: Iterable[Tensor] | None = None,
    pool: Pool = "units",
    batch_first: bool = True,
    forward: Callable[[Any], Any] | None = None,
    device: torch.device | str = "cpu",
) -> dict[str, Tensor]:
    """The outputs of submodules, detached, one batch behind the other:

    .. code-block:: text

        without lengths        outputs as they are, along the first dimension
        with lengths, units    (sum of lengths, dim): the units of each sequence in turn, padding left out
        with lengths, mean     (sequences, dim): mean_{t < n} x_t;    last: x_{n-1};    max: max_{t < n} x_t

    Meanwhile the model is in evaluation mode, without gradients; afterwards its modes and hooks are what they were. An
    output that is a tuple or a mapping (an LSTM's, Hugging Face's) counts by its first tensor. A module that runs
    several times in one pass has a `name`, a `name (2)`, ...

    Args:
        model: any module.
        modules: dotted names, as in `model.named_modules()`; "all": every module whose output can be taken so.
        batches: a tensor goes into the model as its argument, a tuple or list as several, a mapping as named ones.
        lengths: for each batch the lengths (B,) of its sequences, of at least 1; then outputs are (B, T, dim).
        pool: what becomes of the units of a sequence.
        batch_first: false: outputs are (T, B, dim).
        forward: is called with each batch in the place of the model, such as `model.hidden`.
        device: where the features go.

    Raises:
        ValueError: there is no module of a name, it did not run in each batch, its output has no fitting shape; there
            are more or fewer lengths than batches, or no batch.
        TypeError: `modules` is a text other than "all".
    """
    everything = modules == "all"
    if isinstance(modules, str) and not everything:
        raise TypeError(f"modules is the text {modules!r}; a list of names, or 'all', is needed")
    if pool not in ("units", "mean", "last", "max"):
        raise ValueError(f"pool is {pool!r}; units, mean, last or max is needed")
    if pool != "units" and lengths is None:
        raise ValueError(f"pool is {pool!r}, which needs the lengths of the sequences")
    names = [name for name, _ in model.named_modules() if name] if everything else list(modules)
    recorder = _Recorder(pool, batch_first, torch.device(device))
    count = 0
    with observing(model), hooked(named(model, names), recorder.place):
        for batch, own in _with_lengths(batches, lengths):
            count += 1
            recorder.begin(own)
            _run(forward or model, batch)
    if not count:
        raise ValueError("there is no batch; at least one is needed")
    return recorder.all_that_fit(count) if everything else recorder.features(names, count)


@dataclass
class _Recorder:
    """What hooks have seen."""

    pool: Pool
    batch_first: bool
    device: torch.device
    lengths: Tensor | None = None
    calls: Counter[str] = field(default_factory=Counter)
    found: dict[str, list[Tensor]] = field(default_factory=dict)
    misfits: dict[str, str] = field(default_factory=dict)
    """why an output cannot be taken"""

    def begin(self, lengths: Tensor | None) -> None:
        """A batch, of sequences of these lengths."""
        self.lengths = lengths
        self.calls.clear()

    def place(self, module: nn.Module, name: str) -> RemovableHandle:
        def record(module: nn.Module, inputs: Any, output: Any) -> None:
            self.calls[name] += 1
            title = numbered(name, self.calls[name])
            try:
                taken = _taken(first_tensor(output), self.lengths, self.pool, self.batch_first, self.device)
                self.found.setdefault(title, []).append(taken)
            except ValueError as error:
                self.misfits[title] = f"the output of {title} {error}"

        return module.register_forward_hook(record)

    def features(self, names: Sequence[str], batches: int) -> dict[str, Tensor]:
        """Of these modules, and their further calls. Raises ValueError for what cannot be taken."""
        titles = []
        for name in names:
            calls = 1
            while numbered(name, calls) in {**self.found, **self.misfits} or calls == 1:
                titles.append(numbered(name, calls))
                calls += 1
        return {title: self._joined(title, batches) for title in titles}

    def all_that_fit(self, batches: int) -> dict[str, Tensor]:
        features = {}
        for title in self.found:
            with suppress(ValueError):
                features[title] = self._joined(title, batches)
        return features

    def _joined(self, title: str, batches: int) -> Tensor:
        """All batches as one."""
        if title in self.misfits:
            raise ValueError(self.misfits[title])
        parts = self.found.get(title, [])
        if len(parts) != batches:
            raise ValueError(f"the module {title} ran in {len(parts)} of {batches} batches; it must run in each")
        shapes = {tuple(part.shape[1:]) for part in parts}
        if len(shapes) > 1:
            raise ValueError(
                f"the outputs of {title} are {sorted(shapes)} behind their first dimension, in different batches; one "
                "shape, or the lengths of the sequences, are needed"
            )
        return torch.cat(parts)


def _with_lengths(batches: Iterable[Any], lengths: Iterable[Tensor] | None) -> Iterable[tuple[Any, Tensor | None]]:
    if lengths is None:
        yield from ((batch, None) for batch in batches)
        return
    rest = iter(lengths)
    for number, batch in enumerate(batches, 1):
        own = next(rest, None)
        if own is None:
            raise ValueError(f"there are lengths for {number - 1} batches, but more batches; each needs its own")
        own = torch.as_tensor(own)
        if own.dim() != 1 or not len(own) or int(own.min()) < 1:
            raise ValueError(f"the lengths of batch {number} are {own.tolist()}; (B,) numbers of at least 1 are needed")
        yield batch, own
    if next(rest, None) is not None:
        raise ValueError(f"there are {number} batches, but lengths for more; each batch needs its own")


def _run(forward: Callable[..., Any], batch: Any) -> None:
    if isinstance(batch, Mapping):
        forward(**batch)
    elif isinstance(batch, (tuple, list)):
        forward(*batch)
    else:
        forward(batch)


def _taken(
    output: Tensor | None, lengths: Tensor | None, pool: Pool, batch_first: bool, device: torch.device
) -> Tensor:
    """A copy (the next module may work in place), padding left out. Raises ValueError where that cannot be."""
    if output is None or not output.is_floating_point():
        raise ValueError("is no tensor of features")
    output = output.detach()
    if lengths is None:
        return output.to(device, copy=True)
    lengths, shape = lengths.to(output.device), tuple(output.shape)
    if output.dim() >= 3 and not batch_first:
        output = output.transpose(0, 1)
    if output.dim() < 3 or output.size(0) != len(lengths) or output.size(1) < int(lengths.max()):
        wanted = f"({len(lengths)}, {int(lengths.max())} or more, dim)" if batch_first else "(T, B, dim)"
        raise ValueError(f"is {shape}; {wanted} is needed for {len(lengths)} sequences of these lengths")
    real = torch.arange(output.size(1), device=output.device) < lengths[:, None]
    if pool == "units":
        return output[real].to(device)
    if pool == "last":
        return output[torch.arange(len(lengths), device=output.device), lengths - 1].to(device)
    padding = ~real.reshape(*real.shape, *[1] * (output.dim() - 2))
    if pool == "max":
        return output.masked_fill(padding, float("-inf")).amax(1).to(device)
    wide = at_least_fp32(output.dtype)  # thousands of units are more than bf16 can add
    total = output.masked_fill(padding, 0).sum(1, dtype=wide)
    return (total / lengths.reshape(-1, *[1] * (total.dim() - 1))).to(device, output.dtype)
