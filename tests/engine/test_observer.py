"""Observers: which engine a record is about, whatever ends meanwhile."""

from __future__ import annotations

from tests.processes import run_python

# For each number of allocations, a collection after so many ends an engine, perhaps while another marks its records.
COLLECTED_WHILE_ANOTHER_RUNS = """
import gc, weakref
from nanovllm.engine.observer import EngineObserver, Observers
from nanovllm.logs.records import current_engine

ended = []

class Watching(EngineObserver):
    def sequence_finished(self, sequence):
        assert current_engine.number == sequence
        if sequence:
            ended.append(sequence)

class Engine:
    def __init__(self, number):
        self.itself = self  # only a collection frees it
        weakref.finalize(self, Observers([Watching()], number).sequence_finished, number)

running = Observers([Watching()], 0)
for allocations in range(20):
    gc.collect()
    gc.disable()
    Engine(allocations + 1)
    gc.set_threshold(gc.get_count()[0] + allocations)
    gc.enable()
    running.sequence_finished(0)
    assert current_engine.number is None
gc.collect()
assert sorted(ended) == list(range(1, 21)), ended
"""


def test_an_engine_may_be_collected_while_another_marks_its_records() -> None:
    done = run_python("-X", "faulthandler", "-c", COLLECTED_WHILE_ANOTHER_RUNS, PYTHONMALLOC="debug")
    assert done.returncode == 0, done.stderr
