"""COCO metrics of one model under different ways to use its queries: one group or all of them, with NMS or without."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchvision.ops import batched_nms

from ..data import CocoDataset
from ..groups import QueryGroups
from ..models import DetectorOutput, SegmentationOutput, postprocess
from ..models.checkpoints.read import read_checkpoint
from ..models.detector import Detector
from ..runs.config import CocoTrainingConfig
from ..runs.evaluate import evaluator_of
from ..runs.loaders import evaluation_loader, evaluation_samples, evaluation_set

__all__ = ["evaluate_groups", "evaluate_usages", "inference_groups", "load_weights", "suppress_duplicates"]

Output = DetectorOutput | SegmentationOutput

NMS_CANDIDATES = 1000  # pairs of query and class that enter the suppression


def suppress_duplicates(detections: dict[str, Tensor], iou_threshold: float) -> dict[str, Tensor]:
    """Non-maximum suppression inside each class.

    Args:
        detections: of one image, as ``models.postprocess`` returns them.
        iou_threshold: of two boxes of one class that overlap by more, the one with the lower score goes.

    Returns:
        The detections that are left, by descending score.
    """
    kept = batched_nms(detections["boxes"], detections["scores"], detections["labels"], iou_threshold)
    return {name: value[kept] for name, value in detections.items()}


def inference_groups(config: CocoTrainingConfig) -> QueryGroups:
    """The groups of which inference keeps one.

    Those that attention was kept inside, or else those that were matched on their own: with shared self-attention and
    group-wise assignment, inference uses the queries of the first part alone (table 7c).
    """
    num_groups = config.model.num_groups
    length = num_groups * config.model.resolved_num_queries()
    if num_groups == 1 and config.assignment == "group":
        num_groups = config.positives or 1
    return QueryGroups(num_groups, length // num_groups)


def evaluate_usages(config: CocoTrainingConfig, checkpoint: Path, nms_threshold: float) -> dict[str, dict[str, Any]]:
    """Evaluate a checkpoint with one group and with all queries, with non-maximum suppression and without.

    Args:
        config: of the training.
        checkpoint: folder of the checkpoint.
        nms_threshold: see :func:`suppress_duplicates`.

    Returns:
        Metrics under ``"one_group"``, ``"one_group_nms"``, ``"all_queries"`` and ``"all_queries_nms"``. With all
        queries, self-attention is that of the training.
    """
    data = _EvaluationData.load(config)
    groups = inference_groups(config)
    everything = data.evaluate(_load(config, checkpoint, data), _detect_with_all, nms_threshold)
    results = {"all_queries": everything.plain, "all_queries_nms": everything.suppressed}
    one = everything
    if groups.num_groups > 1:
        # The same rows of queries as groups that do not see each other.
        layout = replace(config.model, num_groups=groups.num_groups, num_queries=groups.queries_per_group)
        model = _load(replace(config, model=layout), checkpoint, data)
        one = data.evaluate(model, _detect_with_one, nms_threshold)
    return {"one_group": one.plain, "one_group_nms": one.suppressed, **results}


def evaluate_groups(config: CocoTrainingConfig, checkpoint: Path) -> list[dict[str, Any]]:
    """COCO metrics of each group of a checkpoint, used alone."""
    data = _EvaluationData.load(config)
    model = _load(config, checkpoint, data)
    return [
        data.evaluate(model, partial(_detect_with_one, group=group)).plain for group in range(config.model.num_groups)
    ]


@dataclass
class _Metrics:
    plain: dict[str, Any]
    suppressed: dict[str, Any]  # empty where nothing was to be suppressed


@dataclass
class _EvaluationData:
    """The evaluation set of a training, and how it is evaluated."""

    config: CocoTrainingConfig
    dataset: CocoDataset
    loader: DataLoader[Any]

    @classmethod
    def load(cls, config: CocoTrainingConfig) -> "_EvaluationData":
        dataset = evaluation_set(config)
        return cls(config, dataset, evaluation_loader(evaluation_samples(dataset, config, _device()), config))

    @torch.no_grad()
    def evaluate(self, model: Detector, detect: Callable[..., Output], nms_threshold: float | None = None) -> _Metrics:
        top_k = self.config.top_k
        plain, suppressed = (evaluator_of(self.dataset, self.config) for _ in range(2))
        for image_ids, sizes, output in self._outputs(model, detect):
            plain.update(image_ids, postprocess(output, sizes, top_k=top_k))
            if nms_threshold is not None:
                candidates = postprocess(output, sizes, top_k=NMS_CANDIDATES)
                left = [suppress_duplicates(detections, nms_threshold) for detections in candidates]
                suppressed.update(image_ids, [{k: v[:top_k] for k, v in each.items()} for each in left])
        return _Metrics(plain.summarize(), {} if nms_threshold is None else suppressed.summarize())

    def _outputs(self, model: Detector, detect: Callable[..., Output]) -> Iterator[tuple[list[int], Tensor, Output]]:
        device = next(model.parameters()).device
        for batch in self.loader:
            moved = batch.to(device)
            yield batch.image_ids, batch.original_sizes, detect(model, moved.images, moved.masks)


def load_weights(model: nn.Module, checkpoint: Path) -> None:
    """Load a checkpoint of a training; how the model divides its queries into groups is free.

    Args:
        model: the detector.
        checkpoint: a file, a folder that holds one, or the folder of a run.
    """
    model.load_state_dict(read_checkpoint(checkpoint).state)


def _load(config: CocoTrainingConfig, checkpoint: Path, data: _EvaluationData) -> Detector:
    model = cast(Detector, config.model.build_untrained(data.dataset.num_classes))
    load_weights(model, checkpoint)
    return model.to(_device()).eval()


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _detect_with_one(model: Detector, images: Tensor, masks: Tensor, group: int = 0) -> Output:
    return model(images, masks, num_groups=1, inference_group=group)


def _detect_with_all(model: Detector, images: Tensor, masks: Tensor) -> Output:
    output = model(images, masks, num_groups=model.config.num_groups)
    return replace(output, groups=QueryGroups(1, output.groups.matching_length))
