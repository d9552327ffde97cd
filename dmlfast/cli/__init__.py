"The commands"
from .commands import *
