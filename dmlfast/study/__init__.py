"Runs as plain settings, searches and experiments"
from . import runs, tuning, experiments
from .runs import *
from .tuning import *
from .experiments import *
__all__ = [*runs.__all__, *tuning.__all__, *experiments.__all__]
