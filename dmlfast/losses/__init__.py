"Losses of embeddings: distances, miners, triplets, pairs, proxies"
from . import geometry, miners, base, proxies
from .geometry import *
from .miners import *
from .base import *
from .proxies import *
__all__ = [*geometry.__all__, *miners.__all__, *base.__all__, *proxies.__all__]
