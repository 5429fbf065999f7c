"""Configurations: every YAML file under configs/ is parsed, without building objects; names of presets, variables, and shared overlays."""

from __future__ import annotations

import json
import sys
from argparse import ArgumentError
from collections.abc import Callable, Sequence
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonargparse import get_loader

from vlm_calibration.commands.lightning_cli import CalibrationCLI, ParsedCLI, shared_overlays
from vlm_calibration.commands.settings_check import check_settings
from vlm_calibration.errors import explained_errors
from vlm_calibration.losses.preference import SimPO
from vlm_calibration.presets import DEMO, find_preset, preset_names, resolve_configs
from vlm_calibration.records import DataError
from vlm_calibration.settings import flat

from .command_line import Capture, Patch
from .performance import demo_seeds
from .performance.demo_seeds import ABLATIONS

Parse = Callable[[list[str]], Any]
CONFIGS = Path(__file__).parents[1] / "configs"
SFT = CONFIGS / "sft.yaml"
DPO = CONFIGS / "dpo.yaml"
EVAL = CONFIGS / "eval/demo.yaml"
COMMANDS = {
    **dict.fromkeys(("SFTModule", "DPOModule"), "fit"),
    **dict.fromkeys(("LevelFitModule", "EvaluationModule"), "test"),
    "RegionExtractor": "predict",
}
"""Module of a full configuration -> the command that runs it."""


def calls(path: Path) -> list[list[str]]:
    """Arguments that parse a YAML file: a full configuration alone, an overlay after each configuration that it belongs to."""
    model = yaml.safe_load(path.read_text(encoding="utf-8")).get("model") or {}
    if "class_path" in model:
        return [[COMMANDS[model["class_path"].rpartition(".")[2]], "--config", str(path)]]
    if path.parent.name in ("eval", "system"):
        return [["test", "--config", str(EVAL), "--config", str(path)]]
    # Both stages have the same settings of a model, data, a trainer and a logger; `test_stages.py` parses some with every stage.
    bases = {"experiment": [SFT, DPO]}.get(path.parent.name, [SFT])
    bases = [DPO] if path.stem.endswith("_dpo") else bases
    return [["fit", "--config", str(base), "--config", str(path)] for base in bases]


class InstantiatingCLI(CalibrationCLI):
    """Instantiates the objects; runs nothing."""

    def _run_subcommand(self, *_: Any, **__: Any) -> None:
        pass


Instantiate = Callable[..., InstantiatingCLI]


@pytest.fixture
def instantiate(monkeypatch: Patch, tmp_path: Path) -> Instantiate:
    def instantiated(*arguments: str) -> InstantiatingCLI:
        monkeypatch.setattr(sys, "argv", ["vlm-calibration", *arguments, "--runs", str(tmp_path)])
        return InstantiatingCLI()

    return instantiated


@pytest.fixture(scope="module")
def parse() -> Parse:
    """Function from arguments to the configuration of their subcommand. Building the parser takes seconds, so it is built once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["vlm-calibration", "fit", "--config", str(SFT)])
        cli = ParsedCLI()

    def parsed(arguments: list[str]) -> Any:
        prepare = list if arguments[0] == "fit" else shared_overlays
        with explained_errors(cli._subcommand_parsers[arguments[0]]):
            config = cli.parser.parse_args(resolve_configs(arguments, prepare))
        return config[config.subcommand]

    return parsed


@pytest.mark.parametrize(
    "arguments",
    [arguments for path in sorted(CONFIGS.rglob("*.y*ml")) for arguments in calls(path)],
    ids=lambda arguments: "-".join(Path(word).stem for word in arguments[2::2]),
)
def test_parses(parse: Parse, arguments: list[str]) -> None:
    config = parse(arguments)
    given = dict(flat(json.loads(json.dumps(config.as_dict(), default=str))))
    written = json.loads(resolve_configs(arguments[-2:])[1])
    missing = [name for name, value in flat(written) if given.get(name) != value]
    assert missing == [], "values of the file that the command does not get"
    assert "processor" not in config.data, "it follows from the module's base model"


def test_the_processor_is_that_of_the_module_s_base_model(
    model_folder: str, new_adapter: Callable[..., str], instantiate: Instantiate
) -> None:
    """An evaluation takes it from the adapters."""
    named = ("--model.init_args.base.name_or_path", model_folder, "--model.init_args.base.revision", "v2")
    adapters = ("--model.init_args.adapters", json.dumps({"one": new_adapter(1)}))
    calls = (("fit", "sft", named, "v2"), ("test", "eval/pope", adapters, None))
    for command, config, settings, revision in calls:
        cli = instantiate(command, "--config", config, *settings)
        assert (cli.datamodule.processor_name, cli.datamodule.revision) == (model_folder, revision)
        assert cli.model.base.name_or_path == model_folder


OWN = ("--config", "data/jsonl")
VALIDATION = ("--data.validation", "JsonlSource", "--data.validation.path", "x")


@pytest.mark.parametrize(
    ("call", "culprit"),
    [
        (("test", "--config", "levels", *OWN), "data.train"),
        (("fit", "--config", "sft", *VALIDATION), "data.validation"),
    ],
)
def test_the_demos_model_learns_other_data_only_if_it_is_named(
    instantiate: Instantiate, call: tuple[str, ...], culprit: str
) -> None:
    with pytest.raises(DataError, match=rf"^{culprit} is not the demo's.*--config model/"):
        instantiate(*call)


def test_the_demos_model_by_name_and_its_adapters_take_other_data(
    instantiate: Instantiate, adapter_run: Path, capsys: Capture
) -> None:
    named = ("--model.init_args.base.name_or_path", f"{DEMO}/model")
    adapters = ("--model.init_args.adapters", json.dumps({"sft": str(adapter_run)}))
    for call in (("fit", "--config", "sft", *OWN, *named), ("test", "--config", "eval/jsonl", *adapters)):
        instantiate(*call)
        assert "base model: " in capsys.readouterr().out


BOTH_STAGES = {
    *("data.noise.levels", "data.noise.kinds", "data.noise.clean_fraction", "data.noise.wrong_answer_rate"),
    *("data.noise.distractor_probability", "data.noise.resolution", "model.init_args.answer_weight"),
}
# The demo's tiny model needs a higher one.
LEARNING_RATE = "model.init_args.optimizer.lr"
PAPER = {
    SFT: {*BOTH_STAGES, "model.init_args.confidence_weight"},
    DPO: {
        *(*BOTH_STAGES, LEARNING_RATE, "model.init_args.loss", "model.init_args.reference"),
        *("model.init_args.drift_weight", "model.init_args.pairs.target", "data.candidates.answers"),
        "data.candidates.wrong_answer",
        "data.teacher",
        *("model.init_args.pairs.rejected", "model.init_args.pairs.n_rejected"),
    },
}
"""Settings that the paper's preset changes. All others, such as the noise schedule, the noise for absent objects, the LoRA layers and the
optimizer, are the same in both: the paper does not publish them."""
OWN_DATA = {
    SFT: {"data.noise.levels", "data.noise.kinds", "data.noise.clean_fraction"},
    DPO: {"data.noise.levels", "data.noise.kinds", LEARNING_RATE},
}
"""Settings that our preset for own data changes from the demo's: the files of its levels, and how often there is what."""


def _settings(tree: Any, path: str = "") -> dict[str, Any]:
    """Settings by dotted name; an object with a `class_path` is one setting, and so are the kinds of perturbation."""
    is_one = "class_path" in tree if isinstance(tree, dict) and path not in ("", "model") else False
    if not isinstance(tree, dict) or is_one or path == "data.noise.kinds":
        return {path: tree}
    below = ((f"{path}.{key}" if path else key, value) for key, value in tree.items())
    return {name: value for key, child in below for name, value in _settings(child, key).items()}


@cache
def _settings_of(parse: Parse, base: Path, *arguments: str) -> dict[str, Any]:
    return _settings(parse(["fit", "--config", str(base), *arguments]).as_dict())


def _differences(
    parse: Parse, base: Path, *overlays: Path, arguments: Sequence[str] = ()
) -> dict[str, tuple[Any, Any]]:
    """Settings that the overlays and arguments change: name -> (value in `base`, value with them)."""
    files = [argument for path in overlays for argument in ("--config", str(path))]
    alone, overlaid = (_settings_of(parse, base, *more) for more in ((), (*files, *arguments)))
    names = sorted({*alone, *overlaid} - {"config"})
    return {name: (alone[name], overlaid[name]) for name in names if alone[name] != overlaid[name]}


@pytest.mark.parametrize("stage", [SFT, DPO], ids=lambda path: path.stem)
def test_presets_differ_in_these_settings_and_in_no_other(parse: Parse, stage: Path) -> None:
    of_stage_2 = "_dpo" if stage == DPO else ""
    for preset, changed in (
        ("paper", PAPER[stage]),
        ("anchored", OWN_DATA[stage]),
    ):
        files = dict.fromkeys(CONFIGS / "experiment" / f"{preset}{end}.yaml" for end in ("", of_stage_2))
        assert set(_differences(parse, stage, *files)) == changed, preset


def test_the_benchmark_has_an_ablation_for_each_difference_of_stage_1(parse: Parse) -> None:
    """Each takes over one setting of the paper's preset, but for the resolution: that of the demo's files is the model's."""
    changed = [_differences(parse, SFT, arguments=settings) for settings in ABLATIONS.values()]
    assert [len(differences) for differences in changed] == [1] * (len(PAPER[SFT]) - 1)
    of_all = {name: value for differences in changed for name, value in differences.items()}
    of_paper = _differences(parse, SFT, CONFIGS / "experiment/paper.yaml")
    assert of_all == {name: value for name, value in of_paper.items() if name != "data.noise.resolution"}


def test_the_benchmark_refuses_to_choose_on_test_scenes(monkeypatch: Patch, capsys: Capture) -> None:
    """Development scenes, as the preset has them, are all that it asks about without `--test`."""
    answered = []

    def start(*arguments: str, threads: int = 1) -> None:
        if arguments[0] == "test":
            answered.append(arguments)
            raise InterruptedError

    monkeypatch.setattr(demo_seeds, "start", start)
    monkeypatch.setattr(demo_seeds, "finish", lambda process: None)
    with pytest.raises(SystemExit):
        demo_seeds.main(["--test", "--systems", "rlcr"])
    assert "--systems rlcr" in capsys.readouterr().err
    for arguments in ([], ["--test"]):
        with pytest.raises(InterruptedError):
            demo_seeds.main(arguments)
    systems = [json.loads(a[a.index("--model.init_args.adapters") + 1]) for a in answered]
    assert set(systems[1]) == {*demo_seeds.STATED}, "the first of two evaluations"
    assert set(ABLATIONS) < set(systems[0])
    own, [parts] = ([word for word in a if word.startswith("--data.test=")] for a in answered)
    assert own == []
    development = json.dumps(yaml.safe_load(EVAL.read_text(encoding="utf-8"))["data"]["test"])
    assert json.loads(parts.partition("=")[2]) == json.loads(development.replace("development", "test"))


def test_nothing_else_asks_about_the_scenes_that_recalibration_is_fitted_on() -> None:
    """The same holds for the scenes of the evaluation, and no preset asks about test scenes. Scenes are compared by split and index."""
    scenes: dict[str, set[tuple[str, int]]] = {}
    for path in CONFIGS.rglob("*.yaml"):
        values = dict(flat(yaml.safe_load(path.read_text(encoding="utf-8"))))
        for name, number in values.items():
            if name.endswith(".scenes"):
                source = name.removesuffix("scenes")
                first, split = values.get(f"{source}first", 0), values[f"{source}split"]
                asked = {(split, i) for i in range(first, first + number)}
                scenes[f"{path.relative_to(CONFIGS)}: {source}"] = asked
    recalibration = {name for name in scenes if ": data.calibration." in name}
    test = {name for name in scenes if "eval/demo.yaml: data.test." in name}
    assert (len(recalibration), len(test), len(scenes)) == (3, 5, 16)
    assert "test" not in {split for of_source in scenes.values() for split, _ in of_source}
    for group in (recalibration, test):
        for name in group:
            assert not [other for other in scenes if other not in group and scenes[other] & scenes[name]]


def test_the_preset_of_stage_2_is_chosen_by_its_rule() -> None:
    """The lowest Brier score of those with readable answers and the base model's accuracy on every part, averaged over seeds."""
    right = {f"accuracy{part}": 0.8 for part in demo_seeds.PARTS}

    def run(**brier: float) -> dict[str, dict[str, float]]:
        read = {**right, "parse_failure_rate": 0.0}
        return {"base": right, **{name: {**read, "brier": value} for name, value in brier.items()}}

    runs = [run(a=0.13, b=0.14, c=0.1, d=0.11), run(a=0.15, b=0.12, c=0.1, d=0.11)]
    for seed in runs:
        seed["c"]["accuracy/foreign"] = 0.78
        seed["d"]["parse_failure_rate"] = 0.002
    assert demo_seeds.chosen(runs, "abcd") == "b"
    assert demo_seeds.chosen(runs, "cd") == "none"


def test_the_parts_of_coco_share_no_image_and_have_none_of_pope() -> None:
    """A part is a file and a range of its images; levels and recalibration use the same one."""
    data, pope = (
        yaml.safe_load((CONFIGS / f"{name}.yaml").read_text(encoding="utf-8"))["data"]
        for name in ("data/coco", "eval/pope")
    )
    assert data["calibration"]["own"]["source"] == data["levels"]
    sources = [data["train"], data["validation"], data["levels"], data["test"]["own"]["source"]]
    asked = {part["source"]["init_args"]["path"] for part in pope["test"].values()}
    ranges = []
    for settings in (source["init_args"] for source in sources):
        assert set(settings["exclude"]) == asked
        begin = settings.get("begin", settings.get("first", 0))
        end = begin + settings["images"] if "images" in settings else settings.get("end", 1)
        assert begin < end
        ranges.append((settings.get("annotations", ""), begin, end))
    for (file, _, end), (next_file, begin, _) in pairwise(sorted(ranges)):
        assert file != next_file or end <= begin


def test_a_loss_of_another_kind_inherits_no_settings(parse: Parse) -> None:
    """LightningCLI keeps settings of the same name when the class changes, and DPO's beta is far too small for SimPO."""
    presets = [CONFIGS / "experiment" / f"{name}.yaml" for name in ("paper", "paper_dpo")]
    config = parse(["fit", *(a for path in (DPO, *presets) for a in ("--config", str(path)))])
    loss = config.model.init_args.loss
    assert loss.class_path.rsplit(".", 1)[-1] == "SimPO"
    assert vars(SimPO()) == loss.init_args.as_dict()


def test_lightning_s_table_of_all_metrics_is_not_printed(parse: Parse) -> None:
    for command, config in (("validate", "sft"), ("test", "eval/demo")):
        assert parse([command, "--config", config]).verbose is False


def test_a_noise_schedule_is_chosen_by_its_name(parse: Parse) -> None:
    given = ("--data.noise.schedule", "SigmoidSchedule", "--data.noise.schedule.steps", "50")
    schedule = parse(["fit", "--config", "sft", *given]).data.noise.schedule
    assert schedule.class_path.endswith(".SigmoidSchedule")
    assert schedule.init_args.steps == 50


def contents(*arguments: str) -> list[dict[str, Any]]:
    """The content that each --config is replaced by."""
    following = zip(arguments, resolve_configs(arguments)[1:], strict=False)
    return [get_loader("yaml")(text) for option, text in following if option == "--config"]


@pytest.fixture
def overlay(tmp_path: Path, monkeypatch: Patch) -> Path:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "mine.yaml"
    path.write_text(
        'data: {a: "${data_root}/x.jsonl", b: ["${runs}/sft", "${demo}"], c: "${home} 5 $", d: 1.0e-3}\n'
    )
    return path


def test_every_yaml_file_is_a_preset(root: Path) -> None:
    files = {path.relative_to(root / "configs") for path in (root / "configs").rglob("*.yaml")}
    assert {f"{name}.yaml" for name in preset_names()} == set(map(str, files))


def test_a_name_gives_the_content_of_its_file(root: Path) -> None:
    path = root / "configs/model/qwen2_5_vl_7b.yaml"
    for name in ("model/qwen2_5_vl_7b", "model/qwen2_5_vl_7b.yaml"):
        assert contents("fit", "--config", name) == [yaml.safe_load(path.read_text())]
        assert find_preset(name).samefile(path)


def test_a_file_takes_precedence_over_a_preset(overlay: Path) -> None:
    overlay.rename("sft")
    assert contents("--config", "sft")[0]["data"]["d"] == 1e-3


def test_variables_have_defaults(overlay: Path, root: Path, tmp_path: Path, monkeypatch: Patch) -> None:
    """That of the demo is the same in every working folder."""
    for folder in (tmp_path, root):
        monkeypatch.chdir(folder)
        [content] = contents("--config", str(overlay))
        paths = {"a": "data/x.jsonl", "b": ["runs/sft", str(root / "src/vlm_calibration/demo")]}
        assert content["data"] == {**paths, "c": "${home} 5 $", "d": 1e-3}


@pytest.mark.parametrize(
    "options", [("--data-root", "my data", "--runs", "r: #1"), ("--data-root=my data", "--runs=r: #1")]
)
def test_options_set_variables_wherever_they_stand(overlay: Path, options: tuple[str, ...]) -> None:
    for arguments in ([*options, "--config", str(overlay)], ["--config", str(overlay), *options]):
        resolved = resolve_configs(arguments)
        content = yaml.safe_load(resolved[resolved.index("--config") + 1])
        assert (content["data"]["a"], content["data"]["b"][0]) == ("my data/x.jsonl", "r: #1/sft")


def test_the_configuration_of_a_run_sets_them_too(overlay: Path) -> None:
    Path("config.yaml").write_text("data_root: theirs\n")
    files = ("--config", "config.yaml", "--config", str(overlay))
    assert contents(*files)[1]["data"]["a"] == "theirs/x.jsonl"
    assert contents(*files, "--data-root", "mine")[1]["data"]["a"] == "mine/x.jsonl"


@pytest.mark.parametrize(
    ("content", "says"),
    [("data: {train\n", "not YAML"), ("- 3\n", "expected settings"), (b"\xff\xfe", "cannot be read")],
)
def test_a_file_that_is_no_configuration_is_named(tmp_path: Path, content: str | bytes, says: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ArgumentError, match=f"bad.yaml(:2)?: {says}"):
        resolve_configs(["--config", str(path)])


def test_the_parser_reads_what_the_file_says() -> None:
    """Texts that YAML would read as something else stay texts; the order of keys is that of systems in tables."""
    texts = ["yes", "null", "1e3", "1_000", "0x1f", "2026-01-01", "a: #b", "{c}", "", "Größe"]
    content = {"b": None, "a": texts, "c": [1e-3, True, 7]}
    [read] = contents("--config", json.dumps({"data": content}, ensure_ascii=False))
    assert list(read["data"].items()) == list(content.items())


STAGES = {
    "evaluation.EvaluationModule": ({"base", "max_new_tokens"}, True),
    "level_fit.LevelFitModule": ({"base", "max_new_tokens"}, False),
    "regions.RegionExtractor": (set(), False),
}
"""Stage -> settings of a training that it has as well, and whether it reads the level table, which is measured before it."""


@pytest.mark.parametrize("stage", STAGES)
def test_overlays_keep_what_a_stage_has(stage: str) -> None:
    kept, has_table = STAGES[stage]
    first = {"model": {"class_path": f"vlm_calibration.stages.{stage}"}}
    of_model = {"base": {"name_or_path": "m"}, "lora": {"r": 4}, "max_new_tokens": 8}
    misspelt = {"model": {"init_args": {"lorra": {"r": 4}}}}
    presets = contents("--config", "experiment/anchored", "--config", "experiment/paper")
    _, trained, anchored, paper, last = shared_overlays(
        [first, {"model": {"init_args": of_model}}, *presets, misspelt]
    )
    assert set(trained["model"]["init_args"]) == kept
    assert ("levels" in anchored["data"]["noise"]) == has_table
    assert anchored["data"]["noise"]["resolution"] == "model"
    assert "levels" in paper["data"]["noise"], "linear levels have no table"
    assert last == misspelt, "the parser refuses it"


def test_the_settings_of_one_class(parse: Parse, capsys: Capture) -> None:
    arguments = ["test", "--model.help", "EvaluationModule"]
    check_settings(arguments)
    with pytest.raises(SystemExit, match="0"):
        parse(arguments)
    assert "--model.max_new_tokens" in capsys.readouterr().out
