"Bodies, pooling and heads that make embeddings"
from . import bodies, pooling, embedder, heads, bninception, lora
from .bodies import *
from .pooling import *
from .embedder import *
from .heads import *
from .bninception import *
from .lora import *
__all__ = [*bodies.__all__, *pooling.__all__, *embedder.__all__, *heads.__all__, *bninception.__all__, *lora.__all__]
