"An embedder with its gallery, without its training"
from . import gallery, embedder, lance, journal, folder, hub
from .gallery import *
from .embedder import *
from .lance import *
from .journal import *
from .folder import *
from .hub import *
__all__ = [*gallery.__all__, *embedder.__all__, *lance.__all__, *journal.__all__, *folder.__all__, *hub.__all__]
