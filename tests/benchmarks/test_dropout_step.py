"""The comparison of training steps with dropout: which of its contenders draws by torch's generator."""

from torch.utils._python_dispatch import TorchDispatchMode

from cpu.bench_conditional_detr import BASE, TORCHS, prepare_dropout
from harness.results import OURS


class Operators(TorchDispatchMode):
    """The names of those that are called."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.add(function.name())
        return function(*args, **(kwargs or {}))


def test_contenders_drop_by_their_own_generators():
    runs, check = prepare_dropout(BASE.small())
    for contender, run in runs.items():
        with Operators() as called:
            check(run())
        assert ("aten::bernoulli_.float" in called.names) is (contender == TORCHS)
        assert ("groupdetr_fast::cross_attention" in called.names) is (contender == OURS)
