"""The architectures, one family a file; plain single-device PyTorch, nothing distributed here."""

from torch import nn

from configs.model import CPMConfig, ModelConfig, T5PegasusConfig


def build(config: ModelConfig) -> nn.Module:
    """The model of a config, on whatever device is current (meta, to be given values later)."""
    if isinstance(config, CPMConfig):
        from pretrain.models.cpm import CPM

        return CPM(config)
    if isinstance(config, T5PegasusConfig):
        from pretrain.models.t5_pegasus import T5Pegasus

        return T5Pegasus(config)
    from pretrain.models.roformer import RoFormer

    return RoFormer(config)
