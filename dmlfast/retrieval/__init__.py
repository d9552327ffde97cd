"Search, the metrics of retrieval, and what they say"
from . import results, search, embedded
from .results import *
from .search import *
from .embedded import *
__all__ = [*results.__all__, *search.__all__, *embedded.__all__]
