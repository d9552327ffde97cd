"An embedder with its gallery, without its training"
from . import embedder, folder
from .embedder import *
from .folder import *
__all__ = [*embedder.__all__, *folder.__all__]
