"""m3em_fast: the Multi-Modal Mutual Enhancement Module (M3EM) as fused ops, modules and a training program.

``m3em_fast.ops`` holds the ops, ``m3em_fast.nn`` the modules, ``m3em_fast.uda`` the domain adaptation around them,
``m3em_fast.data`` the feature store and the digits benchmark.
"""

from m3em_fast import nn, ops
from m3em_fast._explain import explain
from m3em_fast._version import __version__
from m3em_fast.backends import backend

__all__ = ["__version__", "backend", "explain", "nn", "ops"]
