"An embedder with its gallery, without its training"
from . import embedder
from .embedder import *
__all__ = [*embedder.__all__]
