"""How classes of Ultralytics' modules are exchanged, so that what is saved still has Ultralytics' own."""

import copy
from typing import Any, ClassVar, cast

from torch import nn

__all__ = ["SavedAsTheirs", "set_class"]


class SavedAsTheirs:
    """Mixin before a class of Ultralytics, whose subclasses stand in for it: they are pickled as that class.

    Ultralytics pickles whole models into its checkpoints, which must load where this package is not installed. Copies
    by ``copy``, as the averaged weights are, stay what they are.

    Attributes:
        theirs: the class of Ultralytics.
        unsaved: names of attributes and submodules that it does not have, and that pickles leave out.
    """

    theirs: ClassVar[type]
    unsaved: ClassVar[frozenset[str]] = frozenset()

    @property
    def __class__(self) -> type:
        """The class of Ultralytics: pickle refuses an object whose class is not the one that it writes."""
        return self.theirs

    @__class__.setter
    def __class__(self, cls: type) -> None:
        self.take_class(cls)

    def take_class(self, cls: type) -> None:
        """What an assignment to ``__class__`` does; that of Ultralytics' own class gives its code back."""
        set_class(cast(nn.Module, self), cls)

    def __reduce_ex__(self, protocol: Any) -> Any:
        reduced: Any = super().__reduce_ex__(protocol)
        function, (_, *arguments), state, *rest = reduced
        return function, (self.theirs, *arguments), self._saved(state), *rest

    def _saved(self, state: dict[str, Any]) -> dict[str, Any]:
        modules = {name: module for name, module in state["_modules"].items() if name not in self.unsaved}
        return {name: value for name, value in state.items() if name not in self.unsaved} | {"_modules": modules}

    def __copy__(self) -> Any:
        twin = type(self).__new__(type(self))
        twin.__dict__.update(self.__dict__)
        return twin

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        cls = type(self)
        twin = cls.__new__(cls)
        memo[id(self)] = twin
        twin.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return twin


def set_class(module: nn.Module, cls: type) -> None:
    """Exchange the class of a module, also where :class:`SavedAsTheirs` hides it."""
    object.__dict__["__class__"].__set__(module, cls)
