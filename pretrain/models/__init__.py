"""The architectures, one family a file; plain single-device PyTorch, nothing distributed here."""

from torch import nn

from configs.model import CPMConfig, ModelConfig


def build(config: ModelConfig) -> nn.Module:
    """The model of a config, on whatever device is current (meta, to be given values later)."""
    if isinstance(config, CPMConfig):
        from pretrain.models.cpm import CPM

        return CPM(config)
    raise ValueError(
        f"model.family: is {config.family}; its sizes are known, its model is not built yet; "
        "cpm is (该模型族尚未实现)"
    )
