"Pictures, tables and pages of what an embedding has learned"
from . import interpret, pictures, page, report
from .interpret import *
from .pictures import *
from .page import *
from .report import *
__all__ = [*interpret.__all__, *pictures.__all__, *page.__all__, *report.__all__]
