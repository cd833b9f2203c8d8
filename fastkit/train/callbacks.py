"""What a run shows while it goes on, and the watch for overfitting."""

import io
import math
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass

from transformers import TrainerCallback

from fastkit.errors import FastkitError

SMOOTH = 10  # steps of training loss averaged into one point of the plot


def curves(log_history: list[dict]) -> tuple[list, list]:
    """(training, validation) losses of a Trainer's log, each a list of (step, loss)."""
    training = [(entry["step"], entry["loss"]) for entry in log_history if "loss" in entry]
    validation = [(entry["step"], entry["eval_loss"]) for entry in log_history if "eval_loss" in entry]
    return training, validation


@dataclass
class Overfit:
    """Validation loss rose over two validations in a row while the training loss fell."""

    best_step: int
    best_loss: float
    step: int
    loss: float
    training_from: float
    training_to: float

    def __str__(self) -> str:
        return (
            f"overfitting: validation loss rose from {self.best_loss:.4f} (step {self.best_step}) to {self.loss:.4f} "
            f"(step {self.step}) while training loss fell from {self.training_from:.4f} to {self.training_to:.4f}; "
            "stop here, lower the learning rate or the rank, or add data"
        )


def overfitting(log_history: list[dict]) -> Overfit | None:
    """Whether the log shows overfitting at its last validation: a pure function, so that a resumed run agrees."""
    training, validation = curves(log_history)
    if len(validation) < 3:
        return None
    (_, first), (middle_step, middle), (last_step, last) = validation[-3:]
    if not first < middle < last:
        return None
    best_step, best = min(validation, key=lambda point: point[1])
    before = [loss for step, loss in training if validation[-3][0] < step <= middle_step]
    after = [loss for step, loss in training if middle_step < step <= last_step]
    if not before or not after:
        return None
    training_from, training_to = sum(before) / len(before), sum(after) / len(after)
    if training_to >= training_from:
        return None
    return Overfit(best_step, best, last_step, last, training_from, training_to)


class Watch(TrainerCallback):
    """Stops a run whose loss is no number or whose validation loss no longer falls; warns once of overfitting."""

    def __init__(self, patience: int):
        self.patience = patience
        self.warned = False

    def on_log(self, args, state, control, logs=None, **kwargs):
        for name in ("loss", "eval_loss"):
            if logs and name in logs and not math.isfinite(logs[name]):
                raise FastkitError(
                    f"{name} is {logs[name]} at step {state.global_step}: lower --learning_rate or check the data; "
                    "checkpoints up to here are kept"
                )

    def on_evaluate(self, args, state, control, **kwargs):
        found = overfitting(state.log_history)
        if found and not self.warned:
            self.warned = True
            warnings.warn(str(found), stacklevel=2)
        _, validation = curves(state.log_history)
        if self.patience and validation:
            losses = [loss for _, loss in validation]
            since_best = len(losses) - 1 - losses.index(min(losses))
            if since_best >= self.patience:
                control.should_training_stop = True


class Spent(TrainerCallback):
    """What a run took so far, its earlier parts included: `count` tells (tokens, places with padding) of this part.

    Each checkpoint holds it, so that a resumed run goes on adding. Steps that a kill undid are not in it.
    """

    def __init__(self, count: Callable[[], tuple[int, int]]):
        self.count, self.earlier, self.start = count, {}, time.perf_counter()

    def total(self) -> dict:
        """{"seconds", "tokens", "places"}; to be called by all processes."""
        tokens, places = self.count()
        now = {"seconds": time.perf_counter() - self.start, "tokens": tokens, "places": places}
        return {name: value + self.earlier.get(name, 0) for name, value in now.items()}

    def on_train_begin(self, args, state, control, **kwargs):
        self.earlier = state.stateful_callbacks.get("Spent", {}).get("attributes", {})

    def on_step_end(self, args, state, control, **kwargs):
        if control.should_save:
            state.stateful_callbacks["Spent"] = {"args": {}, "attributes": self.total()}


class Rehearsal(TrainerCallback):
    """Calls `rehearse` when all is set up and no step has begun."""

    def __init__(self, rehearse: Callable[[], None]):
        self.rehearse = rehearse

    def on_train_begin(self, args, state, control, **kwargs):
        self.rehearse()


class Bar(TrainerCallback):
    """A plain progress bar for a terminal: step, losses, time left."""

    def __init__(self):
        self.bar = None
        self.shown = {}

    def on_train_begin(self, args, state, control, **kwargs):
        from tqdm import tqdm

        self.bar = tqdm(total=state.max_steps, initial=state.global_step, unit="step", dynamic_ncols=True)

    def on_step_end(self, args, state, control, **kwargs):
        self.bar.update(state.global_step - self.bar.n)

    def on_log(self, args, state, control, logs=None, **kwargs):
        for name, shown in (("loss", "loss"), ("eval_loss", "validation")):
            if logs and name in logs:
                self.shown[shown] = f"{logs[name]:.4f}"
        if self.bar is not None:
            self.bar.set_postfix(self.shown)

    def on_train_end(self, args, state, control, **kwargs):
        self.bar.close()


class LivePlot(TrainerCallback):
    """A loss plot in a notebook, redrawn at most every `every` seconds; what stays is a static picture.

    `before` is the validation loss before the first step.
    """

    def __init__(self, before: float | None = None, every: float = 3.0):
        self.history = [] if before is None else [{"step": 0, "eval_loss": before}]
        self.every = every
        self.handle = None
        self.drawn = 0.0
        self.ended = False

    def on_train_begin(self, args, state, control, **kwargs):
        from IPython.display import display

        self.start, self.start_step = time.monotonic(), state.global_step
        self.handle = display(self._picture(state), display_id=True)

    def on_log(self, args, state, control, **kwargs):
        if self.handle and time.monotonic() - self.drawn > self.every:
            self._draw(state)

    def on_train_end(self, args, state, control, **kwargs):
        self.ended = True
        self._draw(state)

    def _draw(self, state):
        self.handle.update(self._picture(state))
        self.drawn = time.monotonic()

    def _picture(self, state):
        done = state.global_step - self.start_step
        left = (time.monotonic() - self.start) / done * (state.max_steps - state.global_step) if done else None
        title = f"step {state.global_step} of {state.max_steps}"
        if left:
            title += ", stopped" if self.ended else f", {left:.0f} s left"
        return picture(plot_losses(self.history + state.log_history, title))


def plot_losses(log_history: list[dict], title: str = ""):
    """A figure of the training and validation losses of a Trainer's log; validation is marked, not only coloured."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from fastkit.lab.plots.labels import place

    training, validation = curves(log_history)
    figure = Figure(figsize=(7, 3.2), layout="constrained")
    FigureCanvasAgg(figure)  # which knows how large text is
    axes = figure.subplots()
    if training:
        axes.plot(*zip(*training, strict=True), color="0.8", linewidth=0.8, label="training, each step")
        windows = [training[n : n + SMOOTH] for n in range(len(training) % SMOOTH, len(training), SMOOTH)]
        middles = [sum(step for step, _ in window) / SMOOTH for window in windows]
        means = [sum(loss for _, loss in window) / SMOOTH for window in windows]
        if len(windows) > 1:  # a line has two points
            axes.plot(middles, means, color="0.3", linewidth=1.2, label=f"training, mean of {SMOOTH}")
    if validation:
        axes.plot(*zip(*validation, strict=True), color="#0072b2", marker="o", linewidth=2, label="validation")
    axes.set(xlabel="optimizer step", ylabel="loss, nats a token", title=title)
    axes.grid(alpha=0.3)
    if validation:
        step, best = min(validation, key=lambda point: point[1])
        place(figure, axes, [(f"{best:.3f}", step, best)])
        axes.texts[0].set_color("#0072b2")
    if training or validation:
        axes.legend(frameon=False)
    return figure


def picture(figure):
    """`figure` as a PNG to display: shown in every front end, and kept in a saved notebook."""
    from IPython.display import Image

    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=100)
    return Image(data=buffer.getvalue(), format="png")


def in_notebook() -> bool:
    """Whether this process is a notebook's kernel."""
    try:
        from IPython import get_ipython
    except ImportError:
        return False
    return type(get_ipython()).__name__ == "ZMQInteractiveShell"
