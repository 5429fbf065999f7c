"""The LightningDataModule: loads queries, perturbs them on the fly, and makes batches of conversations."""

from __future__ import annotations

import signal
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import cv2
import lightning as L
from jsonargparse.typing import NonNegativeInt, PositiveInt
from torch.utils.data import DataLoader
from transformers import AutoProcessor

from vlm_calibration.data.augment import Augmentation, BasicTransform
from vlm_calibration.data.candidates import CandidateCollator, CandidateSettings, ValidationCollator
from vlm_calibration.data.collate import ChatFormat, ImageCollator, PromptCollator, SFTCollator
from vlm_calibration.data.dataset import EvalSplit, PerturbedQueries
from vlm_calibration.data.loading import DataPosition, EpochSampler, LoadingLog, QueryLoader
from vlm_calibration.data.noise import NoisePolicy
from vlm_calibration.data.pixel_limit import limit_pixels
from vlm_calibration.data.raw import RawBatches, Shard, shards_of
from vlm_calibration.data.regions import RegionPlan, plan_extraction, single_extraction, split_with_regions
from vlm_calibration.data.resolution import check_resolution
from vlm_calibration.data.sources.base import QuerySource
from vlm_calibration.hub import loading
from vlm_calibration.records import DataError, Query
from vlm_calibration.text.grading import EXACT, Grading
from vlm_calibration.text.prompts import ElicitationPrompt

TESTED = ("test", "calibration")
"""The data sets of an evaluation, in order."""
LEVELS = "levels"
"""The data set that `levels fit` asks instead, and the value of `asks` in a module that does."""
INSTANCES = "instances"
_SOURCES = {INSTANCES: "train"}
"""The queries of `train`, untouched, which `levels fit` asks as well if its module writes their likelihoods."""
LEVELS_SPLIT = "calibration"
"""Begins the ids of the queries of `levels`, on which the perturbations depend."""


class PerturbedQueryDataModule(L.LightningDataModule):
    """Perturbs the key objects of queries in worker processes, with new noise every epoch.

    Args:
        processor: Hub name or folder of the model whose processor is used; the command line sets it.
        train: training queries.
        validation: queries that are perturbed in the same way and answered during training.
        levels: held-out queries that `vlm-calibration levels fit` asks at every level of each kind of `noise`.
        test: named splits that `vlm-calibration test` answers.
        calibration: named splits about other images that `vlm-calibration test` answers as well. A report fits recalibration
            on these answers; no score includes them.
        predict: queries whose regions `vlm-calibration predict` extracts; None: those of all sources above that are noised.
        regions: folder of regions that `vlm-calibration predict` extracted for the sources above, which are then read with
            these regions. A source whose queries have all the regions that they need has no file in it.
        noise: the perturbation of a query, and the confidence to state after it.
        augment: albumentations transforms of training images, which come before the perturbation; regions move with the pixels.
            Answers do not, so leave out what would make them wrong, such as flips where questions ask for left and right.
        candidates: the responses that preference optimisation compares; None for supervised fine-tuning.
        prompt: how a question is put to the model.
        grading: how answers are graded, in `levels fit`, validation and `test`.
        batch_size: queries per training step and process.
        eval_batch_size: queries per batch of answers.
        shard_size: queries per shard of `predict`, which is written as a whole; an interrupted run loses at most one shard a
            process.
        parts: number of `predict` runs that share the shards of one run directory.
        part: index of this run among them, from 0.
        workers: number of data workers a process.
        max_length: maximum number of tokens of a training sample, image tokens included.
        max_pixels: maximum number of pixels of an image after the processor's resize, its tiles together; larger images are
            shrunk, in training, evaluation and `levels fit` alike. None: the processor's own limit. See `limit_pixels`.
        on_too_long: "raise" stops at a longer sample, "skip" leaves it out and reports the number.
        revision: of the processor, as in `from_pretrained`.
        trust_remote_code: for the processor, as in `from_pretrained`.
    """

    def __init__(
        self,
        processor: str | None = None,
        train: QuerySource | None = None,
        validation: QuerySource | None = None,
        levels: QuerySource | None = None,
        test: dict[str, EvalSplit] | None = None,
        calibration: dict[str, EvalSplit] | None = None,
        predict: QuerySource | None = None,
        regions: str | None = None,
        noise: NoisePolicy = NoisePolicy(),  # noqa: B008  (frozen)
        augment: list[BasicTransform] | None = None,
        candidates: CandidateSettings | None = None,
        prompt: ElicitationPrompt = ElicitationPrompt(),  # noqa: B008  (frozen)
        grading: Grading = EXACT,
        batch_size: PositiveInt = PositiveInt(8),
        eval_batch_size: PositiveInt = PositiveInt(32),
        shard_size: PositiveInt = PositiveInt(512),
        parts: int = 1,
        part: int = 0,
        workers: NonNegativeInt = NonNegativeInt(4),
        max_length: PositiveInt = PositiveInt(4096),
        max_pixels: PositiveInt | None = None,
        on_too_long: Literal["raise", "skip"] = "raise",
        revision: str | None = None,
        trust_remote_code: bool = False,
    ) -> None:
        super().__init__()
        if not 0 <= part < parts:
            raise DataError(
                f"data: needs 0 <= part < parts, found part {part} of {parts}: parts are counted from 0"
            )
        self.processor_name = processor
        self.train = train
        self.validation = validation
        self.levels = levels
        self.test = test
        self.calibration = calibration
        self.predict = predict
        self.regions = regions
        self.noise = noise
        self.augment = augment
        self.candidates = candidates
        self.prompt = prompt
        self.grading = grading
        self.batch_size = batch_size
        self.eval_batch_size = eval_batch_size
        self.shard_size = shard_size
        self.parts = parts
        self.part = part
        self.workers = workers
        self.max_length = max_length
        self.max_pixels = max_pixels
        self.on_too_long = on_too_long
        self.revision = revision
        self.trust_remote_code = trust_remote_code
        self._read: dict[str, Mapping[str, EvalSplit]] = {}
        self._sets: dict[str, PerturbedQueries] = {}
        self._logs: dict[str, LoadingLog] = {}
        self._position: DataPosition | None = None
        self._tested: tuple[str, ...] = ()
        self._plans: dict[bool, RegionPlan] = {}
        self._plan: RegionPlan | None = None
        self._finished: frozenset[int] = frozenset()
        self._answered: Mapping[str, Collection[int]] = {}

    @cached_property
    def processor(self) -> Any:
        """The model's processor: image processor, tokenizer and chat template, with `max_pixels` applied.

        Raises:
            DataError: it is not set, does not exist, does not take images and text, or cannot keep to `max_pixels`.
        """
        if self.processor_name is None:
            raise DataError("data.processor is not set: give the model's name or folder")
        processor = load_processor(self.processor_name, self.revision, self.trust_remote_code)
        if self.max_pixels is not None:
            limit_pixels(processor, self.max_pixels)
        return processor

    @cached_property
    def chat(self) -> ChatFormat:
        return ChatFormat(self.processor, self.prompt)

    @property
    def splits(self) -> dict[str, dict[str, EvalSplit]]:
        """Each data set that is set -> its splits by name, as configured; `predict` is none."""
        splits: dict[str, dict[str, EvalSplit]] = {}
        for name, source in (("train", self.train), ("validation", self.validation)):
            if source is not None:
                splits[name] = {"": EvalSplit(source, noise="drawn")}
        if self.levels is not None:
            splits[LEVELS] = {LEVELS_SPLIT: EvalSplit(self.levels, noise="every_level")}
        for name, named in zip(TESTED, (self.test, self.calibration), strict=True):
            if named:
                splits[name] = named
        return splits

    @property
    def settings(self) -> dict[str, EvalSplit]:
        """The splits by their setting below `data`: "train", "levels", "test.clean"."""
        return {
            setting_of(name, split): settings
            for name, splits in self.splits.items()
            for split, settings in splits.items()
        }

    def setup(self, stage: str) -> None:
        """Read the records that this stage needs, so that an invalid record stops the run before training."""
        if stage == "predict":
            # Modules other than `RegionExtractor` may have no such setting.
            self._plan = self.plan_extraction(getattr(self._module, "keep_known", True))
            return
        required, optional = self._needed(stage)
        splits = self.splits
        for name in required:
            _required(splits.get(_SOURCES.get(name, name)), _SOURCES.get(name, name))
        needed = [*required, *(name for name in optional if name in splits)]
        if stage == "test":
            self._tested, self._answered = tuple(needed), {}
        noise = self._checked_noise(needed)
        uses_processor = self._uses_processor
        for name in needed:
            if name not in self._sets:
                self._sets[name] = PerturbedQueries(
                    self.read_splits(name),
                    # Levels that depend on the query are known for training queries alone.
                    noise if name == "train" else replace(noise, levels=noise.levels.averaged),
                    self.processor.image_processor if uses_processor else None,
                    self.chat.check if uses_processor else _accept,
                    f"data.{_SOURCES.get(name, name)}",
                    named=name in TESTED,
                    augmentation=Augmentation(self.augment) if self.augment and name == "train" else None,
                    taught=name in ("train", LEVELS),
                )
                self._logs[name] = LoadingLog(self._sets[name])
            if name == LEVELS:
                self._sets[name].check_answer_types()
            if name == LEVELS and self.grading.rank_levels:
                _check_ranking(self._sets[name].splits)
        if stage == "test":
            # Modules other than `EvaluationModule` ask for none.
            copies = getattr(self._module, "copies", None) or {}
            for name in self._tested:
                self._sets[name].make_copies(copies.get(name, ()))
        if "calibration" in needed:
            _check_no_shared_images(self._sets["calibration"].splits, self._sets["test"].splits)

    @property
    def _module(self) -> L.LightningModule | None:
        return getattr(self.trainer, "lightning_module", None)

    @property
    def _has_endpoints(self) -> bool:
        """Whether models behind an address answer, which are sent the images themselves. Only an `EvaluationModule` has them."""
        return bool(getattr(self._module, "endpoints", None))

    @property
    def _uses_processor(self) -> bool:
        """Whether there is a processor here: with endpoints alone and no base model there is none."""
        return self.processor_name is not None or not self._has_endpoints

    def _checked_noise(self, needed: Sequence[str]) -> NoisePolicy:
        """The noise policy, whose resolution is known.

        Raises:
            DataError: images are perturbed at the model's resolution, which cannot be found out.
        """
        if self.noise.resolution == "model" and self._uses_processor:
            check_resolution(self.processor)
        if self.noise.resolution == "native" or self._uses_processor:
            return self.noise
        if any(split.noise != "none" for name in needed for split in self.splits[name].values()):
            raise DataError(
                "data.noise.resolution: model: the size at which an endpoint sees an image is not known: name its model with "
                "model.init_args.base.name_or_path, of which only the processor is loaded, or set data.noise.resolution: native"
            )
        # Untouched images keep their size, whatever the resolution.
        return replace(self.noise, resolution="native")

    def _needed(self, stage: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """The data sets that a stage needs, and those that it uses if they are set."""
        if stage == "test":
            if getattr(self._module, "asks", "") != LEVELS:
                return TESTED[:1], TESTED[1:]
            return (
                (LEVELS,) if getattr(self._module, "likelihoods", None) is None else (LEVELS, INSTANCES)
            ), ()
        return (("train",), ("validation",)) if stage == "fit" else (("validation",), ())

    def read_splits(self, name: str) -> Mapping[str, EvalSplit]:
        """The splits of a data set as training and evaluation read them: with the regions of `regions`; empty if it is not set.

        Raises:
            DataError: there are no regions for a split, or those of other queries.
        """
        if name == INSTANCES:
            return {"": EvalSplit(self.read_splits(_SOURCES[name])[""].source)}
        splits = self.splits.get(name, {})
        if self.regions is None:
            return splits
        if name not in self._read:
            self._read[name] = {
                split: split_with_regions(Path(self.regions), setting_of(name, split), settings)
                for split, settings in splits.items()
            }
        return self._read[name]

    def plan_extraction(self, keep_known: bool = True) -> RegionPlan:
        """The sources that `predict` extracts regions for, and the files that it writes; see `data.regions.plan_extraction`.

        The queries are read at the first call.

        Raises:
            DataError: no source is set, or its queries cannot be read.
        """
        if keep_known not in self._plans:
            self._plans[keep_known] = self._new_plan(keep_known)
        return self._plans[keep_known]

    def _new_plan(self, keep_known: bool) -> RegionPlan:
        if self.predict is not None:
            return RegionPlan([single_extraction(self.predict)], [])
        if not self.settings:
            raise DataError(
                "data.predict is not set, nor any of data.train, validation, levels, test and calibration"
            )
        return plan_extraction(self.settings, keep_known)

    def teardown(self, stage: str) -> None:
        """Report the records that could not be loaded."""
        if self.trainer is not None:
            for log in self._logs.values():
                log.report(self.trainer)

    def train_dataloader(self) -> DataLoader:
        limits = self.max_length, self.on_too_long
        collate: Callable[..., Any] = self.candidate_collator or SFTCollator(self.chat, *limits)
        if self.candidates is not None and self.candidates.answers == "own":
            collate = PromptCollator(self.chat, self.grading, *limits)
        return self._loader("train", self.batch_size, collate, training=True)

    def val_dataloader(self) -> DataLoader | list[Any]:
        if self.validation is None:
            return []
        collate = ValidationCollator(PromptCollator(self.chat, self.grading), self.candidate_collator)
        return self._loader("validation", self.eval_batch_size, collate, training=False)

    @property
    def train_set(self) -> PerturbedQueries:
        """The queries that are trained on."""
        return self._sets["train"]

    @property
    def validation_set(self) -> PerturbedQueries:
        """The queries that are answered during training."""
        return self._sets["validation"]

    @property
    def test_set(self) -> PerturbedQueries:
        """The queries that `test` scores, including those answered by an earlier run."""
        return self._sets["test"]

    @property
    def tested_queries(self) -> dict[str, Sequence[Query]]:
        """Name of each data set that `test` answers -> its queries, answered before or not."""
        return {name: self._sets[name].queries for name in self._tested}

    def leave_out_answered(self, answered: Mapping[str, Collection[int]]) -> None:
        """Leave out queries that an earlier `test` answered: indices in each of `tested_queries`.

        All processes must be given the same indices.
        """
        self._answered = answered

    def test_dataloader(self) -> DataLoader | list[DataLoader]:
        """Batches of the queries that are not answered yet; a process without any gets an empty batch.

        A calibration set has a second loader of its own.
        """

        def collator(name: str) -> Callable[..., Any]:
            if not self._uses_processor:
                return ImageCollator(self.grading)
            ranks = name == LEVELS and self.grading.rank_levels
            return PromptCollator(self.chat, self.grading, keep_images=self._has_endpoints, ranks=ranks)

        loaders = [
            self._loader(name, self.eval_batch_size, collator(name), training=False) for name in self._tested
        ]
        return loaders if len(loaders) > 1 else loaders[0]

    def leave_out(self, shards: Collection[int]) -> None:
        """Leave out shards of `predict` that an earlier run finished. Must be the same in every process."""
        self._finished = frozenset(shards)

    @property
    def region_plan(self) -> RegionPlan:
        """What `predict` extracts; planned by `setup`."""
        assert self._plan is not None
        return self._plan

    @property
    def shards(self) -> list[Shard]:
        """The shards of `predict`, of all sources and parts, in the order of their numbers."""
        return shards_of([e.contents.queries for e in self.region_plan.extractions], self.shard_size)

    @property
    def pending_shards(self) -> list[Shard]:
        """The shards of `predict` that are left to this part, and in it to this process."""
        rank, processes = (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)
        own = self.shards[self.part :: self.parts]
        return [shard for shard in own if shard.number not in self._finished][rank::processes]

    def predict_dataloader(self) -> DataLoader:
        """Batches of queries with unperturbed images; each part, and in it each process, has its own shards."""
        own = self.shards[self.part :: self.parts]
        finished, pending = (
            sum(shard.end - shard.begin for shard in own if (shard.number in self._finished) == is_finished)
            for is_finished in (True, False)
        )
        sources = [extraction.source for extraction in self.region_plan.extractions]
        return DataLoader(
            RawBatches(sources, self.pending_shards, self.eval_batch_size, finished, finished + pending),
            batch_size=None,
            collate_fn=_identity,
            num_workers=self.workers,
            worker_init_fn=_ignore_signals,
        )

    @property
    def candidate_collator(self) -> CandidateCollator | None:
        """The collator of gold answers for preference optimisation; None without, and where the model's own answers are compared."""
        if self.candidates is None or self.candidates.answers == "own":
            return None
        return CandidateCollator(
            self.chat, self.noise.levels, self.candidates, self.max_length, self.on_too_long
        )

    def state_dict(self) -> dict[str, int]:
        """The `DataPosition` after the batches that were trained on."""
        if self.trainer is None or "train" not in self._sets:
            return {}
        trained = self.trainer.fit_loop.epoch_loop.batch_progress.total.ready
        epoch, batch = divmod(trained, max(1, int(self.trainer.num_training_batches)))
        return DataPosition(epoch, batch, *self._shape())._asdict()

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        self._position = DataPosition(**state_dict)

    def _shape(self) -> tuple[int, int]:
        """Number of queries of an epoch, and of a batch over all processes."""
        processes = self.trainer.world_size if self.trainer else 1
        return len(self._sets["train"]), self.batch_size * processes

    def _resume(self, sampler: EpochSampler) -> None:
        """Begin at the position of a checkpoint, once.

        Lightning sets the epoch of a sampler only after workers have begun to load.
        """
        position, self._position = self._position, None
        if position is None:
            sampler.set_epoch(self.trainer.current_epoch if self.trainer else 0)
            return
        if position.batch and self._shape() != (position.queries, position.batch_size):
            queries, batch_size = self._shape()
            raise DataError(
                f"the checkpoint was written within an epoch of {position.queries} queries in batches of "
                f"{position.batch_size}, found {queries} and {batch_size}: keep the data and data.batch_size x processes, or "
                "resume from the end of an epoch"
            )
        sampler.begin_at(position.epoch, position.batch, self.batch_size)

    def _loader(
        self, name: str, batch_size: int, collate: Callable[..., Any], *, training: bool
    ) -> DataLoader:
        dataset, log = self._sets[name], self._logs[name]
        rank, processes = (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)
        sampler = EpochSampler(
            len(dataset),
            rank=rank,
            num_replicas=processes,
            shuffle=training,
            even=training,
            seed=self.noise.seed,
            done=self._answered.get(name, ()),
        )
        if training and len(sampler) == 0:
            raise DataError(f"{len(dataset)} training queries are too few for {processes} processes")
        if training:
            self._resume(sampler)
        if len(sampler) == 0:
            # Lightning skips the later hooks in a process without a batch, and the others would wait for it.
            return QueryLoader(log, collate, batch_sampler=[[]])
        if self.workers:
            # OpenCV, which albumentations uses, would take all cores in every worker. Set in a worker, whose threads did not survive
            # the fork, it would wait for them for ever.
            cv2.setNumThreads(1)
        return QueryLoader(
            log,
            collate,
            batch_size=batch_size,
            sampler=sampler,
            num_workers=self.workers,
            worker_init_fn=_ignore_signals,
            persistent_workers=training and self.workers > 0,
            pin_memory=self.trainer is not None and self.trainer.strategy.root_device.type == "cuda",
            drop_last=training and len(sampler) >= batch_size,
        )


def setting_of(name: str, split: str) -> str:
    """The setting of a split below `data`; only the data sets of an evaluation name their splits."""
    return f"{name}.{split}" if name in TESTED and split else name


def _check_ranking(splits: Mapping[str, EvalSplit]) -> None:
    """Refuse open queries without a wrong answer to rank against."""
    for split in splits.values():
        for query in split.source.queries():
            if query.answer_type == "open" and not split.source.wrong_answers(query):
                raise DataError(
                    f"record {query.id!r}: `data.grading.rank_levels` compares with a wrong answer, and its source has none: "
                    "leave the record out, or grade the generated answer"
                )


def _check_no_shared_images(calibration: Mapping[str, EvalSplit], test: Mapping[str, EvalSplit]) -> None:
    """Refuse a calibration set that shares an image with the test set."""
    calibration_images, test_images = (
        {split.source.image_id(query) for split in splits.values() for query in split.source.queries()}
        for splits in (calibration, test)
    )
    if shared := sorted(calibration_images & test_images):
        raise DataError(
            f"data.calibration and data.test share {len(shared)} images, {shared[0]!r} among them: recalibration is "
            "fitted on one and scored on the other, so give data.calibration queries about other images"
        )


def _accept(query: Query, answers: Sequence[str]) -> None:
    """Without a processor there is no image token that a text could contain."""


def _identity(batch: Any) -> Any:
    return batch


def load_processor(name: str, revision: str | None = None, trust_remote_code: bool = False) -> Any:
    """Load the processor of a vision-language model: image processor, tokenizer and chat template.

    Raises:
        DataError: it does not exist, or does not take images and text.
    """
    with loading("a processor", name):
        processor = AutoProcessor.from_pretrained(
            name, revision=revision, trust_remote_code=trust_remote_code
        )
    if not hasattr(processor, "image_processor"):
        raise DataError(f"{name!r} has no image processor: it is not a vision-language model")
    return processor


def _ignore_signals(worker: int) -> None:
    """Ignore SIGINT and SIGUSR1 in a worker; the main process handles them and may be saving a checkpoint.

    The first SIGTERM only restores the default handler, so the second ends the worker.
    """
    for ignored in (signal.SIGINT, signal.SIGUSR1):
        signal.signal(ignored, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.signal(signal.SIGTERM, signal.SIG_DFL))


def _required(value: Any, name: str) -> Any:
    if not value:
        raise DataError(f"data.{name} is not set: this command needs it")
    return value
