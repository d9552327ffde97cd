"Class-disjoint splits, balanced batches, tables of images and data sets"
from . import batches, tables, datasets, hard, leaks
from .batches import *
from .tables import *
from .datasets import *
from .hard import *
from .leaks import *
__all__ = [*batches.__all__, *tables.__all__, *datasets.__all__, *hard.__all__, *leaks.__all__]
