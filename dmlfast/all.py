"What `from dmlfast.all import *` gives: the public names of every wing but the commands"
from .files.images import *
from .files.drawing import *
from .losses import *
from .models import *
from .retrieval import *
from .deploy import *
from .data import *
from .train import *
from .look import *
from .study import *
