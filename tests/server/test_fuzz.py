"""Bodies made up from the server's own schema, valid and damaged: no failure of the server."""

from __future__ import annotations

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings

POSTS = ["/v1/chat/completions", "/v1/completions"]
GETS = ["/v1/models", "/v1/models/{name}", "/health", "/metrics"]
FEW = settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))


@pytest.fixture(scope="module")
def schema(server):
    return schemathesis.openapi.from_url(f"{server.url}/openapi.json")


def test_the_schema_names_every_endpoint(schema):
    assert sorted(schema) == sorted([*POSTS, *GETS])


@pytest.mark.parametrize(
    ("path", "mode"),
    [(path, mode) for path in POSTS for mode in ("positive", "negative")] + [(p, "positive") for p in GETS],
)
def test_no_made_up_request_is_a_failure_of_the_server(schema, path, mode):
    (operation,) = schema[path].values()

    @FEW
    @given(case=operation.as_strategy(generation_mode=schemathesis.GenerationMode(mode)))
    def call(case) -> None:
        if isinstance(case.body, dict):  # quick answers
            for name in ("max_tokens", "max_completion_tokens"):
                if type(case.body.get(name, 3)) is int:
                    case.body[name] = min(case.body.get(name, 3), 3)
        response = case.call(timeout=60)
        assert response.status_code < 500, response.text
        if response.status_code >= 400:
            assert set(response.json()["error"]) == {"message", "type", "param", "code"}

    call()
