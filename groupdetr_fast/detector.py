"""A detector and all that one does with it, as one class: train, evaluate, predict, export, share."""

import itertools
import logging
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub import ModelHubMixin, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from .data.config import Split
from .data.images import ImageLike
from .engines import EngineSettings
from .exporting import export_file
from .models.checkpoints import CheckpointHeader, find_weights
from .models.detector import Detector as Model
from .prediction import describe_model, load_model, predict, predict_video, settings_of
from .runs.config import CocoTrainingConfig, ModelConfig
from .runs.evaluate import evaluate_checkpoint
from .runs.find_rate import find_rate
from .runs.kept_files import begun_with
from .runs.recipes import launched_recipe
from .runs.train import train
from .training.checkpoint import BEST, CHECKPOINTS, WEIGHTS, write_weights
from .training.rate_finder import RateSweep, SweepSettings

if TYPE_CHECKING:
    from .transformers_detector.detector import TransformersDetector

__all__ = ["Detector"]

logger = logging.getLogger(__name__)

RUNS = Path("runs")
OF_A_MODEL = ("*.safetensors", "*.json", "*.pth", "*.bin", "*.pkl")  # files that a checkpoint may consist of


class Detector(  # type: ignore[call-arg, unused-ignore]  # arguments for the mixin, where it is installed
    ModelHubMixin, library_name="groupdetr_fast", tags=["object-detection", "detr", "group-detr"]
):
    """A detector, to train, evaluate, predict, export and share.

    The same trainings and evaluations as those of ``groupdetr train`` and ``groupdetr eval``, with the same settings
    under the same names::

        detector = gd.Detector("conditional_detr_r50", num_groups=11, backbone_weights="imagenet")
        detector.train("dataset/", epochs=12)
        detector.evaluate("dataset/")["AP"]
        detector.predict("photo.jpg")

        detector = gd.Detector.from_pretrained("runs/train")

    Args:
        model: name of a detector; see ``gd.model_names``; or ``transformers:DIR_OR_ID``.
        **settings: fields of ``runs.config.ModelConfig``, such as ``num_groups`` and ``backbone_weights``.

    Attributes:
        checkpoint: file or folder of the weights; None before the first training.
        model: the detector with one group, in evaluation mode; None before the first training.

    Raises:
        ValueError: for an unknown detector or setting, and for a value of another type than a setting has.
    """

    def __init__(self, model: str = "conditional_detr_r50", **settings: Any):
        self._run = CocoTrainingConfig().with_model(model).with_settings(**settings)
        self._header: CheckpointHeader | None = None
        self._num_groups = self._run.model.num_groups  # in training
        self.checkpoint: Path | None = None
        self.model: Model | TransformersDetector | None = None

    @classmethod
    def from_pretrained(  # type: ignore[override, unused-ignore]  # with more kinds of files, and without what they do not need
        cls,
        checkpoint: str | Path,
        *,
        model: str | None = None,
        accelerate_kernels: bool = True,
        device: torch.device | str | None = None,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
        **settings: Any,
    ) -> "Detector":
        """Load a detector.

        Args:
            checkpoint: file or folder of this package, such as that of a run, of an original repository or of
                transformers; or the id of a repository on the Hugging Face Hub that has one (``user/name``).
            model: name of the detector, for checkpoints without it.
            accelerate_kernels: let a model of transformers compute with the kernels of this package.
            device: where to; by default a GPU if there is one.
            revision, token, cache_dir, local_files_only: of the repository on the Hub, see ``snapshot_download``.
            **settings: sizes of the detector, for checkpoints without them.

        Raises:
            FileNotFoundError: if there is no such path, and no such repository can be downloaded.
            ValueError: as ``gd.load_model``.
        """
        path = Path(checkpoint)
        if not path.exists():
            path = _downloaded(
                str(checkpoint),
                revision=revision,
                token=token,
                cache_dir=cache_dir,
                local_files_only=local_files_only,
            )
        detector = cls.__new__(cls)
        detector._load(path, model, device, {"accelerate_kernels": accelerate_kernels, **settings})
        return detector

    def _load(
        self, path: Path, model: str | None, device: torch.device | str | None, settings: Mapping[str, Any]
    ) -> None:
        header = describe_model(path, model)
        self._num_groups = header.model_config.get("num_groups", ModelConfig.num_groups)
        self.model = load_model(path, model=model, device=device, **settings)
        config = {**asdict(self.model.config), **({} if header.transformers else {"backbone_weights": None})}
        self._header = replace(header, model_config=config)
        self.checkpoint = path
        accelerate_kernels = settings.get("accelerate_kernels", ModelConfig.accelerate_kernels)
        sizes = ModelConfig.of_checkpoint(self._header, load=path, accelerate_kernels=accelerate_kernels)
        augmentation = settings_of(self.model).augmentation
        self._run = replace(CocoTrainingConfig(), model=sizes, augmentation=augmentation)

    def train(
        self,
        data: str | Path | None = None,
        *,
        output: str | Path | None = None,
        recipe: str | None = None,
        **settings: Any,
    ) -> dict[str, Any]:
        """Train, and take the weights of the best epoch.

        A detector that has weights starts from them, with a new class head where the number of classes differs. With
        ``resume=True`` it goes on with the run in ``output`` instead, whatever its own weights and sizes are.

        Args:
            data: folder in COCO's layout, that of Roboflow's COCO export, or YOLO's; or name the files by
                ``train_images``, ``train_annotations``, ``val_images`` and ``val_annotations``.
            output: folder of the run; by default a new one, ``runs/train``, ``runs/train-2`` and so on.
            recipe: name of a run of the paper, whose schedule and sizes are the defaults of the other settings.
            **settings: any other setting of ``groupdetr train``, under the name of its flag: ``epochs=12``,
                ``lr=1e-4``, ``batch_size=4``, ``num_groups=11``, ``resume=True``.

        Returns:
            What ``results.json`` in the folder of the run holds.

        Raises:
            ValueError: for an unknown setting, for ``resume`` without ``output`` or with a ``recipe``, and as
                ``runs.train.train``.
        """
        if settings.get("resume") and output is None:
            raise ValueError("resume goes on with the run in output: give output, the folder of that run")
        places = _places(data, output, "train")
        begun = begun_with(places["output"]) if settings.get("resume") else None
        if begun is not None and recipe is not None:
            raise ValueError(f"recipe {recipe} is for a new run; {places['output']} has a configuration of its own")
        changed = {**places, **settings}
        run = self._training(recipe, **changed) if begun is None else begun.with_settings(**changed)
        results = train(run)
        self._load(find_weights(run.output), None, None, {"accelerate_kernels": run.model.accelerate_kernels})
        return results

    def find_rate(
        self,
        data: str | Path | None = None,
        *,
        output: str | Path | None = None,
        recipe: str | None = None,
        **settings: Any,
    ) -> RateSweep:
        """Sweep the learning rate over a few hundred steps, as a training with these settings would begin.

        The detector keeps its weights; ``sweep.valley`` is the rate to train with: ``train(data, lr=sweep.valley)``.

        Args:
            data, recipe: as in :meth:`train`; the part to train on is used.
            output: folder for ``rates.csv`` and ``rates.png``; by default a new one, ``runs/rate``.
            **settings: ``rate_from``, ``rate_to`` and ``rate_steps``, and any setting of :meth:`train`.

        Returns:
            The rates, the losses and the suggestions.

        Raises:
            ValueError: for an unknown setting, and as ``runs.find_rate.find_rate``.
        """
        own = {each.name: settings.pop(each.name) for each in fields(SweepSettings) if each.name in settings}
        run = self._training(recipe, **_places(data, output, "rate"), **settings)
        return find_rate(run, SweepSettings(**own))

    def _training(self, recipe: str | None, **settings: Any) -> CocoTrainingConfig:
        """A recipe, or else the detector's own run, with these settings; it begins from the weights, if any."""
        run = self._run if recipe is None else launched_recipe(recipe)
        if recipe is not None and self.checkpoint is not None:
            self._num_groups, run = run.model.num_groups, replace(run, model=self._run.model)
        if self.checkpoint is not None:
            settings = {"new_class_head": True, "num_groups": self._num_groups, **settings}
        return run.with_settings(**settings)

    def evaluate(
        self,
        data: str | Path | None = None,
        *,
        split: Split = "val",
        output: str | Path | None = None,
        **settings: Any,
    ) -> dict[str, Any]:
        """COCO's metrics of the detector, with one group.

        Args:
            data: as in :meth:`train`.
            split: the part of ``data`` to evaluate on: "val", or "test".
            output: folder for the metrics, the detections and the page about them; by default a new one, ``runs/eval``.
            **settings: any other setting of an evaluation, under the name of its flag.

        Returns:
            AP and the other numbers, and ``"per_category"``: AP by category name.

        Raises:
            ValueError: if the detector has no weights yet, for an unknown setting, and as
                ``runs.evaluate.evaluate_checkpoint``.
        """
        self._require_weights("evaluate")
        settings = {"num_groups": 1, **settings}
        run = self._run.with_settings(**settings, **_places(data, output, "eval"), eval_only=True)
        return evaluate_checkpoint(replace(run, data=run.data.evaluated_on(split)))

    def predict(
        self, images: ImageLike | Iterable[ImageLike], *, score_threshold: float = 0.3, **settings: Any
    ) -> dict[str, Any] | list[dict[str, Any]]:
        """Detect objects in images; arguments, results and errors are those of ``gd.predict``."""
        return predict(self._require_weights("predict"), images, score_threshold=score_threshold, **settings)

    def predict_video(
        self, source: str | Path | int, *, score_threshold: float = 0.3, **settings: Any
    ) -> Iterator[tuple[Any, ...]]:
        """Detect objects in a video; arguments, results and errors are those of ``gd.predict_video``."""
        return predict_video(self._require_weights("predict"), source, score_threshold=score_threshold, **settings)

    def export(
        self,
        path: str | Path,
        image_size: tuple[int, int] | None = None,
        *,
        masks: bool = False,
        half: bool = False,
        engine: EngineSettings | None = None,
    ) -> Path:
        """Write an inference graph, ``.onnx``, ``.pt2`` or ``.engine``; see ``exporting.export_file``."""
        model = self._require_weights("export")
        device = next(model.parameters()).device
        try:
            return export_file(model.cpu(), path, image_size, masks=masks, half=half, engine=engine)
        finally:
            model.to(device)

    def in_training(self) -> "Model | TransformersDetector":
        """The detector as it is trained, with all its groups, and with the weights of its checkpoint.

        It shares nothing with :attr:`model`, and is on the CPU. Without a checkpoint its weights are random and it has
        as many classes as the original detector; a model of transformers has the weights and classes it comes with.

        Raises:
            ValueError: as ``gd.load_model``.
        """
        if self.checkpoint is not None:
            loaded = load_model(
                self.checkpoint,
                model=self._run.model.model,
                num_groups=self._num_groups,
                accelerate_kernels=self._run.model.accelerate_kernels,
                device="cpu",
            )
            return loaded.train()
        return self._run.model.build_untrained().train()

    def to(self, device: torch.device | str) -> "Detector":
        """Move the model."""
        self._require_weights("move").to(device)
        return self

    def save_pretrained(self, save_directory: str | Path, **options: Any) -> Any:
        """Write the weights of one group, for :meth:`from_pretrained`.

        Args:
            save_directory: a folder, which is made if there is none.
            options: as ``huggingface_hub.ModelHubMixin.save_pretrained`` has them.

        Raises:
            ValueError: if there are only random weights, or if the folder is a checkpoint of a run, whose groups would
                be lost.
        """
        folder = Path(save_directory)
        # Before anything else, as the mixin begins with removing a config.json.
        place = folder.resolve()
        of_a_run = place.parent.name == CHECKPOINTS and (place.name == BEST or place.name.startswith("epoch_"))
        if of_a_run and (place / WEIGHTS).exists():
            raise ValueError(f"{folder} is a checkpoint of a run, with all groups: save this one group elsewhere")
        self._require_weights("save")
        return super().save_pretrained(folder, **options)

    def _save_pretrained(self, save_directory: Path) -> None:
        """Write the weights of one group and their header, for ``save_pretrained`` and ``push_to_hub``."""
        model = self._require_weights("save")
        assert self._header is not None
        weights = {name: value.detach().cpu().contiguous() for name, value in model.state_dict().items()}
        write_weights(Path(save_directory) / WEIGHTS, weights, self._header.to_json())

    def _require_weights(self, what: str) -> "Model | TransformersDetector":
        if self.model is None:
            raise ValueError(f"there are only random weights to {what}: call train first, or from_pretrained")
        return self.model


def _places(data: str | Path | None, output: str | Path | None, name: str) -> dict[str, Any]:
    """Settings of a run: where its data are, if that is given, and its folder, by default a new one, ``runs/NAME``."""
    if output is None:
        names = itertools.chain([name], (f"{name}-{number}" for number in itertools.count(2)))
        output = next(folder for each in names if not (folder := RUNS / each).exists())
    return {"output": Path(output), **({} if data is None else {"data_path": Path(data)})}


def _downloaded(repository: str, **options: Any) -> Path:
    try:
        return Path(snapshot_download(repository, allow_patterns=list(OF_A_MODEL), **options))
    except HFValidationError:
        raise FileNotFoundError(f"{repository} does not exist, and is no id of a repository (user/name)") from None
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise FileNotFoundError(
            f"{repository} does not exist, and cannot be downloaded from the Hugging Face Hub ({reason})"
        ) from None
