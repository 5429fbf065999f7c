"""Parse every YAML file under configs/ with the command line's parser, without building objects.

A full configuration is parsed alone, an overlay after each configuration that it belongs to. The folder decides which of the two a
file is; a file in an unknown folder fails.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonargparse import ArgumentError

from vlm_calibration.commands.lightning_cli import CalibrationCLI, SharedOverlays
from vlm_calibration.errors import explained_errors
from vlm_calibration.files import write_rows
from vlm_calibration.losses.preference import SimPO
from vlm_calibration.presets import DEMO, resolve_configs
from vlm_calibration.records import DataError

from .performance import demo_seeds
from .performance.demo_seeds import ABLATIONS

CONFIGS = Path(__file__).parents[1] / "configs"
SFT = CONFIGS / "sft.yaml"
FULL = {
    "sft.yaml": "fit",
    "dpo.yaml": "fit",
    "levels.yaml": "test",
    "eval/*.yaml": "test",
    "regions.yaml": "predict",
}
DPO = CONFIGS / "dpo.yaml"
EVAL = CONFIGS / "eval/demo.yaml"
DEVELOPMENT = CONFIGS / "eval/demo_development.yaml"
# The first matching pattern counts.
OVERLAYS = {
    "eval/demo_*.yaml": (EVAL,),
    "experiment/*_dpo.yaml": (DPO,),
    "system/*.yaml": (EVAL,),
    "experiment/*.yaml": (SFT, DPO),
    # Both stages have the same settings of these; `test_stages.py` parses a model's and a data set's with every stage.
    **{f"{folder}/*.yaml": (SFT,) for folder in ("data", "model", "trainer", "logger")},
}


def plan(configs: Path) -> list[tuple[str, list[str]]]:
    """Each YAML file and the arguments that parse it, once for each configuration that it may follow.

    Raises:
        ValueError: a file is neither a full configuration nor an overlay.
    """
    arguments: list[tuple[str, list[str]]] = []
    for path in sorted([*configs.rglob("*.yaml"), *configs.rglob("*.yml")]):
        name = path.relative_to(configs)
        command = next((c for pattern, c in FULL.items() if _is(name, pattern)), None)
        bases = next((b for pattern, b in OVERLAYS.items() if _is(name, pattern)), None)
        if bases is not None:
            command = "test" if bases == (EVAL,) else "fit"
            arguments += [(str(name), [command, "--config", str(b), "--config", str(path)]) for b in bases]
        elif command is not None:
            arguments.append((str(name), [command, "--config", str(path)]))
        else:
            raise ValueError(f"configs/{name}: no test knows how to parse it")
    return arguments


def _is(name: Path, pattern: str) -> bool:
    return len(name.parts) == len(Path(pattern).parts) and name.match(pattern)


class ParsingCLI(CalibrationCLI):
    """The real parser; instantiates and runs nothing."""

    def instantiate_classes(self) -> None:
        pass

    def _run_subcommand(self, *_: Any, **__: Any) -> None:
        pass


class InstantiatingCLI(CalibrationCLI):
    """Instantiates the objects; runs nothing."""

    def _run_subcommand(self, *_: Any, **__: Any) -> None:
        pass


@pytest.fixture(scope="module")
def parse() -> Callable[[list[str]], Any]:
    """Function from arguments to the configuration of their subcommand. Building the parser takes seconds, so it is built once."""
    argv = sys.argv
    sys.argv = ["vlm-calibration", "fit", "--config", str(SFT)]
    try:
        cli = ParsingCLI()
    finally:
        sys.argv = argv

    def parsed(arguments: list[str]) -> Any:
        prepare = dict if arguments[0] == "fit" else SharedOverlays()
        with explained_errors(cli._subcommand_parsers[arguments[0]]):
            config = cli.parser.parse_args(resolve_configs(arguments, prepare))
        return config[config.subcommand]

    return parsed


@pytest.mark.parametrize(
    ("name", "arguments"), plan(CONFIGS), ids=lambda v: v if isinstance(v, str) else Path(v[2]).stem
)
def test_parses(parse: Callable[[list[str]], Any], name: str, arguments: list[str]) -> None:
    config = parse(arguments)
    written = json.loads(resolve_configs(["--config", str(CONFIGS / name)])[1])
    missing = [path for path, value in _leaves(written) if _at(config, path) != value]
    assert missing == [], "values of the file that the command does not get"
    assert "processor" not in config.data, "it follows from the module's base model"


def test_the_processor_is_that_of_the_module_s_base_model(
    model_folder: str, new_adapter: Callable[..., str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """An evaluation takes it from the adapters."""
    monkeypatch.chdir(tmp_path)
    named = ("--model.init_args.base.name_or_path", model_folder, "--model.init_args.base.revision", "v2")
    adapters = ("--model.init_args.adapters", json.dumps({"one": new_adapter(1)}))
    for command, config, settings, revision in (
        ("fit", SFT, named, "v2"),
        ("test", CONFIGS / "eval/pope.yaml", adapters, None),
    ):
        monkeypatch.setattr(sys, "argv", ["vlm-calibration", command, "--config", str(config), *settings])
        data = InstantiatingCLI().datamodule
        assert (data.processor_name, data.revision) == (model_folder, revision)


OWN = ("--config", "data/jsonl")
DEMO_NAMED = ("--model.init_args.base.name_or_path", f"{DEMO}/model")


@pytest.mark.parametrize(
    ("command", "settings", "culprit"),
    [
        (("fit", "--config", "sft"), OWN, "data.train"),
        (("test", "--config", "levels"), OWN, "data.train"),
        (("fit", "--config", "sft"), ("--data.validation", "JsonlSource", "--data.validation.path", "x"), "data.validation"),
        (("fit", "--config", "sft"), (*OWN, *DEMO_NAMED), None),
    ],
    ids=["stage 1", "levels", "one source", "the demo's model by name"],
)  # fmt: skip
def test_the_demos_model_learns_other_data_only_if_it_is_named(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    command: tuple[str, ...],
    settings: tuple[str, ...],
    culprit: str | None,
) -> None:
    monkeypatch.setattr(sys, "argv", ["", *command, "--runs", str(tmp_path), *settings])
    if culprit is None:
        InstantiatingCLI()
        assert f"base model: {DEMO}/model" in capsys.readouterr().out
    else:
        with pytest.raises(DataError, match=rf"^{culprit} is not the demo's.*--config model/"):
            InstantiatingCLI()


@pytest.mark.parametrize(
    ("setting", "value", "expected"),
    [
        ("data.batch_size", "0", "a whole number of at least 1"),
        ("data.workers", "-1", "a whole number of at least 0"),
    ],
)
def test_a_number_outside_its_range_is_named(
    parse: Callable[[list[str]], Any], setting: str, value: str, expected: str
) -> None:
    with pytest.raises(ArgumentError) as caught:
        parse(["fit", "--config", "sft", f"--{setting}={value}"])
    assert str(caught.value) == f"{setting}: expected {expected}, found {value!r}"


def test_adapters_of_the_demos_model_answer_other_data(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str], adapter_run: Path
) -> None:
    adapters = json.dumps({"sft": str(adapter_run)})
    settings = ("--model.init_args.adapters", adapters, "--runs", str(tmp_path))
    monkeypatch.setattr(sys, "argv", ["", "test", "--config", "eval/jsonl", *settings])
    InstantiatingCLI()
    assert capsys.readouterr().out.startswith("base model: ")


def _leaves(tree: Any, path: tuple[Any, ...] = ()) -> list[tuple[tuple[Any, ...], Any]]:
    children = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else None
    if children is None:
        return [(path, tree)]
    return [leaf for key, child in children for leaf in _leaves(child, (*path, key))]


def _at(config: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        if isinstance(config, list | tuple):
            config = config[key]
        elif isinstance(config, dict):
            config = config.get(key)
        else:
            config = getattr(config, str(key), None)
    return config


# Settings that the paper's preset changes. All others, such as the noise schedule, the noise for absent objects, the LoRA layers and the
# optimizer, are the same in both: the paper does not publish them.
ANCHORED = {
    "class_path": "vlm_calibration.perturbation.levels.AnchoredLevels",
    "init_args": {
        "path": str(DEMO / "levels.json"),
        "table": None,
        "grid": 1,
        "groups": 5,
        "likelihoods": str(DEMO / "likelihoods.parquet"),
    },
}
LINEAR = {
    "class_path": "vlm_calibration.perturbation.levels.LinearLevels",
    "init_args": {"n_levels": 11},
}
BOTH_STAGES = {
    "data.noise.levels": (ANCHORED, LINEAR),
    "data.noise.kinds": (dict.fromkeys(("noise", "blur", "occlusion"), 1.0), {"noise": 1.0}),
    "data.noise.clean_fraction": (0.35, 0.0),
    "data.noise.wrong_answer_rate": (1.0, 0.0),
    "data.noise.distractor_probability": (0.1, 0.0),
    "data.noise.resolution": ("model", "native"),
    "model.init_args.answer_weight": ("confidence", "constant"),
}
# The demo's tiny model needs a higher one.
LEARNING_RATE = {"model.init_args.optimizer.lr": (1e-3, 2e-5)}
PRESETS = {
    SFT: {**BOTH_STAGES, "model.init_args.confidence_weight": (2.0, 1.0)},
    DPO: {
        **BOTH_STAGES,
        "model.init_args.loss": (
            {
                "class_path": "vlm_calibration.losses.distribution.SoftLabel",
                "init_args": {"width": 0.05},
            },
            {
                "class_path": "vlm_calibration.losses.preference.SimPO",
                "init_args": {"beta": 2.0, "gamma": 1.0},
            },
        ),
        "model.init_args.reference": ("adapter", "none"),
        "model.init_args.drift_weight": (1.0, 0.0),
        "model.init_args.pairs.target": ("fitted", "level"),
        "data.candidates.answers": ("own", "gold"),
        "model.init_args.pairs.rejected": ("all", "uniform"),
        "model.init_args.pairs.n_rejected": (None, 1),
        **LEARNING_RATE,
    },
}
# Settings that our preset for own data changes from the demo's: the files of its levels, and how often there is what.
OWN_LEVELS = {"path": "runs/levels.json", "likelihoods": "runs/likelihoods.parquet"}
OWN_DATA = {
    "data.noise.levels": (
        ANCHORED,
        {**ANCHORED, "init_args": {**ANCHORED["init_args"], **OWN_LEVELS}},  # type: ignore[dict-item]
    ),
    "data.noise.kinds": (BOTH_STAGES["data.noise.kinds"][0], {"noise": 2.0, "blur": 1.0, "occlusion": 1.0}),
    "data.noise.clean_fraction": (0.35, 0.3),
}


def _settings(tree: Any, path: str = "") -> dict[str, Any]:
    """Settings by dotted name; an object with a `class_path` is one setting, and so are the kinds of perturbation."""
    is_one = "class_path" in tree if isinstance(tree, dict) and path not in ("", "model") else False
    if not isinstance(tree, dict) or is_one or path == "data.noise.kinds":
        return {path: tree}
    below = ((f"{path}.{key}" if path else key, value) for key, value in tree.items())
    return {name: value for key, child in below for name, value in _settings(child, key).items()}


@cache
def _settings_of(parse: Callable[[list[str]], Any], base: Path, *arguments: str) -> dict[str, Any]:
    return _settings(parse(["fit", "--config", str(base), *arguments]).as_dict())


def _differences(
    parse: Callable[[list[str]], Any], base: Path, *overlays: Path, arguments: Sequence[str] = ()
) -> dict[str, tuple[Any, Any]]:
    """Settings that the overlays and arguments change: name -> (value in `base`, value with them)."""
    files = [argument for path in overlays for argument in ("--config", str(path))]
    alone, overlaid = (_settings_of(parse, base, *more) for more in ((), (*files, *arguments)))
    names = sorted({*alone, *overlaid} - {"config"})
    return {name: (alone[name], overlaid[name]) for name in names if alone[name] != overlaid[name]}


@pytest.mark.parametrize("preset", ["paper", "anchored"])
@pytest.mark.parametrize("stage", [SFT, DPO], ids=lambda path: path.stem)
def test_presets_differ_in_these_settings_and_in_no_other(
    parse: Callable[[list[str]], Any], preset: str, stage: Path
) -> None:
    files = [f"{preset}.yaml", *([f"{preset}_dpo.yaml"] if stage == DPO else [])]
    differences = _differences(parse, stage, *(CONFIGS / "experiment" / name for name in files))
    for name, (base, changed) in differences.items():
        print(f"{stage.stem}, {preset}: {name}: {base} -> {changed}")
    own_data = {**OWN_DATA, **(LEARNING_RATE if stage == DPO else {})}
    assert differences == (PRESETS[stage] if preset == "paper" else own_data)


def test_the_benchmark_has_an_ablation_for_each_difference_of_stage_1(
    parse: Callable[[list[str]], Any],
) -> None:
    """Each takes over one setting of the paper's preset."""
    changed = [_differences(parse, SFT, arguments=settings) for settings in ABLATIONS.values()]
    assert [len(differences) for differences in changed] == [1] * len(PRESETS[SFT])
    assert {name: value for differences in changed for name, value in differences.items()} == PRESETS[SFT]


def test_the_benchmark_refuses_to_choose_on_test_scenes(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    answered = []

    class Stopped(Exception):
        pass

    def start(*arguments: str, threads: int = 1) -> None:
        if arguments[0] == "test":
            answered.append(arguments)
            raise Stopped

    monkeypatch.setattr(demo_seeds, "start", start)
    monkeypatch.setattr(demo_seeds, "finish", lambda process: None)
    with pytest.raises(SystemExit):
        demo_seeds.main(["--test", "--systems", "rlcr"])
    assert "--systems rlcr" in capsys.readouterr().err
    for arguments in ([], ["--test"]):
        with pytest.raises(Stopped):
            demo_seeds.main(arguments)
    systems = [json.loads(a[a.index("--model.init_args.adapters") + 1]) for a in answered]
    assert set(systems[1]) == {"sft", "dpo"}
    assert set(ABLATIONS) < set(systems[0])
    assert [str(DEVELOPMENT.relative_to(CONFIGS.parent)) in a for a in answered] == [True, False]


def test_the_benchmark_compares_each_kind_with_training_that_leaves_it_out(tmp_path: Path) -> None:
    def lines(kind: str, confidence: float) -> list[dict[str, Any]]:
        answer = {"question": "A dog?", "answer": "Yes", "text": "", "predicted": "yes", "noise_step": None}
        answer |= {"answer_type": "yes_no", "category": "perturbed", "perturbation": kind, "strength": 0.5}
        stated = [(confidence, True), (confidence, True), (0.0, False), (None, False)]
        return [
            {**answer, "id": f"{kind}-{i}", "confidence": stated, "correct": correct}
            for i, (stated, correct) in enumerate(stated)
        ]

    for at, system in enumerate(("sft", "noise-alone", *demo_seeds.LEFT_OUT)):
        rows = [line for kind in ("", *demo_seeds.KINDS) for line in lines(kind, 0.9 - at / 10)]
        write_rows(tmp_path / system / "predictions.jsonl", rows, lines=True)
    table = demo_seeds.left_out([tmp_path, tmp_path])
    # ECE 2/3 of 0.1 to 0.5, Brier score 2/3 of its square; the unparsed answer does not count.
    assert table.splitlines()[2:] == [
        f"| {kind} | {trained} | {2 / 3 * gap:.3f} ± 0.000 | {2 / 3 * gap**2:.3f} ± 0.000 | 1.000 ± 0.000 |"
        for kind, left_out in (("noise", 0.3), ("blur", 0.4), ("occlusion", 0.5))
        for trained, gap in (("all kinds", 0.1), ("noise alone", 0.2), (f"all but {kind}", left_out))
    ]


def test_nothing_else_asks_about_the_scenes_that_recalibration_is_fitted_on() -> None:
    """The same holds for the test set. Scenes are compared by split and index, over all configurations."""
    scenes: dict[str, set[tuple[str, int]]] = {}
    for path in CONFIGS.rglob("*.yaml"):
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
        for keys, value in _leaves(tree):
            if keys[-1] == "scenes":
                source = _at(tree, keys[:-1])
                first = source.get("first", 0)
                name = f"{path.relative_to(CONFIGS)}: {'.'.join(map(str, keys[:-2]))}"
                scenes[name] = {(source["split"], i) for i in range(first, first + value)}
    recalibration = {name for name in scenes if ": data.calibration." in name}
    test = {name for name in scenes if "eval/demo.yaml: data.test." in name}
    assert (len(recalibration), len(test), len(scenes)) == (3, 5, 20)
    for group in (recalibration, test):
        for name in group:
            assert not [other for other in scenes if other not in group and scenes[other] & scenes[name]]


def test_the_demo_is_developed_on_the_same_parts_as_it_is_tested_on() -> None:
    test, development = (
        yaml.safe_load((CONFIGS / f"eval/{name}.yaml").read_text(encoding="utf-8"))["data"]["test"]
        for name in ("demo", "demo_development")
    )
    sources = [part["source"]["init_args"] for part in test.values()]
    assert {source["split"] for source in sources} == {"test"}
    for source in sources:
        source["split"] = "development"
    assert development == test


def test_the_parts_of_coco_share_no_image() -> None:
    """A part is a file and a range of its images; levels and recalibration use the same one."""
    data = yaml.safe_load((CONFIGS / "data/coco.yaml").read_text(encoding="utf-8"))["data"]
    assert data["calibration"]["own"]["source"] == data["levels"]
    sources = [data["train"], data["validation"], data["levels"], data["test"]["own"]["source"]]
    ranges = []
    for settings in (source["init_args"] for source in sources):
        begin = settings.get("begin", settings.get("first", 0))
        end = begin + settings["images"] if "images" in settings else settings.get("end", 1)
        ranges.append((settings.get("annotations", ""), begin, end))
    assert all(begin < end for _, begin, end in ranges)
    for (file, _, end), (next_file, begin, _) in pairwise(sorted(ranges)):
        assert file != next_file or end <= begin


def test_no_part_of_coco_asks_about_an_image_of_pope() -> None:
    coco, pope = (
        yaml.safe_load((CONFIGS / f"{name}.yaml").read_text(encoding="utf-8"))["data"]
        for name in ("data/coco", "eval/pope")
    )
    asked = {part["source"]["init_args"]["path"] for part in pope["test"].values()}
    parts = [coco["train"], coco["validation"], coco["levels"], coco["test"]["own"]["source"]]
    assert [set(part["init_args"]["exclude"]) for part in parts] == [asked] * 4


def test_a_loss_of_another_kind_inherits_no_settings(parse: Callable[[list[str]], Any]) -> None:
    """LightningCLI keeps settings of the same name when the class changes, and DPO's beta is far too small for SimPO."""
    presets = [CONFIGS / "experiment" / f"{name}.yaml" for name in ("paper", "paper_dpo")]
    config = parse(["fit", *(a for path in (DPO, *presets) for a in ("--config", str(path)))])
    loss = config.model.init_args.loss
    assert loss.class_path.rsplit(".", 1)[-1] == "SimPO"
    assert vars(SimPO()) == loss.init_args.as_dict()
