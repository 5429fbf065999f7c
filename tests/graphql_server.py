"""A W&B server that knows nothing but how to take a report and a workspace, and writes down what it was asked."""

from __future__ import annotations

import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

ENTITY = "team"
USER = {
    "id": "VXNlcjox",
    "name": "someone",
    "username": "someone",
    "email": "someone@example.org",
    "admin": False,
    "flags": "{}",
    "entity": ENTITY,
    "deletedAt": None,
    "apiKeys": {"edges": []},
    "teams": {"edges": [{"node": {"name": ENTITY}}]},
}


class GraphQLServer:
    """Listens on the loopback interface until it is closed.

    Args:
        projects: the projects that there are.
        refuse: the status with which every request is refused; None: they are answered.
    """

    def __init__(self, projects: tuple[str, ...] = (), refuse: int | None = None) -> None:
        self.projects = list(projects)
        self.refuse = refuse
        self.asked: list[dict[str, Any]] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                # W&B's library reports about itself as well, elsewhere and not in JSON.
                status, answer = outer.answer(json.loads(body)) if self.path == "/graphql" else (404, {})
                text = json.dumps(answer).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(text)))
                self.end_headers()
                self.wfile.write(text)

            def log_message(self, *_: Any) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.thread = threading.Thread(target=self.http.serve_forever, daemon=True)
        self.thread.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.http.server_port}"

    @property
    def environment(self) -> dict[str, str]:
        """What makes W&B talk to this server, as someone who is logged in."""
        return {"WANDB_BASE_URL": self.url, "WANDB_API_KEY": "0" * 40, "WANDB_MODE": "online"}

    @property
    def saved(self) -> list[dict[str, Any]]:
        """The variables of every view that was saved, its specification decoded."""
        found = [q["variables"] for q in self.asked if "upsertView" in q["query"]]
        return [{**variables, "spec": json.loads(variables["spec"])} for variables in found]

    def answer(self, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        self.asked.append(body)
        if self.refuse is not None:
            return self.refuse, {"errors": [{"message": "permission denied"}]}
        query, variables = body.get("query", ""), body.get("variables") or {}
        if "upsertView" in query:
            return 200, {"data": {"upsertView": self._view(variables)}}
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
        return {
            "id": "UHJvamVjdDox",
            "name": name,
            "entityName": ENTITY,
            "createdAt": "2026-01-01T00:00:00Z",
            "isBenchmark": False,
        }

    @staticmethod
    def _view(variables: dict[str, Any]) -> dict[str, Any]:
        view = {
            **{key: variables.get(key) for key in ("name", "displayName", "description", "type", "spec")},
            "id": f"view-{variables.get('type')}",
            "project": {"id": "1", "name": variables["projectName"], "entityName": variables["entityName"]},
            "updatedAt": "2026-01-01T00:00:00Z",
        }
        return {"view": view, "inserted": True}

    def close(self) -> None:
        self.http.shutdown()
        self.http.server_close()
