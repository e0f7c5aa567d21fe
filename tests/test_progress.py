"""Properties of what a run shows within an epoch, on a terminal and elsewhere; with the tests' clock."""

import io
import sys

import pytest

from ewavit.training.progress import RunProgress
from ewavit.training.recipe import Recipe


class Clock:
    """A clock that stands still until a test moves it."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock():
    return Clock()


def show(clock, epochs=3, batches=100, seconds=1.0, evaluation=0.0, first=0.0, start=(0, 0), **settings):
    """Go through a run; `first` seconds more for its first batch. Returns when each batch was done."""
    recipe = Recipe(epochs=epochs, batch_size=8, **settings)
    progress, times = RunProgress(recipe, batches, 8, "images", clock), []
    for epoch in range(start[0], epochs):
        batch = start[1] if epoch == start[0] else 0
        with progress.epoch(epoch, batch) as advance:
            for _ in range(batch, batches):
                clock.now += seconds + (0 if times else first)
                advance(0.5)
                times.append(clock.now)
        clock.now += evaluation
    return times


def test_without_a_terminal_a_line_comes_at_least_every_30_seconds(clock, capsys):
    show(clock, epochs=2)
    assert capsys.readouterr().out.splitlines() == [
        f"epoch {epoch}/2  step {step}/200  loss 0.5000  8 images/s  {left} left of the run"
        for epoch, step, left in [
            (1, 30, "0:02:50"),
            (1, 60, "0:02:20"),
            (1, 90, "0:01:50"),
            (2, 130, "0:01:10"),
            (2, 160, "0:00:40"),
            (2, 190, "0:00:10"),
        ]
    ]


def test_epochs_under_30_seconds_leave_their_own_line_alone(clock, capsys):
    show(clock, batches=29)
    assert capsys.readouterr().out == ""


def test_short_epochs_without_a_line_of_their_own_do_not_silence_the_run(clock, monkeypatch):
    said = []
    monkeypatch.setattr("ewavit.training.progress.say", lambda line: said.append(clock.now))
    show(clock, epochs=12, batches=19, val_interval=6)
    assert said == [30, 60, 90, 114 + 30, 114 + 60, 114 + 90]


def test_the_time_left_counts_evaluation_and_not_the_slow_first_batch(clock, capsys):
    show(clock, epochs=2, batches=40, evaluation=20, first=100)
    first, *_, last = capsys.readouterr().out.splitlines()
    assert first.endswith("images/s")  # the first batch tells no rate
    assert last.startswith("epoch 2/2  step 70/80 ")
    assert last.endswith("0:00:13 left of the run")  # 69 batches and 20 s of evaluation so far: 10 * 89 / 69


def test_a_resumed_run_goes_by_the_rate_since_it_was_resumed(clock, capsys):
    show(clock, epochs=2, start=(1, 50))
    assert capsys.readouterr().out.splitlines() == [
        "epoch 2/2  step 180/200  loss 0.5000  8 images/s  0:00:20 left of the run"
    ]


def test_steps_are_those_of_the_optimizer(clock, capsys):
    show(clock, epochs=1, batches=40, grad_accum_steps=4)
    assert capsys.readouterr().out.startswith("epoch 1/1  step 7/10  loss")


def test_a_process_that_is_not_the_first_shows_nothing(clock, capsys):
    with RunProgress(Recipe(epochs=1), 1, 8, "images", clock).epoch(0, 0, shown=False) as advance:
        clock.now += 100
        advance(0.5)
    assert capsys.readouterr().out == ""


def test_a_terminal_shows_the_time_left_of_the_run_and_no_loss_before_the_first_batch(clock, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setattr(sys, "stdout", Terminal())
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setenv("TERM", "xterm")
    progress = RunProgress(Recipe(epochs=2), 10, 8, "images", clock)
    with progress.epoch(0, 0) as advance:
        begun = sys.stdout.getvalue()
        for _ in range(2):
            clock.now += 60
            advance(0.5)
    shown = sys.stdout.getvalue()
    assert "epoch 1/2" in begun
    assert "loss" not in begun
    assert "2/10" in shown
    assert "loss 0.500  0:18:00 left of the run" in shown
    assert "nan" not in shown
