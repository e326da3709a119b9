"""Where the groups are: their number, the parameters of each, and the rows of each in the outputs."""

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from .nested import find_tensors
from .quiet import Modes
from .subject import Inputs, Subject

__all__ = ["SEED", "GroupParameter", "Output", "Structure", "add_up", "find_structure", "weigh"]

SEED = 0  # of every forward pass, so that two of them draw alike

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Output:
    """A tensor among the outputs.

    Attributes:
        name: its place, such as ``aux_outputs.0.pred_boxes``.
        shape: in training mode.
        batch_dim: the dimension of images.
        query_dim: the dimension of K * N queries; None if it has none.
        in_evaluation: whether evaluation mode has it too.
    """

    name: str
    shape: tuple[int, ...]
    batch_dim: int
    query_dim: int | None
    in_evaluation: bool


@dataclass(frozen=True)
class GroupParameter:
    """A parameter that belongs to groups.

    Attributes:
        name: in the model.
        parameter: it.
        group: the group whose it is; None where each group has its own rows, of K * N in all.
    """

    name: str
    parameter: nn.Parameter
    group: int | None = None


@dataclass
class Structure:
    """What was found.

    Attributes:
        num_groups, group_size: K and N; 1 and None if no groups were found.
        collapses: whether evaluation mode has N queries, and not all K * N.
        interleaved: whether rows g, g + K, g + 2 K, ... are those of group g, and not N rows on end.
        evaluation_group: the group that evaluation uses, where it uses one.
        parameters: of the groups.
        outputs: those that are checked.
        not_checked: the others, with the reason.
    """

    num_groups: int = 1
    group_size: int | None = None
    collapses: bool = True
    interleaved: bool = False
    evaluation_group: int | None = None
    parameters: list[GroupParameter] = field(default_factory=list)
    outputs: list[Output] = field(default_factory=list)
    not_checked: dict[str, str] = field(default_factory=dict)

    @property
    def length(self) -> int | None:
        """K * N."""
        return None if self.group_size is None else self.num_groups * self.group_size

    @property
    def query_outputs(self) -> list[Output]:
        return [output for output in self.outputs if output.query_dim is not None]

    def rows(self, group: int) -> slice:
        """The rows of a group among K * N."""
        if self.interleaved:
            return slice(group, None, self.num_groups)
        size = self.group_size or 0
        return slice(group * size, (group + 1) * size)

    def of_group(self, output: Output, tensor: Tensor, group: int) -> Tensor:
        """A group's part of an output, the queries first."""
        assert output.query_dim is not None
        return tensor.movedim(output.query_dim, 0)[self.rows(group)]


def find_structure(subject: Subject, modes: Modes, num_groups: int | None) -> Structure:
    """Compare training with evaluation mode.

    Args:
        num_groups: K; None to find it.

    Raises:
        ValueError: if there are no groups although ``num_groups`` says so, or no parameter is found that is theirs.
    """
    modes.evaluation()
    evaluation = _shapes(subject, subject.inputs)
    modes.training()
    training, single = _shapes(subject, subject.inputs), _shapes(subject, subject.single)
    structure = _count(subject, training, evaluation, num_groups)
    for name, shape in training.items():
        if shape:  # else it is a loss
            _add_output(structure, name, shape, single.get(name, ()), evaluation.get(name))
    if not structure.outputs:
        raise ValueError(
            f"{subject.name} returns no tensor in training mode with a dimension of images: its forward must return "
            "predictions, such as logits and boxes, and not losses alone"
        )
    if structure.length is not None:
        _find_parameters(structure, subject, modes)
        if not structure.parameters:
            raise ValueError(
                f"{subject.name} has {structure.num_groups} groups of {structure.group_size} queries, but no "
                f"parameter was found that is theirs: none has {structure.length} rows, of which evaluation uses "
                f"{structure.group_size}"
            )
    return structure


def _shapes(subject: Subject, inputs: Inputs) -> Shapes:
    torch.manual_seed(SEED)
    with torch.no_grad():
        found = find_tensors(subject.forward(inputs))
    return {name: tuple(tensor.shape) for name, tensor in found.items()}


def _count(subject: Subject, training: Shapes, evaluation: Shapes, given: int | None) -> Structure:
    """K and N, by the outputs that have K times as many rows in training mode."""
    votes: Counter[tuple[int, int]] = Counter()
    for name, shape in training.items():
        other = evaluation.get(name, ())
        unequal = [dim for dim in range(len(shape)) if len(other) == len(shape) and other[dim] != shape[dim]]
        if len(unequal) == 1 and other[unequal[0]] > 0:
            groups, rest = divmod(shape[unequal[0]], other[unequal[0]])
            if rest == 0 and groups > 1 and given in (None, groups):
                votes[groups, other[unequal[0]]] += 1
    if votes:
        return Structure(*votes.most_common(1)[0][0])
    if given in (None, 1):
        return Structure()
    sizes = {size for shape in training.values() for size in shape}
    lengths = Counter(rows for _, each in _candidates(subject.model) for rows in _row_counts(each, given))
    for length, _ in lengths.most_common():
        if length in sizes and length > given and length % given == 0:
            return Structure(given, length // given, collapses=False)
    raise ValueError(
        f"{subject.name} has no {given} groups: no output has {given} times as many queries in training mode as in "
        "evaluation mode, nor as many in both as a parameter has rows"
    )


def _add_output(
    structure: Structure, name: str, shape: tuple[int, ...], single: tuple[int, ...], evaluation: tuple[int, ...] | None
) -> None:
    batch = [dim for dim in range(len(shape)) if len(single) == len(shape) and single[dim] != shape[dim]]
    if len(batch) != 1 or single[batch[0]] != 1:
        structure.not_checked[name] = f"no dimension of {list(shape)} is that of the images"
        return
    query = [dim for dim, size in enumerate(shape) if size == structure.length and dim != batch[0]]
    if evaluation is not None and len(evaluation) == len(shape):
        expected = structure.group_size if structure.collapses else structure.length
        query = [dim for dim in query if evaluation[dim] == expected]
        rest = [dim for dim in range(len(shape)) if dim not in query and evaluation[dim] != shape[dim]]
        if not query and rest:
            structure.not_checked[name] = f"{list(shape)} in training mode and {list(evaluation)} in evaluation mode"
            return
    if len(query) > 1:
        structure.not_checked[name] = f"several dimensions of {list(shape)} may be that of the queries"
        return
    structure.outputs.append(Output(name, shape, batch[0], query[0] if query else None, evaluation is not None))


def _find_parameters(structure: Structure, subject: Subject, modes: Modes) -> None:
    """Parameters of K * N rows, and of K modules alike: training uses those of several groups, evaluation of one."""
    length, groups = structure.length or 0, structure.num_groups
    by_rows = [(name, each) for name, each in _candidates(subject.model) if length in _row_counts(each, groups)]
    if not structure.collapses:
        structure.parameters += [GroupParameter(name, each) for name, each in by_rows]
        return
    families = _families(subject.model, groups)
    candidates = dict(by_rows) | {name: each for family in families for name, each in family}
    modes.evaluation()
    evaluation = _gradients(subject, candidates)
    modes.training()
    training = _gradients(subject, candidates)
    for name, each in by_rows:
        reason = _note_rows(structure, *(_touched(used[name], length) for used in (training, evaluation)))
        if reason is None:
            structure.parameters.append(GroupParameter(name, each))
        else:
            structure.not_checked[name] = f"a parameter of {length} rows, {reason}"
    for family in families:
        in_training, in_evaluation = (
            [group for group, (name, _) in enumerate(family) if _touched(used[name], 1)]
            for used in (training, evaluation)
        )
        # Heads of decoder layers may be as many, of which evaluation uses the last alone.
        if len(in_training) > 1 and in_evaluation == [structure.evaluation_group or 0]:
            structure.evaluation_group = in_evaluation[0]
            structure.parameters += [GroupParameter(name, each, group) for group, (name, each) in enumerate(family)]


def _note_rows(structure: Structure, in_training: list[int], in_evaluation: list[int]) -> str | None:
    """Note the group whose rows evaluation uses, and how rows fall into groups; or why they are not those of groups."""
    size, groups = structure.group_size or 1, structure.num_groups
    if not in_evaluation:
        return "none of which evaluation uses"
    if set(in_training) <= set(in_evaluation):
        return "of which training uses no more than evaluation"
    if len({row // size for row in in_evaluation}) == 1:
        structure.evaluation_group = in_evaluation[0] // size
    elif len({row % groups for row in in_evaluation}) == 1:
        structure.interleaved, structure.evaluation_group = True, in_evaluation[0] % groups
    else:
        return "those of several groups used in evaluation"
    return None


def _gradients(subject: Subject, candidates: Mapping[str, nn.Parameter]) -> dict[str, Tensor | None]:
    """The gradient of all outputs to parameters."""
    torch.manual_seed(SEED)
    outputs = find_tensors(subject.forward(subject.inputs)).values()
    total = add_up(weigh(tensor) for tensor in outputs if tensor.requires_grad)
    if total is None:
        mode = "training" if subject.model.training else "evaluation"
        raise ValueError(f"{subject.name} returns nothing in {mode} mode that has a gradient")
    gradients = torch.autograd.grad(total, list(candidates.values()), allow_unused=True)
    return dict(zip(candidates, gradients, strict=True))


def _touched(gradient: Tensor | None, rows: int) -> list[int]:
    """The rows that have a gradient."""
    return [] if gradient is None else gradient.reshape(rows, -1).ne(0).any(1).nonzero().flatten().tolist()


def weigh(tensor: Tensor) -> Tensor:
    """A random weighting of a tensor, as a sum: the plain sum of a layer norm's outputs would have no gradient."""
    return (tensor * torch.randn_like(tensor)).sum()


def add_up(parts: Iterable[Tensor]) -> Tensor | None:
    """The sum; None of nothing."""
    total: Tensor | None = None
    for part in parts:
        total = part if total is None else total + part
    return total


def _candidates(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Parameters that may hold queries: of embeddings and of modules that are not torch's own layers."""
    for prefix, module in model.named_modules():
        if type(module).__module__.startswith("torch.nn.") and not isinstance(module, nn.Embedding | nn.ParameterList):
            continue
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.dim() > 1 and parameter.is_floating_point():
                yield (f"{prefix}.{name}" if prefix else name), parameter


def _row_counts(parameter: nn.Parameter, groups: int | None) -> set[int]:
    """The numbers of rows that a parameter may be said to have: ``[rows, d]``, ``[1, rows, d]``, ``[K, N, d]``."""
    shape = parameter.shape
    counts = {shape[0]}
    if parameter.dim() > 2 and shape[0] in (1, groups):
        counts.add(shape[0] * shape[1])
    return counts


def _families(model: nn.Module, groups: int) -> list[list[tuple[str, nn.Parameter]]]:
    """Parameters of one shape whose names differ in one number, which counts from 0 to K - 1."""
    families: dict[tuple[str, int], dict[int, tuple[str, nn.Parameter]]] = defaultdict(dict)
    for name, parameter in model.named_parameters():
        parts = name.split(".")
        for place, part in enumerate(parts):
            if part.isdigit() and parameter.is_floating_point():
                families[".".join([*parts[:place], "*", *parts[place + 1 :]]), place][int(part)] = (name, parameter)
    whole = (family for family in families.values() if sorted(family) == list(range(groups)))
    return [
        [family[group] for group in range(groups)]
        for family in whole
        if len({each.shape for _, each in family.values()}) == 1
    ]
