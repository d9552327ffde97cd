"See it in the browser: what its views show, an explorer, a page, a server"
from . import app, views, items, static, server, pages, judging, explorer
from .app import *
from .views import *
from .items import *
from .static import *
from .server import *
from .pages import *
from .judging import *
from .explorer import *
__all__ = [*app.__all__, *views.__all__, *items.__all__, *static.__all__, *server.__all__, *pages.__all__, *judging.__all__,
    *explorer.__all__]
