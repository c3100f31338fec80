"""Example models on fastattn's ops, typed and tested like the rest."""

from fastattn.models.classifier import Classifier, ClassifierConfig
from fastattn.models.gpt import GPT
from fastattn.models.gpt_config import GPTConfig
from fastattn.models.layers import KVCache
from fastattn.models.maps import AttentionMaps, attention_maps

__all__ = ["GPT", "AttentionMaps", "Classifier", "ClassifierConfig", "GPTConfig", "KVCache", "attention_maps"]
