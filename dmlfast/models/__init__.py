"Bodies, pooling and heads that make embeddings"
from . import embedder, heads, bninception, lora
from .embedder import *
from .heads import *
from .bninception import *
from .lora import *
__all__ = [*embedder.__all__, *heads.__all__, *bninception.__all__, *lora.__all__]
