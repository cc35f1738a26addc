"""Whatever is sent is answered, with a 4xx where it is wrong, and the next request is served."""

import collections
import json
import string

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tale_jax.serve.schema import SCHEMAS, Invalid, read
from tale_jax.serve.server import App

numbers = st.one_of(
    st.integers(), st.floats(), st.sampled_from([10**400, -(10**400), 2**63, -(2**63), 1e308, -0.0, 5e-324])
)
texts = st.one_of(
    st.text(max_size=20),
    st.sampled_from(
        ["\0", "\ud800", "\udfff\ud800", "<script>alert(1)</script>", "\u2028", "\U0010ffff", "%n", "../.."]
    ),
)
anything = st.recursive(
    st.one_of(st.none(), st.booleans(), numbers, texts),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(texts, inner, max_size=4)),
    max_leaves=12,
)
QUICK = settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])


def bodies(path):
    """Objects with fields of the endpoint, each right or not, and perhaps one that it does not have."""
    fields = SCHEMAS[path]["properties"]
    right = {
        "max_tokens": st.integers(0, 3),
        "max_completion_tokens": st.integers(0, 3),
        "prompt": st.one_of(st.text(max_size=30), st.lists(st.integers(0, 600), min_size=1, max_size=4)),
        "messages": st.just([{"role": "user", "content": "x"}]),
        "tokens": st.lists(st.integers(0, 600), max_size=4),
        "text": st.text(max_size=40),
        "n": st.integers(1, 2),
        "model": st.just("chatty"),
        "stream": st.booleans(),
        "logprobs": st.one_of(st.integers(0, 20), st.booleans()),
        "layer": st.integers(0, 2),
        "stop": st.text(max_size=3),
        "logit_bias": st.dictionaries(st.integers(0, 600).map(str), st.floats(-100, 100), max_size=3),
        "step": st.sampled_from([10, 20, 30]),
        "ablate": st.fixed_dictionaries({"layers": st.lists(st.integers(0, 2), max_size=2)}),
    }
    optional = {name: st.one_of(right.get(name, anything), anything) for name in fields}
    bounded = {name: right[name] for name in ("max_tokens", "n") if name in fields}  # or the test takes long
    return st.fixed_dictionaries(bounded, optional={n: s for n, s in optional.items() if n not in bounded}).flatmap(
        lambda body: st.one_of(
            st.just(body), st.dictionaries(texts, anything, max_size=1).map(lambda more: body | more)
        )
    )


def answered(client, path, content):
    done = client.post(path, content=content, headers={"content-type": "application/json"})
    assert done.status_code < 500, (done.status_code, done.text)
    assert "Traceback" not in done.text and "site-packages" not in done.text
    if done.status_code >= 400:
        assert set(done.json()) == {"error"} and done.json()["error"]["message"]
    return done


@pytest.mark.slow
@pytest.mark.parametrize("path", SCHEMAS)
def test_values_of_all_kinds(client, path):
    @QUICK
    @given(bodies(path))
    def check(body):
        answered(client, path, json.dumps(body).encode())

    check()
    assert client.get("/health").status_code == 200


@QUICK
@given(st.one_of(st.binary(max_size=200), anything.map(lambda value: json.dumps(value).encode())))
def test_bodies_of_all_kinds(client, content):
    assert answered(client, "/v1/completions", content).status_code >= 400 or content.strip() == b"{}"


@given(st.sampled_from(sorted(SCHEMAS)), anything)
@settings(max_examples=200)
def test_a_schema_gives_values_or_says_what_is_wrong(path, body):
    try:
        values = read(path, body)
        said = None
    except Invalid as error:
        values, said = None, str(error)
    if said is None:
        assert values is not None and set(values) == set(SCHEMAS[path]["properties"])
    else:
        assert said and "\n" not in said and len(said) < 1000


@pytest.mark.parametrize("depth", [10, 1000, 100_000])
def test_deep_json(client, depth):
    for left, right in (("[", "]"), ('{"a":', "}")):
        deep = left * depth + "1" + right * depth
        for content in (deep, f'{{"prompt": {deep}}}', f'{{"logit_bias": {deep}}}'):
            assert answered(client, "/v1/completions", content.encode()).status_code in (400, 413)


def test_long_numbers_and_names(client):
    for content in ('{"seed": ' + "9" * 500_000 + "}", '{"temperature": 1e' + "9" * 1000 + "}", '{"n": 1.0}'):
        assert answered(client, "/v1/completions", content.encode()).status_code in (200, 400)
    assert answered(client, "/v1/completions", json.dumps({"x" * 900_000: 1}).encode()).status_code == 400
    assert len(answered(client, "/v1/completions", json.dumps({"x" * 900_000: 1}).encode()).text) < 1000


@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.text(string.printable, max_size=60))
def test_paths_of_all_kinds(client, path):
    from urllib.parse import quote

    assert client.get("/" + quote(path)).status_code < 500


def test_markup_comes_back_as_text(client):
    markup = "<script>alert(1)</script>"
    done = client.post("/v1/completions", json={"prompt": markup, "max_tokens": 0, "echo": True})
    assert done.headers["content-type"] == "application/json" and done.headers["x-content-type-options"] == "nosniff"
    assert done.json()["choices"][0]["text"] == markup


@pytest.mark.slow
@pytest.mark.clients
def test_the_document_holds_under_schemathesis(model):
    """Requests made from the document: none is answered with a 5xx, and every answer is one that it names."""
    schemathesis = pytest.importorskip("schemathesis", reason="needs the extra clients")
    document = schemathesis.openapi.from_asgi("/openapi.json", App([model]).asgi)
    from schemathesis.checks import not_a_server_error
    from schemathesis.specs.openapi.checks import response_schema_conformance, status_code_conformance

    statuses = collections.Counter()
    for result in document.get_all_operations():

        @settings(max_examples=15, suppress_health_check=list(HealthCheck))
        @given(result.ok().as_strategy())
        def check(case):
            if isinstance(case.body, dict) and "completions" in case.path:
                case.body |= {"max_tokens": 2, "n": 1}  # or it takes long
            checks = [not_a_server_error, response_schema_conformance, status_code_conformance]
            statuses[case.call_and_validate(checks=checks).status_code] += 1

        check()
    assert sum(statuses.values()) > 100 and statuses[200] > 30
