"""How the original repositories name the tensors of each detector in their files.

The backbone is ``backbone.0``, and the encoder and the decoder are under ``transformer``. Heads that the decoder uses
too are in the file twice; DINO's, which all decoder layers share, are in it once per layer besides.
"""

from collections.abc import Callable
from dataclasses import dataclass

from ..conditional_detr import ConditionalDetr
from ..dab_deformable_detr import DabDeformableDetr
from ..dab_detr import DabDetr
from ..detector import Detector
from ..dino import Dino
from ..dn_detr import DnDetr
from ..mask2former import Mask2Former
from .detectron2 import detectron2_key
from .layouts import Converted, Layout, StateDict, gather

__all__ = ["ORIGINAL", "convert_original", "original_keys"]


@dataclass(frozen=True)
class _Names:
    """What distinguishes the files of one repository, by starts of this package's names.

    Attributes:
        in_transformer: what is under ``transformer``.
        in_decoder: what is under ``transformer.decoder`` as well.
        per_layer: what is repeated for every decoder layer.
    """

    in_transformer: tuple[str, ...] = ("encoder.", "decoder.")
    in_decoder: tuple[str, ...] = ()
    per_layer: tuple[str, ...] = ()


_DAB = _Names(in_decoder=("bbox_embed.",))
_NAMES: dict[type[Detector], _Names] = {
    ConditionalDetr: _Names(),
    DabDetr: _DAB,
    DnDetr: _DAB,
    DabDeformableDetr: _Names(in_transformer=("encoder.", "decoder.", "level_embed"), in_decoder=("bbox_embed.",)),
    Dino: _Names(
        in_transformer=("encoder.", "decoder.", "level_embed", "tgt_embed.", "enc_out"),
        in_decoder=("class_embed.", "bbox_embed."),
        per_layer=("class_embed.", "bbox_embed."),
    ),
}


def original_keys(model: Detector) -> Callable[[str], list[str]]:
    """A function from the name of a tensor of ``model`` to the keys under which its original repository saves it.

    Raises:
        TypeError: if the model is not a detector of this package.
    """
    if isinstance(model, Mask2Former):
        return lambda name: [detectron2_key(name)]
    if type(model) not in _NAMES:
        raise TypeError(f"expected a detector of this package, got {type(model).__name__}")
    names = _NAMES[type(model)]

    def keys_of(name: str) -> list[str]:
        if name.startswith("backbone."):
            return [name.replace("backbone.", "backbone.0.", 1)]
        if name.startswith(names.in_transformer):
            return [f"transformer.{name}"]
        keys = [name]
        if name.startswith(names.per_layer):
            head, _, rest = name.partition(".")
            keys = [f"{head}.{layer}.{rest}" for layer in range(model.config.decoder_layers)]
        if name.startswith(names.in_decoder):
            keys += [f"transformer.decoder.{key}" for key in keys]
        return keys

    return keys_of


def convert_original(state: StateDict, model: Detector) -> Converted:
    """Sort a checkpoint of the model's original repository by the names of the model."""
    keys_of = original_keys(model)
    present = {name: [key for key in keys_of(name) if key in state] for name in model.state_dict()}
    return gather({name: keys for name, keys in present.items() if keys}, state)


ORIGINAL = Layout("the original repository", r"transformer\.decoder\.layers\.0\.", convert_original)
