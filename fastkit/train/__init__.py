"""Fine-tune a model with QLoRA."""

import fastkit.models.bnb  # noqa: F401  before transformers imports bitsandbytes
