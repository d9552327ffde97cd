"Losses of embeddings: distances, miners, triplets, pairs, proxies, softmax"
from . import geometry, miners, base, triplet, pairs, multisimilarity, proxies, softmax
from .geometry import *
from .miners import *
from .base import *
from .triplet import *
from .pairs import *
from .multisimilarity import *
from .proxies import *
from .softmax import *
__all__ = [*geometry.__all__, *miners.__all__, *base.__all__, *triplet.__all__, *pairs.__all__, *multisimilarity.__all__,
    *proxies.__all__, *softmax.__all__]
