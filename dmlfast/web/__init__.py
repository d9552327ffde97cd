"A gallery in the browser, and as a server"
from . import app, items, pages, explorer
from .app import *
from .items import *
from .pages import *
from .explorer import *
__all__ = [*app.__all__, *items.__all__, *pages.__all__, *explorer.__all__]
