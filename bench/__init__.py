"""How fast the ops are, and against what: ``python -m bench --help``.

One file an op defines what is measured; ``eager.py`` is the baseline of every figure of speed, ``gate.py`` lets nothing
be timed that is not right, ``core.py`` measures, ``device.py`` has the clocks, ``providers.py`` says who is measured,
``report.py`` prints, ``records.py`` writes. ``gpu.py`` is ``make gpu``: what only a card can show.
"""
