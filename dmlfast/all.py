"What `from dmlfast.all import *` gives: the public names of every room"
from .geometry import *
from .mining import *
from .losses import *
from .data import *
from .datasets import *
from .models import *
from .bninception import *
from .results import *
from .retrieval import *
from .evaluate import *
from .deploy import *
from .show import *
from .ranking import *
from .learner import *
from .checkpoint import *
from .export import *
from .interpret import *
