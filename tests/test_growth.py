"""bench.growth: exponents of made-up series, every point on tiny sizes, the table and the picture."""

from dataclasses import replace

import pytest
from matplotlib.axes import Axes
from rich.console import Console

from bench import growth
from bench.growth import AXES, PARTS, SHOWN, Series, Sizes

TINY = Sizes(n=10, c=8, d=4, hw=8, s=2, m=2)


@pytest.mark.parametrize("power", [0, 1, 2])
def test_the_exponent_is_the_slope(power):
    sizes = (10, 20, 40, 80)
    one = Series("op", "n", sizes, tuple(3e-4 * size**power for size in sizes), tuple(7 * size for size in sizes))
    assert one.exponent(one.seconds) == pytest.approx(power)
    assert one.exponent(one.saved) == pytest.approx(1)


@pytest.mark.parametrize("op", PARTS)
def test_a_point_takes_time_and_keeps_what_grows(op):
    make, axes = PARTS[op]
    seconds, saved = growth.point(make, TINY, 0.0)
    assert seconds > 0
    for axis in axes:
        more = growth.point(make, replace(TINY, **{axis: 2 * getattr(TINY, axis)}), 0.0)[1]
        # Scales keep three numbers a cell and nothing of the maps; they are the one axis that may keep the same.
        assert more > saved if axis != "s" else more >= saved, axis


def test_a_series_goes_through_its_axis(monkeypatch):
    seen = []
    monkeypatch.setattr(growth, "point", lambda make, sizes, seconds: (seen.append(sizes), (len(seen), 8))[1])
    one = growth.series("consensus_map", "hw", 1.0)
    assert one.sizes == tuple(side * side for side in AXES["hw"])
    assert [sizes.hw for sizes in seen] == list(AXES["hw"])
    assert {replace(sizes, hw=0) for sizes in seen} == {replace(Sizes(), hw=0)}


def test_the_command_shows_every_series_and_draws_it(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(growth, "point", lambda make, sizes, seconds: (1e-9 * sizes.n * sizes.c, 4 * sizes.n))
    monkeypatch.setattr(growth, "Console", lambda **_: Console(width=160))
    drawn = []
    loglog = Axes.loglog
    monkeypatch.setattr(
        Axes, "loglog", lambda self, *a, **o: (drawn.append((o["label"], o["color"])), loglog(self, *a, **o))
    )
    assert growth.main(["--picture", str(tmp_path / "growth.png")]) == 0
    said = capsys.readouterr().out
    assert all(op in said for op in PARTS) and all(axis in said for axis in SHOWN.values())
    assert (tmp_path / "growth.png").read_bytes().startswith(b"\x89PNG")
    # The legend is one for all plots, so an op has one colour in all of them, and no two ops have the same.
    assert {op for op, _ in drawn} == set(PARTS) and len(set(drawn)) == len({colour for _, colour in drawn}) == len(
        PARTS
    )
