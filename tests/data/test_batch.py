import pytest
import torch

from groupdetr_fast.data import Batch, collate


def sample(height, width, objects, image_id):
    target = {
        "labels": torch.arange(objects),
        "boxes": torch.rand(objects, 4),
        "image_id": image_id,
        "original_size": torch.tensor([2 * height, 2 * width]),
    }
    return torch.rand(3, height, width) + 1, target


def test_images_are_padded_and_masked():
    samples = [sample(5, 9, 2, 7), sample(8, 4, 0, 3), sample(8, 9, 3, 11)]
    batch = collate(samples)
    assert len(batch) == 3
    assert batch.images.shape == (3, 3, 8, 9)
    assert batch.masks.shape == (3, 8, 9)
    assert batch.masks.dtype == torch.bool
    for index, (image, target) in enumerate(samples):
        height, width = image.shape[1:]
        assert torch.equal(batch.images[index, :, :height, :width], image)
        assert (~batch.masks[index]).sum() == height * width
        assert not batch.masks[index, :height, :width].any()
        assert (batch.images[index][:, batch.masks[index]] == 0).all()
        assert torch.equal(batch.targets.boxes[index, : batch.targets.sizes[index]], target["boxes"])
    assert batch.targets.sizes == (2, 0, 3)
    assert batch.targets.labels[0].tolist() == [0, 1, 0]
    assert batch.image_ids == [7, 3, 11]
    assert batch.original_sizes.tolist() == [[10, 18], [16, 8], [16, 18]]


def test_smallest_size():
    batch = collate([sample(6, 20, 1, 0)], min_size=16)
    assert batch.images.shape == (1, 3, 16, 20)
    assert (~batch.masks).sum() == 6 * 20


def test_no_padding_among_equal_sizes():
    assert not collate([sample(6, 6, 1, 0), sample(6, 6, 1, 1)]).masks.any()


def test_empty_batch_is_refused():
    with pytest.raises(ValueError, match="at least one sample"):
        collate([])


def test_batch_moves_as_a_whole(device):
    batch = collate([sample(5, 9, 2, 7), sample(8, 4, 0, 3)]).to(device, non_blocking=True)
    assert isinstance(batch, Batch)
    tensors = (batch.images, batch.masks, batch.targets.labels, batch.targets.boxes, batch.original_sizes)
    assert {tensor.device.type for tensor in tensors} == {device.type}
    assert batch.image_ids == [7, 3]
    assert batch.targets.sizes == (2, 0)


@pytest.mark.gpu
def test_large_tensors_can_be_pinned():
    batch = collate([sample(5, 9, 2, 7)]).pin_memory()
    assert batch.images.is_pinned()
    assert batch.masks.is_pinned()
    assert batch.targets.labels.is_pinned()
