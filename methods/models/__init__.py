"""Model families in flax linen, their checkpoints, and the hook through which methods enter them."""

import os

os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # it would say that there is no PyTorch

from methods.models.decoder import Decoder, DecoderConfig
from methods.models.encoder import Encoder, EncoderConfig
from methods.models.gpt import GPT, GPTConfig
from methods.models.heads import Classifier
from methods.models.hooks import ACTIVATION_SITES, LINEAR_SITES, SITES, Chain, Hook, identity
from methods.models.loading import HFNames, Pretrained, load

__all__ = [
    "ACTIVATION_SITES",
    "GPT",
    "LINEAR_SITES",
    "SITES",
    "Chain",
    "Classifier",
    "Decoder",
    "DecoderConfig",
    "Encoder",
    "EncoderConfig",
    "GPTConfig",
    "HFNames",
    "Hook",
    "Pretrained",
    "identity",
    "load",
]
