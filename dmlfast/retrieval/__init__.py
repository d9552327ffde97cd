"Search, the metrics of retrieval, and what they say"
from . import results, search
from .results import *
from .search import *
__all__ = [*results.__all__, *search.__all__]
