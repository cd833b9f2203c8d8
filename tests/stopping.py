"""A fine-tune that ends before it is done."""

from transformers import TrainerCallback

from fastkit.train.finetune import FineTune


class _Stop(TrainerCallback):
    def on_save(self, args, state, control, **kwargs):
        control.should_training_stop = True


def stop_at_a_checkpoint(**settings) -> None:
    """Train with `settings` up to the first checkpoint."""
    run = FineTune(**settings).prepare()
    run.trainer.add_callback(_Stop())
    run.train()
