"Bodies, pooling and heads that make embeddings"
from . import embedder, heads, bninception
from .embedder import *
from .heads import *
from .bninception import *
__all__ = [*embedder.__all__, *heads.__all__, *bninception.__all__]
