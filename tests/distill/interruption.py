"""Kill a training run after some updates, as a user's Ctrl-C would."""

from mpqdm_fx.distill import train
from mpqdm_fx.distill.train import Trainer


def kill_at(monkeypatch, updates):
    """Let the next run save its state at every update, and stop; `monkeypatch.undo()` ends it."""
    update = Trainer._update

    def killed(self):
        if self.history.updates == updates:
            raise KeyboardInterrupt
        update(self)

    monkeypatch.setattr(train, "_SAVE_SECONDS", -1.0)
    monkeypatch.setattr(Trainer, "_update", killed)
