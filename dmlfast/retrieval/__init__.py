"Search, the metrics of retrieval, and what they say"
from . import products, results, search, verify, metrics, rerank, indexes, embedded, confusions, maps
from .products import *
from .results import *
from .search import *
from .verify import *
from .metrics import *
from .rerank import *
from .indexes import *
from .embedded import *
from .confusions import *
from .maps import *
__all__ = [*products.__all__, *results.__all__, *search.__all__, *verify.__all__, *metrics.__all__, *rerank.__all__, *indexes.__all__,
    *embedded.__all__, *confusions.__all__, *maps.__all__]
