"""Names and shapes of a model's tensors, for engines that have no framework to ask. The modules of `cfrt.nn` are the
definition; a test compares the two."""

from .config import AutoencoderConfig, ModelConfig
from .errors import ConfigError

Shapes = dict[str, tuple[int, ...]]


def dit(config: ModelConfig) -> Shapes:
    """The DiT, by Wan's names."""
    d = config.width
    shapes: Shapes = {
        "patch_embedding.weight": (d, config.latent_channels, *config.patch),
        "patch_embedding.bias": (d,),
        **_linear("text_embedding.0", d, config.text.width),
        **_linear("text_embedding.2", d, d),
        **_linear("time_embedding.0", d, config.time_width),
        **_linear("time_embedding.2", d, d),
        **_linear("time_projection.1", 6 * d, d),
        "head.modulation": (1, 2, d),
        **_linear("head.head", config.patch_width, d),
    }
    for block in (f"blocks.{i}" for i in range(config.depth)):
        shapes[f"{block}.modulation"] = (1, 6, d)
        shapes |= {f"{block}.norm3.weight": (d,), f"{block}.norm3.bias": (d,)}
        shapes |= _linear(f"{block}.ffn.0", config.ffn, d) | _linear(f"{block}.ffn.2", d, config.ffn)
        for attention in (f"{block}.self_attn", f"{block}.cross_attn"):
            shapes |= {f"{attention}.norm_q.weight": (d,), f"{attention}.norm_k.weight": (d,)}
            for name in "qkvo":
                shapes |= _linear(f"{attention}.{name}", d, d)
    return shapes


def autoencoder(config: AutoencoderConfig) -> Shapes:
    """The small video autoencoder; ConfigError for one of another kind."""
    if config.kind != "tiny" or config.spatial != 16 or config.temporal != 4 or len(config.widths) != 6:
        raise ConfigError(
            f"expected an autoencoder of kind 'tiny' with spatial 16, temporal 4 and six widths, got {config}"
        )
    e4, e8, e16, d16, d8, d4 = config.widths
    channels, pixels = config.latent_channels, 3 * config.temporal * 16
    return {
        "latent_mean": (channels, 1, 1),
        "latent_std": (channels, 1, 1),
        **_conv("encoder.0", e4, pixels, 3),
        **_residual("encoder.1", e4),
        **_conv("encoder.3", e8, 4 * e4, 1),
        **_residual("encoder.4", e8),
        **_conv("encoder.6", e16, 4 * e8, 1),
        **_residual("encoder.7", e16),
        **_conv("encoder.9", channels, e16, 3),
        **_conv("decoder.0", d16, 2 * channels, 3),
        **_residual("decoder.1", d16),
        **_conv("decoder.2", 4 * d8, d16, 1),
        **_residual("decoder.4", d8),
        **_residual("decoder.5", d8),
        **_conv("decoder.6", 4 * d4, d8, 1),
        **_residual("decoder.8", d4),
        **_residual("decoder.9", d4),
        **_conv("decoder.11", pixels, d4, 3),
    }


def _linear(name: str, n: int, k: int) -> Shapes:
    return {f"{name}.weight": (n, k), f"{name}.bias": (n,)}


def _conv(name: str, n: int, k: int, size: int) -> Shapes:
    return {f"{name}.weight": (n, k, size, size), f"{name}.bias": (n,)}


def _residual(name: str, width: int) -> Shapes:
    return _conv(f"{name}.conv1", width, width, 3) | _conv(f"{name}.conv2", width, width, 3)
