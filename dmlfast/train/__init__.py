"`metric_learner` and everything that happens in a training"
from . import (compat, processes, progress, rates, columns, ssr, largebatch, memory, recipe, features, baseline, learner, lora,
    predictions, checkpoint, export, gain, transfer, doctor, distributed, fitting, launcher)
from .compat import *
from .processes import *
from .progress import *
from .rates import *
from .columns import *
from .ssr import *
from .largebatch import *
from .memory import *
from .recipe import *
from .features import *
from .baseline import *
from .learner import *
from .lora import *
from .predictions import *
from .checkpoint import *
from .export import *
from .gain import *
from .transfer import *
from .doctor import *
from .distributed import *
from .fitting import *
from .launcher import *
__all__ = [*compat.__all__, *processes.__all__, *progress.__all__, *rates.__all__, *columns.__all__, *ssr.__all__, *largebatch.__all__,
    *memory.__all__, *recipe.__all__, *features.__all__, *baseline.__all__, *learner.__all__, *lora.__all__, *predictions.__all__,
    *checkpoint.__all__, *export.__all__, *gain.__all__, *transfer.__all__, *doctor.__all__, *distributed.__all__, *fitting.__all__,
    *launcher.__all__]
