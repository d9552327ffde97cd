"Losses of embeddings: distances, miners, triplets, pairs, proxies"
from . import geometry, miners, base, triplet, pairs, multisimilarity, proxies, softmax, recallk, contrast, wrappers
from .geometry import *
from .miners import *
from .base import *
from .triplet import *
from .pairs import *
from .multisimilarity import *
from .proxies import *
from .softmax import *
from .recallk import *
from .contrast import *
from .wrappers import *
__all__ = [*geometry.__all__, *miners.__all__, *base.__all__, *triplet.__all__, *pairs.__all__, *multisimilarity.__all__,
    *proxies.__all__, *softmax.__all__, *recallk.__all__, *contrast.__all__, *wrappers.__all__]
