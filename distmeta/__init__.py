"""distmeta: distributed gradient-based meta-learning on Ray and PyTorch.

Its names are in ``__init__.pyi``. They load their modules when they are first used, since torch takes seconds to load,
which a ``distmeta --help`` does not need.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
