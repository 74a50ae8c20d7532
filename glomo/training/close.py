"""The [close] section of a recipe, and its penalties that keep weights near those of tune.init."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from glomo.data import AnyVocabulary
from glomo.errors import UserError
from glomo.nn.awd_lstm import LSTMLanguageModel
from glomo.nn.embedded import PAD
from glomo.nn.transformer import LanguageModel
from glomo.training import checkpoint
from glomo.training.config import check_range
from glomo.training.models import load_language_weights
from glomo.training.staging import Staging
from glomo.training.texts import running_units, unlabelled
from glomo.training.tune import Tune
from glomo.transfer.closeness import EWC, L2SP, ConservativeParameters, OnlineEWC, diagonal_fisher
from glomo.transfer.closeness.anchors import AnchoredPenalty
from glomo.transfer.structure.insertion import adapters

Loss = Callable[[list[int], torch.Generator], tuple[Tensor, int, int]]
BATCH = 16


@dataclass(frozen=True)
class Close:
    """The [close] section. Raises UserError for values out of range.

    The loss of a run has the penalty in it; in the rows of its metrics `penalty` says how much that is.
    """

    method: Literal["none", "l2-sp", "parameters", "ewc", "online-ewc", "outputs", "lwf"] = "none"
    """none; l2-sp, on weights; parameters, on all parameters of the language model; ewc, on those that its old texts
    depend on; online-ewc, also on those that the texts before them depend on, of which tune.init's run with ewc or
    online-ewc has kept record; outputs: on what the language model predicts in the texts that are read; lwf: on what
    the classifier in tune.init, whose head learns along, says of them"""
    strength: float = 0.1
    """alpha of l2-sp, lambda of the others (1 of lwf, as published); rows of units that are new to tune.init are held
    at its mean row. With 0 nothing is held, and weight decay works on these weights as it does without a penalty"""
    beta: float = 0.01
    """of l2-sp: strength on weights that tune.init lacks, towards zero"""
    gamma: float = 1.0
    """of online-ewc: how much what tune.init's run has kept counts"""
    text: tuple[str, ...] = ()
    """of ewc and online-ewc: files of the old texts, with commas between; they are read when a run begins"""
    dataset: str = ""
    """of ewc and online-ewc: or their name in the catalogue"""
    samples: int = 200
    """of ewc and online-ewc: pieces of the old texts that the Fisher information is taken of"""
    length: int = 70
    """of ewc and online-ewc: units in a piece"""

    def __post_init__(self) -> None:
        for name in ("strength", "beta"):
            check_range(f"close.{name}", getattr(self, name), 0)
        for name in ("samples", "length"):
            check_range(f"close.{name}", getattr(self, name), 1)
        check_range("close.gamma", self.gamma, 0, 1)

    def check(self, model: nn.Module, init: str) -> None:
        """Raises UserError without ``init``, and with adapters (then the old weights stay as they are anyway)."""
        if self.method == "none":
            return
        if not init:
            raise UserError(
                f"close.method is {self.method!r}, which keeps a model near that of tune.init; that is empty"
            )
        if adapters(model):
            raise UserError(
                f"close.method is {self.method!r}, but with adapter.kind the weights of tune.init stay as they are; "
                "give one of them"
            )

    def __bool__(self) -> bool:
        """Whether there is a penalty at all."""
        factors = (self.strength, self.beta) if self.method == "l2-sp" else (self.strength,)
        return self.method != "none" and any(factors)


class Penalty(NamedTuple):
    """What [close] adds to a run."""

    term: AnchoredPenalty
    """added to the loss, and saved with the run"""
    fill: Callable[[], None]
    """asks the old texts what the term remembers; for `Task.fill`"""


def make_penalty(
    close: Close,
    model: nn.Module,
    language_model: LSTMLanguageModel | LanguageModel,
    vocabulary: AnyVocabulary,
    init: str,
    seed: int,
    backward: bool = False,
) -> Penalty | None:
    """The penalty on weights that a recipe asks for, on a model that has the weights of ``init`` in its language model
    (or is it). The old texts are not read before `Penalty.fill` is called.

    Raises UserError as `Close.check`, and for ewc without old texts or with another vocabulary than that of ``init``;
    `Penalty.fill` for online-ewc where the run of ``init`` has kept nothing.
    """
    if not close:
        return None
    close.check(model, init)
    if close.method in ("outputs", "lwf"):
        return None
    if close.method == "parameters":
        return Penalty(ConservativeParameters(language_model, close.strength), _nothing)
    if close.method == "l2-sp":
        old = {id(p) for p in language_model.parameters()}
        source = {name: p for name, p in model.named_parameters() if id(p) in old}
        return Penalty(L2SP(model, source, close.strength, close.beta), _nothing)
    if not (close.text or close.dataset):
        raise UserError(f"close.method is {close.method!r}, which needs the old texts: close.text or close.dataset")
    before = load_language_weights(init).vocabulary
    if before.fingerprint != vocabulary.fingerprint:
        raise UserError(
            f"close.method is {close.method!r}, which needs the vocabulary of {init} ({len(before)} units), and this "
            f"one has {len(vocabulary)}; give --data.vocabulary init"
        )
    online = close.method == "online-ewc"
    penalty = OnlineEWC(language_model, close.strength, close.gamma) if online else EWC(language_model, close.strength)

    def fill() -> None:
        texts = unlabelled(close.text, (close.dataset,) if close.dataset else (), "text")
        generator = torch.Generator().manual_seed(seed)
        pieces = list(_pieces(texts, vocabulary, language_model, close, backward))
        if online:
            penalty.load_state_dict(_kept(init), strict=False)
        penalty.consolidate(diagonal_fisher(language_model, pieces, "sample", generator, _logits, PAD))

    return Penalty(penalty, fill)


def with_penalty(loss: Loss, penalty: AnchoredPenalty, noted: dict[str, float]) -> Loss:
    """A task's loss with the penalty on top: of each process's share, whose weights sum to 1. What it was is noted as
    "penalty"."""

    def penalised(indices: list[int], generator: torch.Generator) -> tuple[Tensor, int, int]:
        value, terms, units = loss(indices, generator)
        pull = penalty()
        noted["penalty"] = float(pull.detach())
        return value + pull, terms, units

    return penalised


def check_learns(
    close: Close, held: Collection[nn.Parameter], staging: Staging, idle: Iterable[nn.Parameter] = ()
) -> None:
    """Raises UserError where nothing that is held learns in any stage; ``idle`` are parameters that the loss does not
    depend on."""
    trained = {name for stage in staging.stages for name, rate in stage.rates.items() if rate}
    learning = {id(p) for group in staging.groups if group.name in trained for p in group.parameters.values()}
    if trained and not ({id(p) for p in held} & (learning - {id(p) for p in idle})):
        names = ", ".join(group.name for group in staging.groups if group.name in trained)
        raise UserError(
            f"close.method is {close.method!r}, but none of the {len(held)} parameters that it keeps near tune.init "
            f"ever learns, only these layer groups do: {names}; another tune.method is needed, or close.method = 'none'"
        )


def check_whole(close: Close, tune: Tune) -> None:
    """Raises UserError where layers are drawn anew, which would be held at random numbers."""
    if close and tune.layers >= 0:
        raise UserError(
            f"tune.layers is {tune.layers}, and close.method = {close.method!r} would hold the layers above at the "
            "random numbers that they start from; give one of them"
        )


def penalties_in(extras: nn.Module | None) -> list[AnchoredPenalty]:
    """The penalties among what a run keeps besides its model."""
    return [m for m in extras.modules() if isinstance(m, AnchoredPenalty)] if extras else []


def _kept(init: str) -> dict[str, Tensor]:
    """{"fisher.NAME": the Fisher information that a run of ewc or online-ewc has in its checkpoints}."""
    found = checkpoint.latest(Path(init) / "checkpoints")
    extras = found.state.get("extras", {}) if found and found.state else {}
    kept = {name.removeprefix("penalty."): value for name, value in extras.items()}
    fisher = {name: value for name, value in kept.items() if name.startswith("fisher.")}
    if not fisher:
        raise UserError(
            f"close.method is 'online-ewc', which adds to the Fisher information that the run in tune.init has kept, "
            f"and {init} has none in {Path(init) / 'checkpoints'}; begin with a run of ewc"
        )
    return fisher


def _nothing() -> None:
    """What remembers no more than weights needs nothing else."""


def _pieces(
    texts: list[str],
    vocabulary: AnyVocabulary,
    model: LSTMLanguageModel | LanguageModel,
    close: Close,
    backward: bool,
) -> Iterator[tuple[Tensor, Tensor]]:
    """(what is read, what follows), from places all over the texts, in the model's direction."""
    units = running_units(texts, vocabulary, model.end)
    if backward:
        units = units.flip(0)
    length, device = min(close.length, len(units) - 1), next(model.parameters()).device
    if isinstance(model, LanguageModel):
        length = min(length, model.config.max_length)
    room = len(units) - 1 - length
    starts = [room * n // max(1, close.samples - 1) for n in range(close.samples if room else 1)]
    for first in range(0, len(starts), BATCH):
        rows = (
            torch.stack([units[start : start + length + 1] for start in starts[first : first + BATCH]])
            .long()
            .to(device)
        )
        yield rows[:, :-1], rows[:, 1:]


def _logits(model: nn.Module, units: Tensor) -> Tensor:
    if isinstance(model, LSTMLanguageModel):
        return model.logits(model.encoder(units).raw)
    assert isinstance(model, LanguageModel)
    return model.logits(model.hidden(units))
