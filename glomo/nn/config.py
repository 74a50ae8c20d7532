"""Settings of a GLoMo model: one frozen dataclass of plain values, and the two published presets."""

from __future__ import annotations

import dataclasses
import difflib
from dataclasses import dataclass
from typing import Any

from glomo.errors import UserError

_CHOICES = {
    "norm": ("layer", "none"),
    "sparsity": ("bias", "threshold"),
    "activation": ("relu2", "softmax", "uniform", "none", "rnn"),
    "distance_start": ("flat", "slopes"),
    "update": ("gru", "gru_product", "linear"),
    "objective": ("unit", "sentence"),
}
_AT_LEAST_ONE = ("vocab_size", "dim", "layers", "heads", "head_dim", "kernel_size", "horizon", "decoder_layers")
_AT_LEAST_ZERO = (
    "conv_blocks",
    "distance_bias",
    "positions",
    "sampled_softmax",
    "eps",
    "rescue_weight",
    "l1_weight",
    "rescue_margin",
    "rescue_targets",
)

# What the paper leaves open (sizes, start values) is taken from the released code; see `preset`.
_PRESETS: dict[str, dict[str, Any]] = {
    "paper": {},
    "released": {
        "sparsity": "threshold",
        "initial_bias": 0.0,
        "eps": 1e-16,
        "update": "gru_product",
        "positions": 20,
        "scale_grad_by_freq": True,
    },
}


@dataclass(frozen=True)
class GLoMoConfig:
    """Every setting of `glomo.nn.GLoMo`. Lengths count units (words, subwords, pixels); `0` switches an option off.

    Raises `UserError` for a value outside its range or choices.
    """

    vocab_size: int = 100_002
    """Number of unit ids, padding (0) and unknown (1) included."""
    dim: int = 512
    """Width d of embeddings and features."""
    layers: int = 3
    """Graph layers L per direction."""
    heads: int = 8
    """Heads H per layer; each aggregates d / H of the features."""
    head_dim: int = 256
    """Width E of the queries and keys of one head."""
    scaled_embedding: bool = False
    """Multiply embedded units by sqrt(dim), as Transformers do, but not where the embedding gives the logits. Without
    it a unit's own vector is small beside a normalised aggregate, and little is learned for long."""

    conv_blocks: int = 4
    """Causal convolution blocks in the key network and, apart from it, in the query network."""
    kernel_size: int = 3
    norm: str = "layer"
    """Normalisation inside a block: `layer` (over channels, so it sees one position only) or `none`."""
    sparsity: str = "bias"
    """`bias`: s = q.k + b_l (paper). `threshold`: s = q.k - w_l.q - c_l, the shift depends on the target (released)."""
    initial_bias: float = 1.0
    """Start value of b_l, and of -c_l. Above zero few rows start dead, and a dead row has no gradient."""
    scaled: bool = False
    """Divide q.k by sqrt(head_dim)."""
    eps: float = 1e-6
    """Added to the sum of squares that normalises a row."""
    activation: str = "relu2"
    """`relu2`; ablations: `softmax`, and without key and query networks `uniform` (every strictly earlier source
    equally), `none` (nothing is read: what a unit itself tells), and `rnn` (no graph, but a GRU of `layers` layers over
    the units in the place of the feature predictor: a language model to judge the graph's share of the loss by)."""

    value_projection: bool = False
    """The slices that the heads aggregate are of a linear map of the features (one per layer), not of the features."""
    update: str = "gru"
    """v: `gru` reads the aggregate a (paper), `gru_product` reads [a * f ; a] (released), `linear` is f + W_l a."""
    norm_aggregate: bool = False
    """LayerNorm on the aggregate before v."""
    coupled: bool = False
    """Ablation: queries and keys of layer l come from f^{l-1} instead of networks of their own."""

    objective: str = "unit"
    """`unit`: every unit predicts its next `horizon` units. Ablation `sentence`: see `glomo.nn.GLoMo`."""
    horizon: int = 3
    """D, the number of next units that one feature vector predicts (1 is the paper's ablation)."""
    positions: int = 0
    """Positions per sequence that enter the training loss, drawn anew each step; 0 takes all. Evaluation takes all."""
    decoder_layers: int = 2
    sampled_softmax: int = 0
    """In training the softmax is over the units that are predicted in the batch and so many drawn ones, which stand for
    all the rest; 0: over all. Evaluation takes all."""
    scale_grad_by_freq: bool = False
    """Divide the gradient of an embedding row by the unit's count in the batch (look-ups only)."""

    distance_bias: int = 0
    """Add to s a learned number per head and distance t - j; distances above this one share it."""
    distance_start: str = "flat"
    """Start values of these numbers: `flat`, zeros; `slopes`, the heads h of the first half of a layer have
    1 - initial_bias - 2 start_gain^2 (distance - 1) / 4^h, the others zeros: the first head then starts near to reading
    the unit next to its target alone, the second to the next four."""
    equal_bias: bool = False
    """Add to s two learned numbers per head, zeros at the start: one where the source is the target's unit again
    (x_j = x_t), one where it follows that unit (x_{j-1} = x_t; in the backward direction: stands before it in the
    text). Unknown units (1) are equal to none. The parameters are a tenth of the numbers, which so move ten times as
    fast. The op is given a bias of (B, heads, T, T), which it does without otherwise. No graph without keys has it."""
    keys_before: bool = False
    """The key of a unit comes from the units before it, without itself: a target can then read units that followed what
    it is itself."""
    tied_start: bool = False
    """The key network and its projection start as copies of the query's, so that scores start high between equal
    contexts."""
    start_gain: float = 1.0
    """Factor of the start values of what projects queries and keys: scores differ by its square more."""
    masked_sources: tuple[int, ...] = ()
    """Unit ids that no target may read, such as sentence marks, which otherwise act as sinks."""
    rescue_weight: float = 0.0
    """Weight of the dead-row rescue term, `glomo.nn.dead_row_rescue`."""
    rescue_margin: float = 0.5
    rescue_targets: int = 32
    """Targets per step that the rescue term and the one of `l1_weight` look at."""
    l1_weight: float = 0.0
    """Weight of the scores that count, `glomo.nn.graph_l1`: links that do not help enough fall to zero."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "masked_sources", tuple(int(i) for i in self.masked_sources))
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise UserError(f"model.{name} is {getattr(self, name)!r}; it must be one of {', '.join(choices)}.")
        for names, least in ((_AT_LEAST_ONE, 1), (_AT_LEAST_ZERO, 0)):
            for name in names:
                if not getattr(self, name) >= least:  # "not >=" also catches NaN
                    raise UserError(f"model.{name} is {getattr(self, name)!r}; it must be at least {least}.")
        for unit in self.masked_sources:
            if not 0 <= unit < self.vocab_size:
                raise UserError(
                    f"model.masked_sources names the unit {unit}; the units of this vocabulary are 0 to "
                    f"{self.vocab_size - 1}."
                )
        if self.dim % self.heads:
            raise UserError(f"model.dim is {self.dim}; it must be a multiple of model.heads, which is {self.heads}.")
        if (self.keys_before or self.tied_start) and not self.learns_graphs:
            raise UserError(
                f"model.keys_before and model.tied_start are of keys; model.activation {self.activation} has none."
            )
        if self.distance_start != "flat" and not self.distance_bias:
            raise UserError(
                f"model.distance_start is {self.distance_start}, but model.distance_bias, which starts so, is 0."
            )
        if self.coupled and (self.keys_before or self.tied_start):
            raise UserError("model.keys_before and model.tied_start are of networks, and a coupled model has none.")
        if self.rescue_weight and self.activation != "relu2":
            raise UserError(f"model.rescue_weight needs model.activation relu2; the activation is {self.activation}.")
        if self.l1_weight and self.activation != "relu2":
            raise UserError(f"model.l1_weight needs model.activation relu2; the activation is {self.activation}.")

    @property
    def learns_graphs(self) -> bool:
        """Whether there are queries and keys that learn."""
        return self.activation in ("relu2", "softmax")

    @property
    def scale(self) -> float:
        """The factor of q.k in the score."""
        return self.head_dim**-0.5 if self.scaled else 1.0

    @classmethod
    def preset(cls, name: str, **overrides: Any) -> GLoMoConfig:
        """The settings `paper` or `released`, with single values replaced, e.g. `preset("paper", vocab_size=5000)`.

        `paper`: the formulas of Yang et al. 2018 (arXiv 1806.05662): learned scalar bias, GRU cell on the aggregate.
        The paper's text leaves sizes open; they are those of the authors' code.
        `released`: what the authors' code computes with its published command, except for its BatchNorm inside the
        convolution blocks: in training mode that lets later units change earlier keys and queries, so LayerNorm
        stands in its place. Positions are drawn without replacement, and evaluation takes all of them.
        """
        if name not in _PRESETS:
            raise UserError(f"there is no preset {name!r}; there are {', '.join(_PRESETS)}.")
        return cls.from_dict({**_PRESETS[name], **overrides})

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> GLoMoConfig:
        """The inverse of `to_dict`; absent keys take their defaults, unknown keys are a `UserError`."""
        known = [field.name for field in dataclasses.fields(cls)]
        for key in values:
            if key not in known:
                near = difflib.get_close_matches(key, known, n=1, cutoff=0.0)[0]
                raise UserError(f"a GLoMo model has no setting {key!r}; the nearest one is {near!r}.")
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """Plain values only, fit for JSON and TOML."""
        return {**dataclasses.asdict(self), "masked_sources": list(self.masked_sources)}
