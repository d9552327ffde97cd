"`metric_learner` and everything that happens in a training"
from . import compat, columns, ssr, features, baseline, learner, checkpoint, export, gain, transfer, doctor
from .compat import *
from .columns import *
from .ssr import *
from .features import *
from .baseline import *
from .learner import *
from .checkpoint import *
from .export import *
from .gain import *
from .transfer import *
from .doctor import *
__all__ = [*compat.__all__, *columns.__all__, *ssr.__all__, *features.__all__, *baseline.__all__, *learner.__all__, *checkpoint.__all__, *export.__all__, *gain.__all__, *transfer.__all__, *doctor.__all__]
