"An embedder with its gallery, without its training"
from . import gallery, embedder, lance, journal, folder
from .gallery import *
from .embedder import *
from .lance import *
from .journal import *
from .folder import *
__all__ = [*gallery.__all__, *embedder.__all__, *lance.__all__, *journal.__all__, *folder.__all__]
