"See it in the browser: what its views show, an explorer, a page"
from . import views
from .views import *
__all__ = [*views.__all__]
