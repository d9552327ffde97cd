"An embedder with its gallery, without its training"
from . import gallery, embedder, folder
from .gallery import *
from .embedder import *
from .folder import *
__all__ = [*gallery.__all__, *embedder.__all__, *folder.__all__]
