"""Classes that no training example has: by their attributes, their names, or their phonemes."""

from glomo.transfer.zero_shot.attributes import AttributeTable
from glomo.transfer.zero_shot.conse import conse_embedding
from glomo.transfer.zero_shot.embedding import devise_loss, label_scores, max_hinge_loss, pull_loss
from glomo.transfer.zero_shot.lexicon import Lexicon
from glomo.transfer.zero_shot.metrics import GeneralisedAccuracy, generalised_accuracy, hit_at_k
from glomo.transfer.zero_shot.phonemes import aligned_word_scores, ctc_word_scores
from glomo.transfer.zero_shot.word_labels import label_vectors

__all__ = [
    "AttributeTable",
    "GeneralisedAccuracy",
    "Lexicon",
    "aligned_word_scores",
    "conse_embedding",
    "ctc_word_scores",
    "devise_loss",
    "generalised_accuracy",
    "hit_at_k",
    "label_scores",
    "label_vectors",
    "max_hinge_loss",
    "pull_loss",
]
