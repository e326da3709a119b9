"""What the tests of whole runs share."""

from safetensors.torch import load_file


def weights(run, epoch):
    return load_file(run / "checkpoints" / f"epoch_{epoch:04d}" / "model.safetensors")
