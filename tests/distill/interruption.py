"""Kill a training run after some updates, as a user's Ctrl-C would."""

from mpqdm_fx.distill.train import Trainer


def kill_at(monkeypatch, updates):
    """Let the next run save its state and stop there; `monkeypatch.undo()` ends it."""
    update = Trainer._update

    def killed(self):
        if self.history.updates == updates:
            self.save()
            raise KeyboardInterrupt
        update(self)

    monkeypatch.setattr(Trainer, "_update", killed)
