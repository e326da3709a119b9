import pytest
import torch
from torchvision.transforms.v2 import functional as F

from groupdetr_fast.data import Batch, collate
from groupdetr_fast.data.normalization import IMAGENET_MEAN, IMAGENET_STD, Normalization


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


def pixels(height, width, image_id, normalization=None):
    """A sample of bytes, laid out as decoders do."""
    _, target = sample(height, width, 1, image_id)
    image = torch.randint(0, 256, (height, width, 3), dtype=torch.uint8).permute(2, 0, 1)
    return image, target if normalization is None else {**target, "normalization": normalization}


def test_bytes_are_normalised_on_the_device_as_each_image_would_be_by_itself(device):
    """So that a training is what it was when its images were normalised before they were padded."""
    normalization = Normalization(IMAGENET_MEAN, IMAGENET_STD)
    samples = [pixels(5, 9, 0, normalization), pixels(8, 4, 1, normalization)]
    batch = collate(samples)
    assert batch.images.dtype == torch.uint8
    moved = batch.to(device)
    assert moved.images.dtype == torch.float32
    assert moved.images.is_contiguous()
    for index, (image, _) in enumerate(samples):
        height, width = image.shape[1:]
        own = moved.images[index, :, :height, :width].cpu()
        assert torch.equal(own, normalization(image))
        expected = F.normalize(image.float() / 255, list(IMAGENET_MEAN), list(IMAGENET_STD))
        torch.testing.assert_close(own, expected, rtol=1e-6, atol=1e-6)
        assert (moved.images[index].cpu()[:, batch.masks[index]] == 0).all()
    again = moved.to(device)
    assert torch.equal(again.images, moved.images)


def test_without_a_normalisation_bytes_are_scaled():
    image, target = pixels(3, 4, 0)
    torch.testing.assert_close(collate([(image, target)]).to("cpu").images[0], image / 255)


def test_images_of_one_batch_are_of_one_kind():
    with pytest.raises(ValueError, match=r"one type, got torch\.uint8 and torch\.float32"):
        collate([pixels(3, 3, 0), sample(3, 3, 1, 1)])
    with pytest.raises(ValueError, match="one normalisation"):
        collate([pixels(3, 3, 0), pixels(3, 3, 1, Normalization(IMAGENET_MEAN, IMAGENET_STD))])
    with pytest.raises(TypeError, match=r"images must be uint8, got torch\.float32"):
        Normalization()(torch.rand(3, 4, 4))


class _Samples(torch.utils.data.Dataset):
    def __len__(self):
        return 6

    def __getitem__(self, index):
        torch.manual_seed(index)
        height, width = 5 + index, 12 - index
        image, target = pixels(height, width, index, Normalization(IMAGENET_MEAN, IMAGENET_STD))
        if index == 3:  # an image without objects
            target |= {"labels": torch.empty(0, dtype=torch.int64), "boxes": torch.empty(0, 4)}
        return image, {**target, "masks": torch.rand(len(target["labels"]), height, width) > 0.5}


def _collate_and_say_where(samples):
    batch = collate(samples)
    tensors = (batch.images, batch.masks, batch.targets.labels, batch.targets.boxes, batch.original_sizes)
    blocks = {tensor.untyped_storage().data_ptr() for tensor in (*tensors, *batch.targets.masks)}
    return batch, batch.images.is_shared() and len(blocks) == 1


def test_workers_collate_into_shared_memory():
    """So that nothing is copied on the way to the training process, which sees the same batches."""
    alone = list(torch.utils.data.DataLoader(_Samples(), 2, collate_fn=_collate_and_say_where))
    helped = list(torch.utils.data.DataLoader(_Samples(), 2, collate_fn=_collate_and_say_where, num_workers=2))
    for (own, shared), (other, other_shared) in zip(alone, helped, strict=True):
        assert (shared, other_shared) == (False, True)
        assert torch.equal(own.images, other.images)
        assert own.images.stride() == other.images.stride()
        assert torch.equal(own.masks, other.masks)
        assert torch.equal(own.original_sizes, other.original_sizes)
        for name in ("labels", "boxes", "num_targets"):
            assert torch.equal(getattr(own.targets, name), getattr(other.targets, name))
        for first, second in zip(own.targets.masks, other.targets.masks, strict=True):
            assert torch.equal(first, second)
        assert (own.targets.sizes, own.targets.largest_label) == (other.targets.sizes, other.targets.largest_label)
        assert own.normalization == other.normalization


@pytest.mark.gpu
def test_large_tensors_can_be_pinned():
    batch = collate([sample(5, 9, 2, 7)]).pin_memory()
    assert batch.images.is_pinned()
    assert batch.masks.is_pinned()
    assert batch.targets.labels.is_pinned()
