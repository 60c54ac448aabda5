"""A reporter of progress that remembers what it is told."""


class Told:
    """Remembers stages, amounts and expectations."""

    def __init__(self):
        self.stages, self.amounts, self.expectations = [], [], []
        self.closed_names, self.failed_names = [], []
        self.outer_names, self._open = [], 0  # of stages that lie in no other one

    def opened(self, stage):
        self.stages.append(stage)
        if not self._open:
            self.outer_names.append(stage.name)
        self._open += 1

    def moved(self, stage, amount):
        self.amounts.append(amount)

    def closed(self, stage, finished):
        self._open -= 1
        (self.closed_names if finished else self.failed_names).append(stage.name)

    def expected(self, seconds):
        self.expectations.append(dict(seconds()))

    def leave_log(self, folder):
        (folder / "log.txt").write_text("said")

    @property
    def names(self):
        return [stage.name for stage in self.stages]
