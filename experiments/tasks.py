"""The two pocket tasks that studies share, as overrides: real embedded images and text, test part in two halves."""

WHOLE = [f"++trainer.limit_{part}_batches=1.0" for part in ("val", "test")]
COMMON = ["++trainer.accelerator=cpu", "++trainer.enable_progress_bar=false", "save_every=0", *WHOLE]


def length(epochs: int, steps: int) -> list[str]:
    """So many epochs of so many steps, each a fresh random part of the training set; validation after each."""
    return [f"trainer.max_epochs={epochs}", f"++trainer.limit_train_batches={steps}"]


def images(width: int = 128, batch: int = 32) -> list[str]:
    """Fashion-MNIST (embedded sample) and a ViT of two layers on 16 patches of 7 pixels."""
    return [
        "experiment=prelora_pocket", "data._target_=experiments.held_out.Images", f"data.batch_size={batch}",
        f"model.model_kwargs.embed_dim={width}", "model.model_kwargs.depth=2", *COMMON,
    ]  # fmt: skip


def mixer(width: int = 128, batch: int = 32) -> list[str]:
    """The same images and an MLP-Mixer of two layers."""
    return [
        "experiment=prelora_pocket", "model=mixer_ti", "model.name=mixer_pocket", f"+model.model_kwargs.embed_dim={width}",
        "data._target_=experiments.held_out.Images", f"data.batch_size={batch}", *COMMON,
    ]  # fmt: skip


def gpt2(width: int = 128, batch: int = 8, tokens: int = 64) -> list[str]:
    """The King James text (embedded) and a GPT-2 of two layers, its head tied to the embedding."""
    return [
        "experiment=lte_gpt2_pocket", "data._target_=experiments.held_out.Text", f"data.batch_size={batch}",
        f"data.seq_len={tokens}", f"model.config.n_embd={width}", "model.config.n_head=4", "model.config.n_layer=2",
        "optim.weight_decay=0.05", *COMMON,
    ]  # fmt: skip


def llama(width: int = 128, batch: int = 8, tokens: int = 64) -> list[str]:
    """The same text and a LLaMA of two layers."""
    return [
        "experiment=galore_pocket", "data._target_=experiments.held_out.Text", f"data.batch_size={batch}",
        f"data.seq_len={tokens}", f"model.config.hidden_size={width}", f"model.config.intermediate_size={width * 11 // 4}",
        "model.config.num_hidden_layers=2", "model.config.num_attention_heads=4", "model.config.num_key_value_heads=4", *COMMON,
    ]  # fmt: skip
