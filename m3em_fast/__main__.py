"""``python -m m3em_fast``: which commands there are."""

from . import _cli

if __name__ == "__main__":
    raise SystemExit(_cli.menu("m3em_fast"))
