import os
from pathlib import Path

import pytest
import torch

# Real data that lies beside a checkout of the repository; tests that use it skip, saying so, where it is missing.
SHARED_DATA = Path(os.environ.get("GROUPDETR_FAST_TEST_DATA", Path(__file__).parents[2] / "shared" / "data"))


HAS_GPU = torch.cuda.is_available()


def pytest_collection_modifyitems(items):
    if not HAS_GPU:
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="no GPU"))


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)] if HAS_GPU else ["cpu"])
def device(request):
    return torch.device(request.param)


@pytest.fixture(autouse=True)
def _fixed_seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _exact_products():
    """On GPUs, importing rfdetr lets products of float32 be rounded, and so do trainings, in the whole process."""
    torch.set_float32_matmul_precision("highest")


@pytest.fixture
def shared_data():
    """A function from the name of a real data set to its folder; skips the test where that is missing."""

    def find(name):
        folder = SHARED_DATA / name
        if not folder.is_dir():
            pytest.skip(
                f"the data set {name} is not at {folder} (set GROUPDETR_FAST_TEST_DATA to the folder that has it)"
            )
        return folder

    return find


@pytest.fixture
def made_up_toolkit(tmp_path):
    """A function that makes a CUDA toolkit whose nvcc only tells its version and what it compiles for."""

    def make(version, *architectures):
        nvcc = tmp_path / f"cuda-{version}" / "bin" / "nvcc"
        nvcc.parent.mkdir(parents=True)
        listed = "\\n".join(f"compute_{architecture}" for architecture in architectures)
        nvcc.write_text(
            "#!/bin/sh\n"
            f'case "$1" in --version) echo "release {version}, V{version}.1";; '
            f'--list-gpu-arch) printf "{listed}\\n";; esac\n'
        )
        nvcc.chmod(0o755)
        return str(nvcc.parents[1])

    return make
