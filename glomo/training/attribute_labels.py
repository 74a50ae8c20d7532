"""Labels by their attributes in `glomo finetune` (names.method = "attributes"): direct attribute prediction."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from glomo.data.class_attributes import read_attributes
from glomo.errors import UserError
from glomo.training.config import nearest
from glomo.transfer.zero_shot import AttributeTable
from glomo.transfer.zero_shot.tables import check_distinct


class AttributeLabels(AttributeTable):
    """The classes that are trained on, by their attributes; the head gives one logit for each attribute.

    .. code-block:: text

        scores = sum_m log p(a_m = s_zm | x) - log p(a_m = s_zm)

    with the prior of these classes, whichever classes the scores are of. The loss is that of `AttributeTable`.
    """

    seen_prior: Tensor

    def __init__(self, classes: Sequence[str], signatures: Tensor) -> None:
        super().__init__(classes, signatures)
        # follows from the signatures
        self.register_buffer("seen_prior", self.prior(range(len(self.classes))), persistent=False)

    def forward(self, logits: Tensor, prior: Tensor | None = None) -> Tensor:
        """(B, attributes) -> (B, classes), with the prior of the seen classes unless another one is given."""
        return super().forward(logits, self.seen_prior if prior is None else prior)

    def check_same(self, signatures: Tensor) -> None:
        """Raises UserError where the seen classes have other attributes by now than those that were learned."""
        for name, learned, now in zip(self.classes, self.signatures.tolist(), signatures.tolist(), strict=True):
            if learned != now:
                raise UserError(
                    f"the class {name!r} has the attributes {_digits(now)} in names.attributes, and had "
                    f"{_digits(learned)} when the classifier was trained; the table of the training is needed"
                )


def attribute_tables(table: str, groups: Sequence[Sequence[str]]) -> list[Tensor]:
    """The signatures (names, attributes) of each group of names, out of a table that `read_attributes` knows.

    Raises ValueError for a name without a row, one that stands twice in its group, and what is wrong with the table:
    two rows of one class, or two classes with equal ones.
    """
    classes, _, signatures = read_attributes(table)
    known = AttributeTable(classes, signatures)
    places = {name: row for row, name in enumerate(known.classes)}
    found = []
    for group in groups:
        for name in group:
            if name not in places:
                raise UserError(f"there is no row for the class {name!r}{nearest(name, known.classes)}")
        rows = known.signatures[torch.tensor([places[name] for name in group])]
        check_distinct(group, rows, "signature")
        found.append(rows)
    return found


def _digits(row: Sequence[float]) -> str:
    return "".join(str(int(value)) for value in row)
