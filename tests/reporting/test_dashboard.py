"""The W&B workspace and report: the requests to a server, panels of logged keys only, and errors in one line."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from vlm_calibration.cli import main
from vlm_calibration.records import DataError
from vlm_calibration.reporting.dashboard import report, sections, workspace

from ..command_line import Ended, Server
from ..graphql_server import ENTITY, GraphQLServer
from ..wandb_log import OfflineRun

SYSTEMS = ("base", "sft", "dpo")

KINDS = {"Run History Line Plot", "Bar Chart", "Media Browser", "Weave"}


@pytest.fixture
def wandb_server() -> Iterator[GraphQLServer]:
    made = GraphQLServer()
    yield made
    made.close()


@pytest.fixture
def build(server: Server, wandb_server: GraphQLServer, tmp_path: Path) -> Callable[[], Ended]:
    """Builds a dashboard on a server that records requests."""
    environment = {"HOME": str(tmp_path), **wandb_server.environment}
    command = ["dashboard", "--entity", ENTITY, "--project", "mine"]
    return lambda: server.wait(server.start(command, tmp_path, environment))


def _panels(specification: Any) -> list[dict[str, Any]]:
    """All panels in a specification of a workspace or report."""
    if isinstance(specification, dict):
        if "viewType" in specification:
            return [specification]
        specification = list(specification.values())
    if isinstance(specification, list):
        return [panel for part in specification for panel in _panels(part)]
    return []


def _keys(panel: dict[str, Any]) -> set[str]:
    """The logged keys of a panel."""
    config = panel["config"]
    if panel["viewType"] == "Weave":
        return {config["panel2Config"]["exp"]["fromOp"]["inputs"]["key"]["val"]}
    named = {*config.get("metrics", ()), *config.get("mediaKeys", ())}
    return named | ({config["xAxis"]} if "xAxis" in config else set())


def _texts(block: Any) -> str:
    if isinstance(block, dict):
        return str(block.get("text", "")) + _texts(block.get("children", []))
    return "".join(map(_texts, block))


def test_workspace_and_report_reach_the_server(
    build: Callable[[], Ended], wandb_server: GraphQLServer
) -> None:
    ended, saved = build().checked(), wandb_server.saved
    report, workspace = saved
    assert {(v["entityName"], v["projectName"]) for v in saved} == {(ENTITY, "mine")}
    assert [v["displayName"] for v in saved] == ["Calibration", "Calibration"]
    assert (report["type"], workspace["type"]) == ("runs", "project-view")
    assert wandb_server.projects == ["mine"], "the project is made where there is none"
    urls = dict(line.split(": ", 1) for line in ended.out.splitlines() if line.startswith(("report", "work")))
    assert urls["report"].startswith(f"{wandb_server.url}/{ENTITY}/mine/reports/Calibration--")
    assert urls["workspace"].startswith(f"{wandb_server.url}/{ENTITY}/mine?nw=")

    asked = sections(SYSTEMS)
    bank = workspace["spec"]["section"]["panelBankConfig"]["sections"]
    assert [s["name"] for s in bank] == [s["question"] for s in asked]
    assert [len(s["panels"]) for s in bank] == [len(s["panels"]) for s in asked]
    assert workspace["spec"]["section"]["settings"]["xAxis"] == "trainer/global_step"
    blocks = report["spec"]["blocks"]
    assert [_texts(b) for b in blocks if b["type"] == "heading"] == [s["question"] for s in asked]
    for section in asked:
        assert section["note"] in [_texts(b) for b in blocks]
    grids = [b for b in blocks if b["type"] == "panel-grid"]
    assert [len(_panels(g)) for g in grids] == [len(s["panels"]) for s in asked]
    for section, grid in zip(asked, grids, strict=True):
        [runs] = grid["metadata"]["runSets"]
        [filtered] = runs["filters"]["filters"]
        assert filtered["key"] == {"section": "run", "name": "tags"}
        assert filtered["value"] == (["evaluation"] if section["runs"] == "evaluation" else ["sft", "dpo"])


def _specifications(content: Any) -> list[Any]:
    """Of the workspace and of the report, as the server gets them."""
    models = (make("team", "mine", content)._to_model() for make in (workspace, report))
    return [json.loads(m.model_dump_json(by_alias=True, exclude_none=True))["spec"] for m in models]


def test_every_panel_shows_what_the_code_logs(offline_runs: dict[str, OfflineRun]) -> None:
    sft, dpo, evaluation = (offline_runs[name] for name in ("sft", "dpo", "eval"))
    logged = {"training": sft.keys | dpo.keys, "evaluation": evaluation.keys}
    tags = {tag for run in offline_runs.values() for tag in run.tags}
    assert tags == {"sft", "dpo", "evaluation"}, "what the report filters runs by"
    for specification in _specifications(sections(SYSTEMS)):
        panels = _panels(specification)
        assert {p["viewType"] for p in panels} == KINDS
        for panel in panels:
            assert _keys(panel)
            missing = _keys(panel) - logged["training"] - logged["evaluation"]
            assert not missing, panel["config"].get("chartTitle")
    for section in sections(SYSTEMS):
        for shown in section["panels"]:
            assert set(shown["keys"]) <= logged[section["runs"]], section["question"]
            media = shown["kind"] in ("figures", "table")
            values = [v for run in offline_runs.values() for key in shown["keys"] for v in run.values(key)]
            assert {isinstance(v, dict) for v in values} == {media}, shown["title"]


def test_other_systems_are_compared_where_they_are_named() -> None:
    for specification in _specifications(sections(["base", "mine-1", "mine_2"])):
        keys = {key for panel in _panels(specification) for key in _keys(panel)}
        assert {f"test/{s}/ece" for s in ("base", "mine-1", "mine_2")} <= keys
        assert not [key for key in keys if key.startswith("test/sft/")]


def test_panels_of_the_report_do_not_overlap() -> None:
    for block in _specifications(sections(SYSTEMS))[1]["blocks"]:
        taken: set[tuple[int, int]] = set()
        for panel in _panels(block):
            at = panel["layout"]
            columns, rows = (range(at[begin], at[begin] + at[size]) for begin, size in ("xw", "yh"))
            cells = {(x, y) for x in columns for y in rows}
            assert not cells & taken, panel
            assert at["x"] + at["w"] <= 24
            taken |= cells


def test_the_outline_names_sections_panels_and_keys(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["dashboard", "--print", "--systems", "base", "mine"]) == 0
    lines = capsys.readouterr().out.splitlines()
    for section in sections(["base", "mine"]):
        begin = lines.index(f"{section['question']} ({section['runs']} runs)")
        assert lines[begin + 1].strip() == section["note"]
        for line, panel in zip(lines[begin + 2 :], section["panels"], strict=False):
            assert line.startswith(f"  - {panel['title']}: {panel['kind']} of {', '.join(panel['keys'])}")
            assert line.endswith(panel.get("unit", "") + ")" * ("unit" in panel))


def test_nobody_is_logged_in_and_the_library_is_not_installed(
    call: Callable[..., Ended], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "")
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    ended = call("dashboard", "--entity", ENTITY)
    assert ended.error().startswith("nobody is logged in to W&B: run `wandb login`")
    monkeypatch.setitem(sys.modules, "wandb_workspaces", None)
    assert "pip install 'vlm-calibration[dashboard]'" in call("dashboard", "--entity", ENTITY).error()


def test_the_server_refuses(build: Callable[[], Ended], wandb_server: GraphQLServer) -> None:
    wandb_server.refuse = 403
    ended = build()
    assert ended.status == 1
    assert ended.error().startswith(f"W&B does not take the dashboard of {ENTITY}/mine: ")
    assert "permission denied" in ended.error()


def test_a_mistake_in_the_call_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in ([], ["--entity", ""]):
        assert main(["dashboard", *arguments]) == 2
        [line] = capsys.readouterr().err.splitlines()
        assert "--entity NAME" in line
    for systems in ([], ["a/b"], ["sft", ""]):
        with pytest.raises(DataError, match="--systems"):
            sections(systems)
