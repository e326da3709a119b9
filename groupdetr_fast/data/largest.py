"""How large the images of a training can become."""

from torch import Tensor

from .transforms import AugmentationConfig

__all__ = ["largest_training_size"]


def largest_training_size(config: AugmentationConfig, sizes: Tensor) -> tuple[int, int]:
    """Height and width that no batch of augmented images exceeds.

    A batch may have a tall image and a wide one, so that both may be those of different images. A transform of one's
    own gives images of any aspect ratio; ``max_size`` is then the limit, and without one the ratios are taken to be
    those of the data.

    Args:
        config: of the augmentation.
        sizes: ``[N, 2]``, (height, width) of the images before it.
    """
    if config.jitter_size is not None:
        return config.jitter_size, config.jitter_size
    target = max(config.short_sides)
    if config.square:
        return target, target
    if config.transforms is not None and config.max_size is not None:
        return config.max_size, config.max_size
    height, width = sizes.double().unbind(1)
    scale = target / sizes.double().amin(1)
    if config.max_size is not None:
        scale = scale.minimum(config.max_size / sizes.double().amax(1))
    largest = [float((side * scale).amax()) for side in (height, width)]
    if config.crop > 0:
        ratio = config.crop_max / min(config.crop_min, *config.crop_short_sides)
        long = min(target * ratio, config.max_size or float("inf"))
        largest = [max(side, long) for side in largest]
    return round(largest[0]), round(largest[1])
