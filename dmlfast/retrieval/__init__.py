"Search, the metrics of retrieval, and what they say"
from . import results, search, verify, metrics, rerank, indexes, embedded, confusions, layout
from .results import *
from .search import *
from .verify import *
from .metrics import *
from .rerank import *
from .indexes import *
from .embedded import *
from .confusions import *
from .layout import *
__all__ = [*results.__all__, *search.__all__, *verify.__all__, *metrics.__all__, *rerank.__all__, *indexes.__all__, *embedded.__all__,
    *confusions.__all__, *layout.__all__]
