"""Loading state dicts under the names that transformers saves, with which its own ``Trainer`` does not resume."""

from typing import Any

import torch
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

__all__ = ["load_saved_names"]


def load_saved_names(model: PreTrainedModel) -> RemovableHandle:
    """Let ``model.load_state_dict`` take what ``save_pretrained`` writes, besides the model's own names.

    transformers 5 saves tensors under the names of earlier versions, which ``from_pretrained`` turns into the model's.
    Its ``Trainer`` loads a checkpoint by ``load_state_dict`` alone, and so leaves what is called otherwise as it was
    (huggingface/transformers#48805).

    Returns:
        A handle whose ``remove`` undoes it.
    """
    return model.register_load_state_dict_pre_hook(_rename)


def _rename(model: PreTrainedModel, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    names = list(model.state_dict())
    # These models' names are changed one by one, and tensors not at all: numbers in their place tell which is which.
    saved = revert_weight_conversion(model, {name: torch.tensor(index) for index, name in enumerate(names)})
    own = set(names)
    for saved_name, index in saved.items():
        if saved_name not in own and prefix + saved_name in state_dict:
            state_dict[prefix + names[index]] = state_dict.pop(prefix + saved_name)
