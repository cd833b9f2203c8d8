"""Ask a model: questions in, answers out, in batches."""

import torch
from transformers.utils.chat_template_utils import render_jinja_template

from fastkit.errors import FastkitError
from fastkit.models.bnb import dense_on_cpu

# For models without a chat template. Rendered, then tokenized with the tokenizer's own special tokens (its BOS).
PLAIN_TEMPLATE = (
    "{% for m in messages %}{% if not loop.first %}{{ '\\n\\n' }}{% endif %}"
    "{{ '### ' + m['role'] | capitalize + ':\\n' }}"
    "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] + eos_token }}{% endgeneration %}"
    "{% else %}{{ m['content'] }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '\\n\\n### Assistant:\\n' }}{% endif %}"
)


def plain_prompt(messages: list[dict], eos_token: str = "") -> str:
    """Text that asks for the next answer, in PLAIN_TEMPLATE; `eos_token` ends earlier answers, as in training."""
    texts, _ = render_jinja_template(
        conversations=[messages], chat_template=PLAIN_TEMPLATE, add_generation_prompt=True, eos_token=eos_token
    )
    return texts[0]


@torch.inference_mode()
def answer(
    model,
    tokenizer,
    questions: list[str | list[dict]],
    *,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    batch_size: int = 8,
    seed: int = 0,
) -> list[str]:
    """The model's answers to `questions`, each a text (one user turn) or a list of chat messages.

    Greedy at `temperature` 0, else sampled with `seed`. Questions are padded on the left, since the model goes on
    from the last column. The model's training mode and the tokenizer's padding side are put back.
    """
    if temperature < 0:
        raise FastkitError(f"temperature {temperature} must be 0 (greedy) or above")
    chats = [[{"role": "user", "content": q}] if isinstance(q, str) else q for q in questions]
    texts = [_prompt(tokenizer, chat) for chat in chats]
    was_training, padding_side = model.training, tokenizer.padding_side
    model.eval()
    tokenizer.padding_side = "left"
    sampling = {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}
    answers = []
    try:
        with dense_on_cpu(model), torch.random.fork_rng([model.device] if model.device.type == "cuda" else []):
            torch.manual_seed(seed)
            for start in range(0, len(texts), batch_size):
                batch = tokenizer(
                    texts[start : start + batch_size],
                    return_tensors="pt",
                    padding=True,
                    add_special_tokens=not tokenizer.chat_template,  # a chat template writes its own
                ).to(model.device)
                batch.pop("token_type_ids", None)
                with torch.autocast(model.device.type, _autocast_dtype(model), enabled=model.device.type == "cuda"):
                    out = model.generate(
                        **batch, max_new_tokens=max_new_tokens, pad_token_id=tokenizer.pad_token_id, **sampling
                    )
                new = out[:, batch["input_ids"].shape[1] :]
                answers += [text.strip() for text in tokenizer.batch_decode(new, skip_special_tokens=True)]
    finally:
        tokenizer.padding_side = padding_side
        model.train(was_training)
    return answers


def _prompt(tokenizer, chat: list[dict]) -> str:
    if tokenizer.chat_template:
        return tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    return plain_prompt(chat, tokenizer.eos_token)


def _autocast_dtype(model) -> torch.dtype:
    return torch.float16 if model.dtype == torch.float16 else torch.bfloat16
