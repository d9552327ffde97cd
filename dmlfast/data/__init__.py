"Class-disjoint splits, balanced batches, tables of images and data sets"
from . import batches, tables, datasets
from .batches import *
from .tables import *
from .datasets import *
__all__ = [*batches.__all__, *tables.__all__, *datasets.__all__]
