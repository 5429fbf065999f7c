"""A stand-in for W&B's server: accepts reports, workspaces and uploads of runs, and records the requests."""

from __future__ import annotations

import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

ENTITY = "team"
USER = {"id": "VXNlcjox", "name": "someone", "username": "someone", "email": "someone@example.org"}
USER |= {"admin": False, "flags": "{}", "entity": ENTITY, "deletedAt": None, "apiKeys": {"edges": []}}
USER |= {"teams": {"edges": [{"node": {"name": ENTITY}}]}}


def artifact_id(digest: str) -> str:
    """The id of the artifact with this digest."""
    return f"artifact-{digest}"


class GraphQLServer:
    """Server on the loopback interface. `refuse`: HTTP status that refuses every request; None: requests are answered."""

    def __init__(self) -> None:
        self.projects: list[str] = []
        self.refuse: int | None = None
        self.requests: list[dict[str, Any]] = []
        self.uploaded: list[str] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                # Other paths receive the lines of a run's history and the library's telemetry.
                status, answer = outer.answer(json.loads(body)) if self.path == "/graphql" else (200, {})
                self.reply(status, json.dumps(answer).encode())

            def do_PUT(self) -> None:
                self.rfile.read(int(self.headers["Content-Length"]))
                outer.uploaded.append(self.path.removeprefix("/upload/"))
                self.reply(200, b"")

            def reply(self, status: int, text: bytes) -> None:
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(text)))
                self.end_headers()
                self.wfile.write(text)

            def log_message(self, *_: Any) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.http.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.http.server_port}"

    @property
    def environment(self) -> dict[str, str]:
        """Variables that make W&B use this server, logged in."""
        return {"WANDB_BASE_URL": self.url, "WANDB_API_KEY": "0" * 40, "WANDB_MODE": "online"}

    def inputs(self, mutation: str) -> list[dict[str, Any]]:
        """The input of every mutation of this name."""
        return [q["variables"]["input"] for q in self.requests if f"{mutation}(" in q["query"]]

    @property
    def saved(self) -> list[dict[str, Any]]:
        """The variables of every saved view, with the specification decoded."""
        views = [q["variables"] for q in self.requests if "upsertView" in q["query"]]
        return [{**variables, "spec": json.loads(variables["spec"])} for variables in views]

    def answer(self, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        self.requests.append(body)
        if self.refuse is not None:
            return self.refuse, {"errors": [{"message": "permission denied"}]}
        query, variables = body.get("query", ""), body.get("variables") or {}
        if "upsertView" in query:
            view = {key: variables.get(key) for key in ("name", "displayName", "description", "type", "spec")}
            view |= {"id": f"view-{variables.get('type')}", "updatedAt": "2026-01-01T00:00:00Z"}
            view["project"] = self._project(variables["projectName"])
            return 200, {"data": {"upsertView": {"view": view, "inserted": True}}}
        if "upsertBucket" in query:
            run = {"id": "QnVja2V0OjE=", "description": "", "config": "{}", "sweepName": None}
            run |= {key: variables.get(key) for key in ("name", "displayName")}
            run |= {"project": self._project("mine"), "historyLineCount": 0}
            return 200, {"data": {"upsertBucket": {"bucket": run, "inserted": True}}}
        if "createArtifact(" in query:
            # Committed: the server has this content already.
            artifact = {"id": artifact_id(variables["input"]["digest"]), "state": "COMMITTED"}
            sequence = {"id": "1", "latestArtifact": {"id": artifact["id"], "versionIndex": 0}}
            return 200, {"data": {"createArtifact": {"artifact": {**artifact, "artifactSequence": sequence}}}}
        if "useArtifact" in query:
            return 200, {"data": {"useArtifact": {"artifact": {"id": variables["input"]["artifactID"]}}}}
        if "createRunFiles" in query:
            files = [{"name": f, "uploadUrl": f"{self.url}/upload/{f}"} for f in variables["files"]]
            return 200, {"data": {"createRunFiles": {"runID": "1", "uploadHeaders": [], "files": files}}}
        if re.search(r"\bupsertModel\b", query):
            self.projects.append(variables["input"]["name"])
            return 200, {"data": {"upsertModel": {"project": self._project(self.projects[-1])}}}
        if re.search(r"\bmodels\b", query):
            edges = [{"node": self._project(name), "cursor": name} for name in self.projects]
            page = {"endCursor": None, "hasNextPage": False}
            return 200, {"data": {"models": {"edges": edges, "pageInfo": page}}}
        return 200, {"data": {"viewer": USER, "serverInfo": None}}

    @staticmethod
    def _project(name: str) -> dict[str, Any]:
        entity = {"entityName": ENTITY, "entity": {"id": "1", "name": ENTITY}}
        return {"id": "1", "name": name, **entity, "createdAt": "2026-01-01T00:00:00Z", "isBenchmark": False}

    def close(self) -> None:
        self.http.shutdown()
        self.http.server_close()
