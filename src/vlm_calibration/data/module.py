"""The LightningDataModule: loads queries, perturbs them on the fly, and makes batches of conversations."""

from __future__ import annotations

import signal
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from functools import cached_property, partial
from multiprocessing import active_children
from multiprocessing.util import Finalize
from pathlib import Path
from typing import Any, Literal, NamedTuple

import cv2
import lightning as L
from jsonargparse.typing import NonNegativeInt, PositiveInt
from torch.utils.data import DataLoader
from transformers import AutoProcessor

from vlm_calibration.data.augment import Augmentation, BasicTransform
from vlm_calibration.data.candidates import CandidateCollator, CandidateSettings, collate_validation
from vlm_calibration.data.collate import ChatFormat, PromptCollator, SFTCollator
from vlm_calibration.data.dataset import EvalSplit, PerturbedQueries, accept
from vlm_calibration.data.loading import EpochSampler, LoadingLog, QueryLoader
from vlm_calibration.data.noise import ImageCopy, NoisePolicy
from vlm_calibration.data.regions import RegionPlan, read_with_regions
from vlm_calibration.data.resolution import check_resolution, limit_pixels
from vlm_calibration.data.sources.base import QuerySource
from vlm_calibration.hub import loading
from vlm_calibration.records import DataError, Query
from vlm_calibration.text.confidence import ElicitationPrompt
from vlm_calibration.text.grading import EXACT, Grading

TESTED = ("test", "calibration")  # the data sets of an evaluation, in order
TEACHER = "teacher"  # the data set that stage 2 fits its teacher on
LEVELS, INSTANCES = "levels", "instances"
"""The data sets that `levels fit` asks; the second, the untouched queries of `train`, only if it writes their likelihoods."""


class DataNeeds(NamedTuple):
    """What a LightningModule needs of the data in `test` and `predict`, its attribute `data_needs`.

    Attributes:
        asked: the data sets that `test` answers; those of `if_set` if they are set.
        copies: data set -> the perturbed copies of each of its images.
        images: whether batches have the images themselves, for models behind an address.
        keep_known: whether `predict` leaves sources out in which every query has a region or needs none.
    """

    asked: tuple[str, ...] = TESTED[:1]
    if_set: tuple[str, ...] = TESTED[1:]
    copies: Mapping[str, Sequence[ImageCopy]] = {}
    images: bool = False
    keep_known: bool = True


class PerturbedQueryDataModule(L.LightningDataModule):
    """Perturbs the key objects of queries in worker processes, with new noise every epoch.

    Args:
        processor: Hub name or folder of the model whose processor is used; the command line sets it.
        train: training queries.
        validation: queries that are perturbed in the same way and answered during training.
        teacher: queries, perturbed in the same way, on whose answers stage 2 fits its teacher before training; None:
            those of `validation`.
        levels: held-out queries that `vlm-calibration levels fit` asks at every level of each kind of `noise`.
        test: named splits that `vlm-calibration test` answers.
        calibration: named splits about other images, answered by `vlm-calibration test` for recalibration; no score includes them.
        predict: queries whose regions `vlm-calibration predict` extracts; None: those of all sources above that are noised.
        regions: folder of regions that `vlm-calibration predict` extracted for the sources above, which are then read with them. A
            source whose queries have all the regions that they need has no file in it.
        noise: the perturbation of a query, and the confidence to state after it.
        augment: albumentations transforms of training images, which come before the perturbation; regions move with the pixels.
            Answers do not, so leave out what would make them wrong, such as flips where questions ask for left and right.
        candidates: the responses that preference optimisation compares; None for supervised fine-tuning.
        prompt: how a question is put to the model.
        grading: how answers are graded, in `levels fit`, validation and `test`.
        batch_size: queries per training step and process.
        eval_batch_size: queries per batch of answers, and per shard of `predict`.
        parts: number of `predict` runs that share the shards of one run directory.
        part: index of this run among them, from 0.
        workers: number of data workers a process.
        max_length: maximum number of tokens of a training sample, image tokens included.
        max_pixels: maximum number of pixels of an image after the processor's resize, its tiles together; larger images are
            shrunk, in training, evaluation and `levels fit` alike. None: the processor's own limit. See `limit_pixels`.
        on_too_long: "raise" stops at a longer sample, "skip" leaves it out and reports the number.
        revision: of the processor, as in `from_pretrained`.
        trust_remote_code: for the processor, as in `from_pretrained`.

    Attributes:
        sets: data set -> its queries as `setup` has read them, also those that an earlier run answered.
        answered: indices in each of `tested_queries` that an earlier `test` answered and this one leaves out; equal in all processes.
    """

    def __init__(
        self,
        processor: str | None = None,
        train: QuerySource | None = None,
        validation: QuerySource | None = None,
        teacher: QuerySource | None = None,
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
            found = f"found part {part} of {parts}: parts are counted from 0"
            raise DataError(f"data: needs 0 <= part < parts, {found}")
        self.processor_name, self.revision, self.trust_remote_code = processor, revision, trust_remote_code
        self.train, self.validation, self.teacher, self.levels = train, validation, teacher, levels
        self.test, self.calibration, self.predict = test, calibration, predict
        self.regions, self.noise, self.augment, self.candidates = regions, noise, augment, candidates
        self.prompt, self.grading = prompt, grading
        self.batch_size, self.eval_batch_size, self.workers = batch_size, eval_batch_size, workers
        if workers:
            # Unlike a function of atexit, it also runs at the end of a fork.
            Finalize(None, _kill_workers, exitpriority=0)
        self.parts, self.part = parts, part
        self.max_length, self.max_pixels, self.on_too_long = max_length, max_pixels, on_too_long
        self.sets: dict[str, PerturbedQueries] = {}
        self.answered: Mapping[str, Collection[int]] = {}
        self._with_regions: dict[str, dict[str, EvalSplit]] = {}
        self._logs: dict[str, LoadingLog] = {}
        self._position: dict[str, int] = {}
        self._needs = DataNeeds()
        self._tested: tuple[str, ...] = ()

    @cached_property
    def processor(self) -> Any:
        """The model's processor, limited to `max_pixels`; a DataError if it is not set, not one of a VLM, or cannot be limited."""
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
        drawn = {"train": self.train, "validation": self.validation, TEACHER: self.teacher}
        splits = {name: {"": EvalSplit(s, "drawn")} for name, s in drawn.items() if s is not None}
        if self.levels is not None:
            # The ids of its queries, on which the perturbations depend, begin with "calibration".
            splits[LEVELS] = {"calibration": EvalSplit(self.levels, "every_level")}
        named = {"test": self.test, "calibration": self.calibration}
        return splits | {name: of_name for name, of_name in named.items() if of_name}

    @property
    def settings(self) -> dict[str, EvalSplit]:
        """The splits by their setting below `data`: "train", "levels", "test.clean"."""
        named = ((name, *split) for name, splits in self.splits.items() for split in splits.items())
        return {setting_of(name, split): settings for name, split, settings in named}

    def setup(self, stage: str) -> None:
        """Read the records that this stage needs; an invalid one stops the run before training."""
        self._needs = getattr(getattr(self.trainer, "lightning_module", None), "data_needs", DataNeeds())
        if stage == "predict":
            self.plan_extraction(self._needs.keep_known)
            return
        # Stage 1, which compares no candidates, has no teacher.
        held_out = ("validation",) if self.candidates is None else ("validation", TEACHER)
        of_stage = {"fit": DataNeeds(("train",), held_out), "validate": DataNeeds(("validation",), ())}
        needs = of_stage.get(stage, self._needs)
        for name in map(setting_of, needs.asked):
            if name not in self.splits:
                raise DataError(f"data.{name} is not set: this command needs it")
        names = [*needs.asked, *(name for name in needs.if_set if name in self.splits)]
        if stage == "test":
            self._tested, self.answered = tuple(names), {}
        noise = self._checked_noise(names)
        for name in names:
            if name not in self.sets:
                self.sets[name] = self._new_set(name, noise)
                self._logs[name] = LoadingLog(self.sets[name])
            if name == LEVELS:
                self.sets[name].check_answer_types()
                if self.grading.rank_levels:
                    _check_ranking(self.read_splits(name))
            if stage == "test":
                self.sets[name].make_copies(self._needs.copies.get(name, ()))
        if "calibration" in names:
            _check_no_shared_images(self.read_splits("calibration"), self.read_splits("test"))

    @property
    def _uses_processor(self) -> bool:
        """Whether there is a processor: with models behind an address alone and no base model there is none."""
        return self.processor_name is not None or not self._needs.images

    def _new_set(self, name: str, noise: NoisePolicy) -> PerturbedQueries:
        return PerturbedQueries(
            self.read_splits(name),
            # Levels that depend on the query are known for training queries alone.
            noise if name == "train" else replace(noise, levels=noise.levels.averaged),
            self.processor.image_processor if self._uses_processor else None,
            self.chat.check if self._uses_processor else accept,
            f"data.{setting_of(name)}",
            named=name in TESTED,
            augmentation=Augmentation(self.augment) if self.augment and name == "train" else None,
            taught=name in ("train", LEVELS),
        )

    def _checked_noise(self, names: Sequence[str]) -> NoisePolicy:
        """The noise policy; images cannot be perturbed at a model's resolution that cannot be found out."""
        if self._uses_processor and self.noise.resolution == "model":
            check_resolution(self.processor)
        if self._uses_processor or self.noise.resolution == "native":
            return self.noise
        if any(split.noise != "none" for name in names for split in self.splits[name].values()):
            raise DataError(
                "data.noise.resolution: model: the size at which an endpoint sees an image is not known: name its model with "
                "model.init_args.base.name_or_path, of which only the processor is loaded, or set data.noise.resolution: native"
            )
        # Untouched images keep their size, whatever the resolution.
        return replace(self.noise, resolution="native")

    def read_splits(self, name: str) -> dict[str, EvalSplit]:
        """The splits of a data set, empty if it is not set, with the regions of `regions`; a DataError if a split has none there."""
        if name == INSTANCES:
            return {"": EvalSplit(self.read_splits("train")[""].source)}
        splits = self.splits.get(name, {})
        if self.regions is None:
            return splits
        if name not in self._with_regions:
            folder, read = Path(self.regions), dict(splits)
            for split, of_split in splits.items():
                if of_split.noise != "none":
                    source = read_with_regions(folder, setting_of(name, split), of_split.source)
                    read[split] = replace(of_split, source=source)
            self._with_regions[name] = read
        return self._with_regions[name]

    def plan_extraction(self, keep_known: bool = True) -> RegionPlan:
        """What `predict` extracts, read at the first call; a DataError if no source is set, or one cannot be read."""
        if not hasattr(self, "region_plan"):
            splits = self.settings
            if self.predict is not None:
                # The file, queries.parquet, has the queries whatever is known of them.
                splits, keep_known = {"queries": EvalSplit(self.predict, "drawn")}, False
            elif not splits:
                others = "data.train, validation, levels, test and calibration"
                raise DataError(f"data.predict is not set, nor any of {others}")
            self.region_plan = RegionPlan(splits, self.eval_batch_size, keep_known)
        return self.region_plan

    def teardown(self, stage: str) -> None:
        """Report the records that could not be loaded."""
        if self.trainer is not None:
            for log in self._logs.values():
                log.report(self.trainer)

    @property
    def candidate_collator(self) -> CandidateCollator | None:
        """The collator for preference optimisation over gold answers; else None."""
        if self.candidates is None or self.candidates.answers == "own":
            return None
        limits = self.max_length, self.on_too_long
        return CandidateCollator(self.chat, self.noise.levels, self.candidates, *limits)

    def train_dataloader(self) -> DataLoader:
        limits = self.max_length, self.on_too_long
        if self.candidates is None:
            return self._loader("train", SFTCollator(self.chat, *limits))
        own = PromptCollator(self.chat, self.grading, *limits)
        return self._loader("train", self.candidate_collator or own)

    def val_dataloader(self) -> DataLoader | list[Any]:
        if self.validation is None:
            return []
        prompts = PromptCollator(self.chat, self.grading)
        return self._loader("validation", partial(collate_validation, prompts, self.candidate_collator))

    @property
    def taught_on(self) -> str:
        """The data set that the teacher of stage 2 is fitted on."""
        return TEACHER if self.teacher is not None else "validation"

    def teacher_dataloader(self) -> DataLoader:
        return self._loader(self.taught_on, PromptCollator(self.chat, self.grading))

    def test_dataloader(self) -> DataLoader | list[DataLoader]:
        """A loader for each data set of the queries that are not answered yet; a process without any gets an empty batch."""
        chat = self.chat if self._uses_processor else None
        collate = PromptCollator(chat, self.grading, keep_images=self._needs.images)
        ranks = self.grading.rank_levels
        loaders = [self._loader(n, replace(collate, ranks=ranks and n == LEVELS)) for n in self._tested]
        return loaders if len(loaders) > 1 else loaders[0]

    @property
    def tested_queries(self) -> dict[str, Sequence[Query]]:
        """Name of each data set that `test` answers -> its queries, answered before or not."""
        return {name: self.sets[name].queries for name in self._tested}

    @property
    def pending_shards(self) -> list[int]:
        """The numbers of the shards of `predict` that are left to this part, and in it to this process."""
        rank, processes = self._process
        shards = range(self.part, len(self.region_plan), self.parts)
        return [number for number in shards if number not in self.region_plan.finished][rank::processes]

    def predict_dataloader(self) -> DataLoader:
        """The batches of this process; one without a shard gets an empty batch, so that it takes part in the hooks after the last."""
        # Without a batch size each item is a batch, and is not collated.
        return DataLoader(
            self.region_plan,
            batch_size=None,
            sampler=self.pending_shards or [None],
            num_workers=self.workers,
            worker_init_fn=_ignore_signals,
        )

    @property
    def _process(self) -> tuple[int, int]:
        """This process's rank, and the number of processes."""
        return (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)

    def state_dict(self) -> dict[str, int]:
        """The position after the batches that were trained on, and the sizes that it depends on."""
        if self.trainer is None or "train" not in self.sets:
            return {}
        trained = self.trainer.fit_loop.epoch_loop.batch_progress.total.ready
        epoch, batch = divmod(trained, max(1, int(self.trainer.num_training_batches)))
        return {"epoch": epoch, "batch": batch, **self._shape()}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        self._position = state_dict

    def _shape(self) -> dict[str, int]:
        return {"queries": len(self.sets["train"]), "batch_size": self.batch_size * self._process[1]}

    def _resume(self, sampler: EpochSampler) -> None:
        """Begin at the position of a checkpoint, once."""
        position, self._position = self._position, {}
        if not position:
            # Lightning sets the epoch only after workers have begun to load.
            sampler.set_epoch(self.trainer.current_epoch if self.trainer else 0)
            return
        shape = self._shape()
        if position["batch"] and not shape.items() <= position.items():
            size = "{queries} queries in batches of {batch_size}"
            before, now = size.format_map(position), size.format_map(shape)
            advice = "keep the data and data.batch_size x processes, or resume from the end of an epoch"
            raise DataError(f"the checkpoint was written within an epoch of {before}, found {now}: {advice}")
        sampler.set_epoch(position["epoch"])
        sampler.begin = (position["epoch"], position["batch"] * self.batch_size)

    def _loader(self, name: str, collate: Callable[..., Any]) -> DataLoader:
        total, training = len(self.sets[name]), name == "train"
        batch_size = self.batch_size if training else self.eval_batch_size
        rank, processes = self._process
        sampler = EpochSampler(total, rank, processes, training, self.noise.seed, self.answered.get(name, ()))
        loader = partial(QueryLoader, self._logs[name], collate)
        if training:
            if len(sampler) == 0:
                raise DataError(f"{total} training queries are too few for {processes} processes")
            self._resume(sampler)
        if len(sampler) == 0:
            # Lightning skips the later hooks in a process without a batch, and the others would wait for it.
            return loader(batch_sampler=[[]])
        if self.workers:
            # OpenCV, which albumentations uses, would take all cores in every worker; set in a forked worker, it would wait for ever.
            cv2.setNumThreads(1)
        return loader(
            batch_size=batch_size,
            sampler=sampler,
            num_workers=self.workers,
            worker_init_fn=_ignore_signals,
            persistent_workers=training and self.workers > 0,
            pin_memory=self.trainer is not None and self.trainer.strategy.root_device.type == "cuda",
            drop_last=training and len(sampler) >= batch_size,
        )


def setting_of(name: str, split: str = "") -> str:
    """The setting of a data set or its split below `data`."""
    name = "train" if name == INSTANCES else name
    return f"{name}.{split}" if name in TESTED and split else name


def _check_ranking(splits: Mapping[str, EvalSplit]) -> None:
    """Refuse open queries without a wrong answer to rank against."""
    for split in splits.values():
        for query in split.source.queries():
            if query.answer_type == "open" and not split.source.wrong_answers(query):
                problem = "`data.grading.rank_levels` compares with a wrong answer, and its source has none"
                advice = "leave the record out, or grade the generated answer"
                raise DataError(f"record {query.id!r}: {problem}: {advice}")


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


def load_processor(name: str, revision: str | None = None, trust_remote_code: bool = False) -> Any:
    """Load the processor of a vision-language model: image processor, tokenizer and chat template; otherwise a DataError."""
    options: dict[str, Any] = {"revision": revision, "trust_remote_code": trust_remote_code}
    with loading("a processor", name):
        processor = AutoProcessor.from_pretrained(name, **options)
    if not hasattr(processor, "image_processor"):
        raise DataError(f"{name!r} has no image processor: it is not a vision-language model")
    return processor


def _ignore_signals(worker: int) -> None:
    """Ignore SIGINT, SIGUSR1 and SIGTERM in a worker; the main process handles them and may be saving a checkpoint."""
    for ignored in (signal.SIGINT, signal.SIGUSR1, signal.SIGTERM):
        signal.signal(ignored, signal.SIG_IGN)


def _kill_workers() -> None:
    """Kill the workers that an error leaves behind; else multiprocessing, at the end of the process, waits for them after a SIGTERM."""
    for process in active_children():
        if process.daemon:
            process.kill()
