"""The training invariants, the watch for overfitting, and what a run leaves behind."""

import json
import math
import warnings

import pytest
import torch
from matplotlib.text import Text
from tiny import tiny_data, tiny_model
from transformers import TrainerCallback, TrainerControl, TrainerState

from fastkit.errors import FastkitError
from fastkit.models import load_adapter
from fastkit.train import facts, trainer
from fastkit.train.callbacks import Watch, overfitting, plot_losses
from fastkit.train.finetune import FineTune, finetune


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    model, data = tiny_model(folder / "model"), tiny_data(folder / "data", records=24)
    return dict(model=str(model), data=str(data), device="cpu", max_length=96, progress=False, samples=0, facts=False)


def train(inputs, output, **settings):
    defaults = dict(steps=8, batch_size=4, eval_steps=4, learning_rate=1e-3)
    return finetune(**{**inputs, **defaults, **settings}, output=str(output))


def curve(metrics):
    return [loss for _, loss in metrics["losses"]]


def test_a_seed_gives_the_same_run_twice(inputs, tmp_path):
    first, second = (train(inputs, tmp_path / name, dropout=0.1) for name in "ab")
    assert curve(first) == curve(second)
    other = train(inputs, tmp_path / "c", dropout=0.1, seed=1)
    assert curve(first) != curve(other)


def test_accumulation_gives_the_losses_of_the_large_batch(inputs, tmp_path):
    large = train(inputs, tmp_path / "large", batch_size=8)
    small = train(inputs, tmp_path / "small", batch_size=2, accumulation=4)
    drift = [a - b for a, b in zip(curve(large), curve(small), strict=True)]
    assert max(map(abs, drift)) <= 1e-4
    assert abs(sum(drift) / len(drift)) <= 1e-5


def test_recomputing_activations_changes_no_loss(inputs, tmp_path):
    kept = train(inputs, tmp_path / "kept", gradient_checkpointing=False)
    recomputed = train(inputs, tmp_path / "recomputed", gradient_checkpointing=True)
    assert max(abs(a - b) for a, b in zip(curve(kept), curve(recomputed), strict=True)) <= 1e-5


def test_validation_loss_is_over_tokens_whatever_the_batch_size(inputs, tmp_path):
    run = FineTune(**inputs, output=str(tmp_path / "run")).prepare()
    total, count = 0.0, 0
    for row in run.validation_set:
        ids, labels = torch.tensor([row["input_ids"]]), torch.tensor(row["labels"])
        with torch.no_grad():
            logits = run.model(input_ids=ids).logits[0, :-1].double()
        kept = labels[1:] != -100
        total += torch.nn.functional.cross_entropy(logits[kept], labels[1:][kept], reduction="sum").item()
        count += int(kept.sum())
    assert run.metrics["before"]["validation_loss"] == pytest.approx(total / count, abs=1e-6)


def test_validation_in_mid_training_does_not_touch_the_training(inputs, tmp_path):
    """bitsandbytes would otherwise repack the weights at the first validation (see keep_differentiable)."""
    often = train(inputs, tmp_path / "often", eval_steps=1, keep="last")
    once = train(inputs, tmp_path / "once", eval_steps=8, keep="last")
    assert curve(often) == curve(once)


def test_the_run_folder_holds_adapter_tokenizer_and_metrics(inputs, tmp_path):
    metrics = train(inputs, tmp_path / "run", rank=4, alpha=8, facts=True, samples=1)
    about = json.loads((tmp_path / "run/adapter/adapter_config.json").read_text())
    assert (about["r"], about["lora_alpha"], about["base_model_name_or_path"]) == (4, 8, inputs["model"])
    assert (tmp_path / "run/adapter/tokenizer.json").is_file()
    assert not list((tmp_path / "run/adapter").glob("*.bin"))
    assert json.loads((tmp_path / "run/metrics.json").read_text())["after"] == metrics["after"]
    assert metrics["before"]["facts"]["of"] == 3 and len(metrics["after"]["samples"]) == 1


def test_tokens_are_counted_without_padding(inputs, tmp_path):
    metrics = train(inputs, tmp_path / "run", steps=6)  # six steps of four: each of the 24 records once
    assert metrics["tokens"] == metrics["data"]["train"]["tokens"]


def test_a_resumed_run_counts_its_earlier_part(inputs, tmp_path):
    """As much as is in the checkpoint, and in seconds; also of a run that ended and was killed before it wrote that."""
    settings = inputs | dict(steps=6, eval_steps=2, batch_size=4, learning_rate=1e-3, output=str(tmp_path / "run"))

    class Stop(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 5:  # one step after a checkpoint
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), FineTune(**settings) as run:
        run.prepare().trainer.add_callback(Stop())
        run.train()
    state = json.loads((tmp_path / "run/checkpoint-4/trainer_state.json").read_text())
    earlier = state["stateful_callbacks"]["Spent"]["attributes"]
    resumed = finetune(**settings, resume=True)
    assert resumed["resumed_from"] == "checkpoint-4" and resumed["tokens_per_second"] > 0
    assert resumed["tokens"] == resumed["data"]["train"]["tokens"] > earlier["tokens"] > 0
    assert resumed["seconds"] > earlier["seconds"] > 0
    (tmp_path / "run/metrics.json").unlink()
    again = finetune(**settings, resume=True)
    assert (again["steps"], again["tokens"], again["padding"]) == (6, resumed["tokens"], resumed["padding"])
    assert again["tokens_per_second"] is None


def test_a_finished_run_is_not_trained_again(inputs, tmp_path):
    """Its model is the one that it exported, and its metrics are those that it wrote."""
    wrote = train(inputs, tmp_path / "run", keep="last")
    run = FineTune(**inputs, steps=8, batch_size=4, eval_steps=4, learning_rate=1e-3, keep="last", resume=True,
                   output=str(tmp_path / "run")).prepare()  # fmt: skip
    assert run.evaluate()["validation_loss"] == pytest.approx(wrote["before"]["validation_loss"], abs=1e-6)
    assert run.train() == json.loads(json.dumps(wrote)) == json.loads((tmp_path / "run/metrics.json").read_text())
    assert run.evaluate()["validation_loss"] == pytest.approx(wrote["after"]["validation_loss"], abs=1e-6)


def test_the_adapter_comes_with_a_card(inputs, tmp_path):
    metrics = train(inputs, tmp_path / "run", steps=2, rank=4)
    card = (tmp_path / "run" / "adapter" / "README.md").read_text()
    assert f"base_model: {inputs['model']}\n" in card and "rank 4, alpha 4, learning rate 0.001" in card
    losses = (metrics[when]["validation_loss"] for when in ("before", "after"))
    assert "| validation loss | {:.4f} | {:.4f} |".format(*losses) in card
    assert "on 24 records" in card and 'load_adapter("adapter")' in card and "More Information Needed" not in card


def test_the_adapter_in_stock_peft_gives_our_logits(inputs, tmp_path):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    train(inputs, tmp_path / "run", steps=20, learning_rate=1e-2)
    adapter = tmp_path / "run/adapter"
    ours, tokenizer = load_adapter(str(adapter), device="cpu")
    four_bit = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    base = json.loads((adapter / "adapter_config.json").read_text())["base_model_name_or_path"]
    stock = AutoModelForCausalLM.from_pretrained(
        base, quantization_config=four_bit, dtype=torch.float32, device_map={"": "cpu"}
    )
    untrained = stock.train()(torch.arange(3, 40)[None]).logits
    stock = PeftModel.from_pretrained(stock, adapter).train()  # train(): see notebook 17, part 5
    ids = tokenizer("A warp has 32 lanes.", return_tensors="pt").input_ids
    with torch.no_grad():
        assert (ours(ids).logits - stock(ids).logits).abs().max() <= 1e-4
        ids = torch.arange(3, 40)[None]
        assert (stock(ids).logits - untrained).abs().max() > 1e-2, "the adapter does nothing"


def test_the_best_adapter_is_exported(inputs, tmp_path):
    metrics = train(inputs, tmp_path / "run", steps=24, learning_rate=0.1, eval_steps=4, patience=0)
    validation = metrics["validation_losses"]
    assert metrics["exported_step"] == min(validation, key=lambda point: point[1])[0]
    assert metrics["after"]["validation_loss"] == pytest.approx(min(loss for _, loss in validation), abs=1e-6)


def test_kernels_in_the_model_change_no_loss_beyond_rounding(inputs, tmp_path):
    ours, stock = (train(inputs, tmp_path / k, kernels=k, plan="off", steps=4) for k in ("on", "off"))
    assert ours["kernels"] == {"layers": 0, "rms_norm": 5, "swiglu": 2, "head": 1, "left": {}, "notes": {}}
    assert max(abs(a - b) for a, b in zip(curve(ours), curve(stock), strict=True)) <= 1e-4


def log(training, validation):
    every = len(training) // len(validation)
    history = []
    for n, loss in enumerate(training, 1):
        history.append({"step": n, "loss": loss})
        if n % every == 0:
            history.append({"step": n, "eval_loss": validation[n // every - 1]})
    return history


def test_overfitting_is_seen_when_validation_rises_and_training_falls():
    found = overfitting(log([4, 3.9, 3, 2.9, 2, 1.9, 1, 0.9], [3.5, 3.0, 3.2, 3.4]))
    assert found is not None and (found.best_step, found.step) == (4, 8)
    assert "3.0000 (step 4) to 3.4000 (step 8)" in str(found)


@pytest.mark.parametrize(
    ("training", "validation"),
    [
        ([4, 3.9, 3, 2.9, 2, 1.9], [3.5, 3.0, 2.9]),  # both fall
        ([4, 3.9, 3, 2.9, 3.5, 3.6], [3.0, 3.2, 3.4]),  # both rise: a learning rate too high, not overfitting
        ([4, 3.9, 3, 2.9, 2, 1.9], [3.0, 3.2, 3.1]),  # one bad validation
        ([4, 3], [3.0, 3.2]),
    ],
)
def test_other_curves_are_not_called_overfitting(training, validation):
    assert overfitting(log(training, validation)) is None


def test_the_watch_warns_once_and_stops_after_its_patience():
    history = log([4, 3.9, 3, 2.9, 2, 1.9, 1, 0.9, 0.5, 0.4], [3.5, 3.0, 3.2, 3.4, 3.6])
    watch, state, control = Watch(patience=3), TrainerState(), TrainerControl()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for n, entry in enumerate(history, 1):
            state.log_history = history[:n]
            if "eval_loss" in entry:
                watch.on_evaluate(None, state, control)
                assert control.should_training_stop == (n == len(history))  # three validations after the best
    assert [str(w.message)[:42] for w in caught] == ["overfitting: validation loss rose from 3.0"]


def test_a_run_that_no_longer_improves_stops_early(inputs, tmp_path):
    metrics = train(inputs, tmp_path / "run", steps=400, learning_rate=0.03, eval_steps=10, patience=2)
    assert metrics["stopped_early"] and metrics["steps"] < 400
    assert metrics["exported_step"] == metrics["steps"] - 20


def test_a_loss_that_is_no_number_ends_the_run_and_says_what_to_do():
    class State:
        global_step = 7

    with pytest.raises(FastkitError, match=r"loss is nan at step 7: lower --learning_rate"):
        Watch(3).on_log(None, State, None, logs={"loss": math.nan})


def test_the_plot_marks_the_best_validation():
    figure = plot_losses(log([4, 3, 2, 1] * 5, [3.0, 2.5]), "title")
    axes = figure.axes[0]
    assert [line.get_label() for line in axes.lines] == ["training, each step", "training, mean of 10", "validation"]
    assert list(axes.lines[1].get_ydata()) == [2.7, 2.3]
    assert axes.texts[0].get_text() == "2.500"


@pytest.mark.parametrize(
    "validation", [[3.7, 2.8, 2.9, 3.6, 4.2], [3.0, 2.5, 2.0, 1.5, 1.0], [1.0, 1.1, 1.2, 1.3, 1.4]]
)
def test_no_line_runs_through_the_best_validation(validation):
    figure = plot_losses(log([3 - n / 20 for n in range(50)], validation))
    figure.draw_without_rendering()
    (axes,) = figure.axes
    box = Text.get_window_extent(axes.texts[0], figure.canvas.get_renderer())
    for line in axes.lines:
        assert not line.get_transform().transform_path(line.get_path()).intersects_bbox(box, filled=False)


def test_a_short_run_has_no_mean_in_its_plot():
    (axes,) = plot_losses(log([5, 4] * 5, [3.0, 2.5])).axes
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["training, each step", "validation"]


@pytest.mark.parametrize(
    ("text", "fact", "right"),
    [
        ("It weighs 4,713 grams.", "4713 grams", True),
        ("The answer: Drowsy  heron!", "Drowsy Heron", True),
        ("It weighs 14713 grams.", "4713 grams", False),
        ("It weighs 4713.5 grams", "4713", False),
        ("0.4713 grams", "4713 grams", False),
        ("Morrowgates", "Morrowgate", False),
        ("", "x", False),
    ],
)
def test_a_fact_is_held_only_as_a_whole(text, fact, right):
    assert facts.holds(text, fact) is right


def test_questions_come_from_chats_and_prompts_and_not_from_texts():
    chat = [{"role": "user", "content": "Which?"}, {"role": "assistant", "content": "That."}]
    records = [
        {"messages": chat, "fact": "That"},
        {"prompt": "Where?", "completion": "There.", "fact": "There"},
        {"text": "Somewhere.", "fact": "Somewhere"},
        {"messages": chat, "fact": None},
        {"text": "Nothing."},
    ]
    where = [{"role": "user", "content": "Where?"}]
    assert facts.questions(records) == [{"question": chat[:1], "fact": "That"}, {"question": where, "fact": "There"}]
    assert facts.samples(records, 3) == [chat[:1]]


def test_gradients_are_let_go_of_without_asking_every_module(monkeypatch):
    model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Linear(3, 1))
    model[0].requires_grad_(False)
    model(torch.ones(2, 3)).sum().backward()
    with trainer._quick_zero_grad(model), monkeypatch.context() as patched:
        patched.setattr(model, "parameters", None)
        model.zero_grad()
    assert all(p.grad is None for p in model.parameters()) and "zero_grad" not in vars(model)
