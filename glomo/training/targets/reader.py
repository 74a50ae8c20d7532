"""A compact reader of paragraphs: where in a paragraph does the answer to a question stand?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from glomo.nn import Graphs
from glomo.nn.baselines import GraphSource
from glomo.training.targets.contextual import ContextFeatures
from glomo.training.targets.layers import BiRNN, PairTransfer, padding
from glomo.training.targets.words import WordFeatures


class SpanReader(nn.Module):
    """Bi-attention between a paragraph p (T units) and a question q (J units), both encoded by one BiLSTM:

    .. code-block:: text

        S[t, j] = w_1 . p_t + w_2 . q_j + w_3 . (p_t * q_j)
        u_t = sum_j softmax_j(S[t, .]) q_j,      h = sum_t softmax_t(max_j S[t, j]) p_t
        M = BiLSTM(relu(W [p ; u ; p * u ; p * h])),      start_t = a . [M_t ; p_t ; u_t],      end from BiLSTM(M) so

    The graph is applied to the features of the units (`states=False`: GLoMo on embeddings) or to the states p, q of the
    BiLSTM (`states=True`: on RNN states), over paragraph and question as one row (`joined`) or over each.

    Source: Seo et al., ICLR 2017 (BiDAF), with one modelling layer and narrower layers.
    """

    def __init__(
        self,
        features: WordFeatures | ContextFeatures,
        graph: GraphSource,
        joined: bool = True,
        states: bool = False,
        hidden: int = 64,
        dropout: float = 0.2,
        **mixing: Any,
    ) -> None:
        super().__init__()
        self.features, self.on_states = features, states
        width = 2 * hidden
        self.transfer = PairTransfer(graph, width if states else features.dim, joined, **mixing)
        self.encoder = BiRNN(features.dim if states else self.transfer.out_dim, width, nn.LSTM)
        width_of = self.transfer.out_dim if states else width
        self.of_paragraph, self.of_question = nn.Linear(width_of, 1), nn.Linear(width_of, 1, bias=False)
        self.of_both = nn.Parameter(torch.empty(width_of).uniform_(-(width_of**-0.5), width_of**-0.5))
        self.narrow = nn.Linear(4 * width_of, width)
        self.modelling, self.ending = BiRNN(width, width, nn.LSTM), BiRNN(width, width, nn.LSTM)
        self.start, self.end = nn.Linear(width + 2 * width_of, 1), nn.Linear(width + 2 * width_of, 1)
        self.dropout = nn.Dropout(dropout)

    def layer_patterns(self) -> dict[str, str]:
        """The layer groups, from the bottom to the top."""
        above = {
            "attention": "of_paragraph|of_question|of_both|narrow",
            "modelling": "modelling|ending",
            "head": "start|end",
        }
        below = ("encoder", "graph") if self.on_states else ("graph", "encoder")
        named = {"embedding": "features", "graph": "transfer", "encoder": "encoder"}
        has = {name for name, _ in self.named_children() if any(True for _ in self.get_submodule(name).parameters())}
        return {name: named[name] for name in ("embedding", *below) if named[name] in has} | above

    def forward(
        self,
        paragraph: tuple[Tensor, Tensor],
        question: tuple[Tensor, Tensor],
        graph_inputs: Sequence[Sequence[Graphs]],
    ) -> tuple[Tensor, Tensor]:
        """Scores `(B, T)` of the answer's first unit and of its last one, -inf behind the paragraph.

        Each text is (rows of the table `(B, T)`, lengths `(B,)` of at least 1); `graph_inputs` as in `PairTransfer`.
        """
        lengths = [n for _, n in (paragraph, question)]
        texts = [self.dropout(self.features(units)) for units, _ in (paragraph, question)]
        for graph in (False, True) if self.on_states else (True, False):
            if graph:
                texts = list(self.transfer((texts[0], lengths[0]), (texts[1], lengths[1]), graph_inputs))
            else:
                texts = [self.dropout(self.encoder(x, n)) for x, n in zip(texts, lengths, strict=True)]
        p, q = texts
        behind_p, behind_q = padding(lengths[0], p.shape[1]), padding(lengths[1], q.shape[1])
        scores = self.of_paragraph(p) + self.of_question(q).mT + (p * self.of_both) @ q.mT
        scores = scores.masked_fill(behind_q[:, None], float("-inf"))
        u = scores.softmax(-1) @ q
        best = scores.amax(-1).masked_fill(behind_p, float("-inf"))
        h = (best.softmax(-1)[:, None] @ p).expand_as(p)
        both = self.dropout(self.narrow(torch.cat([p, u, p * u, p * h], -1)).relu())
        modelled = self.dropout(self.modelling(both, lengths[0]))
        ended = self.dropout(self.ending(modelled, lengths[0]))
        start = self.start(torch.cat([modelled, p, u], -1))[..., 0].masked_fill(behind_p, float("-inf"))
        end = self.end(torch.cat([ended, p, u], -1))[..., 0].masked_fill(behind_p, float("-inf"))
        return start, end


def span_loss(start: Tensor, end: Tensor, spans: Tensor) -> Tensor:
    """The mean over the batch of the cross-entropies (nats) of the first and of the last unit of `spans (B, 2)`."""
    return F.cross_entropy(start, spans[:, 0]) + F.cross_entropy(end, spans[:, 1])


def best_spans(start: Tensor, end: Tensor, longest: int) -> Tensor:
    """`(B, 2)`: first and last unit of the span with the greatest start + end, of at most `longest` units."""
    together = start.log_softmax(-1)[:, :, None] + end.log_softmax(-1)[:, None]
    size = start.shape[1]
    allowed = torch.ones(size, size, dtype=torch.bool, device=start.device).triu().tril(longest - 1)
    best = together.masked_fill(~allowed, float("-inf")).flatten(1).argmax(-1)
    return torch.stack([best // size, best % size], -1)
