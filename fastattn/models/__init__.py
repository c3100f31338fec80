"""Example models on fastattn's ops, typed and tested like the rest."""

from fastattn.models.classifier import Classifier, ClassifierConfig
from fastattn.models.gpt import GPT, GPTConfig
from fastattn.models.layers import KVCache

__all__ = ["GPT", "Classifier", "ClassifierConfig", "GPTConfig", "KVCache"]
