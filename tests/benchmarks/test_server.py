"""benchmarks/server.py: its table."""

from __future__ import annotations

from benchmarks import server


def test_events_cost_far_less_than_a_token():
    assert server.events_alone(200) < 20  # ms; 0.2 on a quiet machine


def test_bad_numbers_are_refused(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["server.py", "--tokens", "1"])
    assert server.cli.guarded(server.main) == 1
    assert "tokens must be at least 2" in capsys.readouterr().err
