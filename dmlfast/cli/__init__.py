"The commands"
from .arguments import *
from .commands import *
from .training import *
from .measuring import *
from .studies import *
from .exploring import *
