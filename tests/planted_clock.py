"""A clock that goes as a test says, whatever the machine's pace."""


class PlantedClock:
    """Stands in for the module `time`: a reading takes `tick_s`, and else time passes in `sleep` alone, at once."""

    def __init__(self, tick_s: float = 0.0) -> None:
        self.now_s, self.tick_s = 0.0, tick_s

    def perf_counter(self) -> float:
        self.now_s += self.tick_s
        return self.now_s

    def sleep(self, seconds: float) -> None:
        self.now_s += seconds
