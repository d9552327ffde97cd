"Pictures, tables and pages of what an embedding has learned"
from . import interpret, report
from .interpret import *
from .report import *
__all__ = [*interpret.__all__, *report.__all__]
