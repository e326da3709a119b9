"""Ultralytics' trainer of RT-DETR with K groups of queries.

K is in the class of the trainer, since that is all that Ultralytics carries along: it makes the trainer itself, and
the processes of DDP make theirs from its class. Such a class is made where it is asked for, and found by its name.
"""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

from torch import nn
from ultralytics.utils import RANK
from ultralytics.utils.torch_utils import unwrap_model

from ..kernels import is_tested
from . import kept_groups, parts
from .groups import add_groups, has_groups, heads_of_others
from .training import AcceleratedTrainer

__all__ = ["group_trainer"]

_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")

_PREFIX = "GroupTrainer"
_NOISE = 0.1  # of new groups beside a trained one
_UNTRIED = ("compile", "distill_model")


def _called_by_users(function: Callable[_Arguments, _Result]) -> Callable[_Arguments, _Result]:
    """A function that says so where Ultralytics calls it for a trainer, as it does after ``trainer=FUNCTION``."""

    @functools.wraps(function)
    def called(*args: _Arguments.args, **kwargs: _Arguments.kwargs) -> _Result:
        if "overrides" in kwargs:
            name = function.__name__
            raise TypeError(
                f"trainer={name} passes the function itself, which makes trainers: call it with a number of groups, "
                f"as in trainer={name}(5)"
            )
        return function(*args, **kwargs)

    return called


@_called_by_users
def group_trainer(num_groups: int) -> type[AcceleratedTrainer]:
    """The trainer of Ultralytics' RT-DETR with K groups of queries (Group DETR, section 3.2) and these kernels.

    For ``RTDETR("rtdetr-l.pt").train(data=..., trainer=group_trainer(5))``, on one device or several. Every group
    has an encoder output projection and heads of its own (and learned contents, where the model has them), which pick
    its queries, as in LW-DETR; the decoder is shared, and its self-attention stays inside groups. Each group is matched
    on its own, and losses are averaged over groups. Denoising queries belong to group 0, as in the base model.

    Validation and what is saved have group 0 alone, in Ultralytics' own classes. The other groups lie beside
    ``last.pt`` until the training ends; to resume, pass the same trainer with ``resume=True``. Groups begin near group
    0 where that comes from a checkpoint, and else with projections of their own.

    Args:
        num_groups: K, at least 1; with 1 it trains as :class:`AcceleratedTrainer` does.

    Returns:
        The class. A trainer of it raises ValueError, before it writes anything, for ``compile``, ``distill_model`` and
        ``quantize=8``, which were not tried, and where the groups of the checkpoint to resume from are not found.

    Raises:
        TypeError: if the function itself was passed as ``trainer``.
        ValueError: if ``num_groups`` is no positive integer, or the version of ultralytics is none that this was
            tested with.
    """
    if type(num_groups) is not int or num_groups < 1:
        raise ValueError(f"num_groups must be an integer of at least 1, got {num_groups!r}")
    if num_groups > 1 and not is_tested(parts.__version__, parts.TESTED):
        raise ValueError(f"groups of queries were not tested with ultralytics {parts.__version__}: use {parts.NEEDED}")
    return _class_of(num_groups)


def __getattr__(name: str) -> Any:
    """``GroupTrainer5`` is ``group_trainer(5)``, for whoever unpickles it."""
    number = name.removeprefix(_PREFIX)
    if number != name and number.isdecimal() and not number.startswith("0"):
        return _class_of(int(number))
    raise AttributeError(f"module {__name__} has no attribute {name}")


@functools.cache
def _class_of(num_groups: int) -> type[AcceleratedTrainer]:
    name = f"{_PREFIX}{num_groups}"
    return type(name, (_GroupTrainer,), {"num_groups": num_groups, "__module__": __name__, "__qualname__": name})


class _GroupTrainer(AcceleratedTrainer):
    """Their own trainer, whose models have K groups, and which keeps the groups that its checkpoints leave out."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._started = False
        # In the file beside last.pt while theirs is written: the groups of the one that is there, and of the new one.
        self._kept = kept_groups.read(self.wdir) if self.num_groups > 1 else []

    def check_resume(self, overrides: Any) -> None:
        """Their own, and whether the options were tried with groups; before anything is written."""
        super().check_resume(overrides)
        used = [name for name in _UNTRIED if getattr(self.args, name, None)]
        used += ["quantize"] if getattr(self.args, "quantize", None) == 8 else []
        if used and self.num_groups > 1:
            raise ValueError(f"{used[0]} was not tried with groups of queries: leave one of them out")

    def get_model(self, cfg: Any = None, weights: nn.Module | None = None, verbose: bool = True) -> nn.Module:
        model = super().get_model(cfg, weights, verbose)
        add_groups(model, self.num_groups, noise=None if weights is None else _NOISE)
        return model

    def setup_model(self) -> Any:
        """Their own; in a process of DDP the model may be a pickled one, whose other groups were left out."""
        checkpoint = super().setup_model()
        if self.num_groups > 1 and not has_groups(self.model):
            add_groups(self.model, self.num_groups, noise=None if self.args.pretrained is False else _NOISE)
        return checkpoint

    def save_model(self) -> Any:
        """Their own, after the other groups: whenever there is a checkpoint, there are its groups."""
        if self.num_groups == 1:
            return super().save_model()
        before = kept_groups.of_model(self.ema.ema, self.epoch)
        kept_groups.write(self.wdir, [*self._kept, before])
        saved = super().save_model()
        if saved is False:  # last.pt is the one that was there
            kept_groups.write(self.wdir, self._kept)
            return saved
        groups = kept_groups.of_model(self.ema.ema, self.epoch)
        if not kept_groups.are_same(groups, before):  # Ultralytics has exchanged averages that were not finite
            kept_groups.write(self.wdir, [*self._kept, groups])
        self._kept = [groups]
        return saved

    def resume_training(self, ckpt: Any) -> None:
        """Their own, after which states come from this trainer's ``last.pt``."""
        super().resume_training(ckpt)
        self._started = True

    def _load_checkpoint_state(self, ckpt: dict[str, Any]) -> None:
        """Their own, after the other groups of that checkpoint: to resume, and after losses that were not finite."""
        if self.num_groups > 1:
            path = self.last if self._started else Path(self.args.model)
            others = heads_of_others(unwrap_model(self.model))
            others.load_state_dict(kept_groups.heads_of(path, ckpt, self.num_groups))
        super()._load_checkpoint_state(ckpt)

    def final_eval(self) -> Any:
        """Their own, after which the checkpoints have no state to go on from, and need no groups."""
        result = super().final_eval()
        if RANK in (-1, 0):
            (self.wdir / kept_groups.KEPT).unlink(missing_ok=True)
        return result
