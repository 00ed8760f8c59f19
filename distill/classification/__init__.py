"""Text classification: labelled data and its label maps, class imbalance, augmentation of medical text, batches."""

from neural_layers.distill.classification.augmentation import MedicalTextAugmenter
from neural_layers.distill.classification.data import LabelledTexts, load_labelled
from neural_layers.distill.classification.imbalance import ClassBalance
from neural_layers.distill.classification.labels import LabelMap

__all__ = ["ClassBalance", "LabelMap", "LabelledTexts", "MedicalTextAugmenter", "load_labelled"]
