"""What the server takes and gives, as JSON Schema: each request is checked against the schema that documents it.

`SCHEMAS` are the requests, `openapi()` is the document at /openapi.json. The checker knows the few words that the
schemas use, and says what is wrong with a value in one line with the name of the field. What no schema names is
refused.
"""

import contextlib
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tale_jax.utils.settings import format_value

MAX_CHOICES = 128  # texts of one request
MAX_NEW_TOKENS = 4096  # of one text
MAX_TOP = 20
INT64 = {"minimum": -(2**63), "maximum": 2**63 - 1}


class Invalid(ValueError):
    """A request that is refused; `field` is the name of what is wrong in it."""

    def __init__(self, message: str, field: str | None = None, status: int = 400, code: str | None = None):
        super().__init__(message)
        self.field, self.status, self.code = field, status, code


Schema = dict[str, Any]


def integer(doc: str, minimum: int, maximum: int, **more: Any) -> Schema:
    return {"type": "integer", "description": doc, "minimum": minimum, "maximum": maximum, **more}


def number(doc: str, minimum: int | float, maximum: int | float, **more: Any) -> Schema:
    return {"type": "number", "description": doc, "minimum": minimum, "maximum": maximum, **more}


def string(doc: str, **more: Any) -> Schema:
    return {"type": "string", "description": doc, **more}


def boolean(doc: str, **more: Any) -> Schema:
    return {"type": "boolean", "description": doc, **more}


def fields(doc: str, required: Sequence[str], **properties: Schema) -> Schema:
    return {
        "type": "object",
        "description": doc,
        "properties": properties,
        "required": list(required),
        "additionalProperties": False,
    }


TOKEN_IDS = {"type": "array", "items": integer("id of a token", 0, 2**31 - 1), "minItems": 1, "maxItems": 65536}
PROMPT = {"description": "a text, or the ids of its tokens", "anyOf": [string("a text"), TOKEN_IDS]}
MODEL = string("name of a model, as /v1/models has it; may be left out where there is one only", default=None)
STEP = integer("step of the checkpoint; left out: the one that /v1/models tells", 0, 2**62, default=None)
ABLATE = fields(
    "heads whose output is zeroed, and layers that add nothing to the residual stream",
    (),
    heads={
        "type": "array",
        "description": "pairs [layer, head], counted from 0",
        "items": {"type": "array", "items": integer("layer or head", 0, 1023), "minItems": 2, "maxItems": 2},
        "maxItems": 64,
        "default": [],
    },
    layers={"type": "array", "items": integer("layer, counted from 0", 0, 1023), "maxItems": 64, "default": []},
)
ABLATE["default"] = None
WEIGHTS = {"model": MODEL, "step": STEP, "ablate": ABLATE}

SAMPLING = {
    "temperature": number("logits are divided by it; 0: the most likely token always", 0, 100, default=1.0),
    "top_k": integer("only the k most likely tokens; 0: all", 0, 2**31 - 1, default=0),
    "top_p": number(
        "only the most likely tokens that together reach this probability", 0, 1, exclusiveMinimum=0, default=1.0
    ),
    "min_p": number("only tokens at least this share as likely as the most likely", 0, 1, default=0.0),
    "repetition_penalty": number(
        "logits of tokens in prompt and text are divided by it, or multiplied if negative; 1: off", 0.01, 100,
        default=1.0,
    ),
    "presence_penalty": number("taken from the logits of tokens that are in the text", -2, 2, default=0.0),
    "frequency_penalty": number("the same, for each time that a token is there", -2, 2, default=0.0),
    "logit_bias": {
        "type": "object",
        "description": "added to the logits of tokens, by id",
        "propertyNames": {"pattern": "^[0-9]{1,9}$"},
        "additionalProperties": number("in nats", -100, 100),
        "maxProperties": 1024,
        "default": {},
    },
}  # fmt: skip
COMMON = {
    **WEIGHTS,
    "max_tokens": integer("of a text, its end mark included; 0: none, the prompt is only read", 0, MAX_NEW_TOKENS,
                          default=16),
    **SAMPLING,
    "seed": integer("of the random numbers: the same seed gives the same text", **INT64, default=None),
    "n": integer("texts for each prompt", 1, MAX_CHOICES, default=1),
    "stop": {
        "description": "texts that end a text, which is cut before the first of them",
        "anyOf": [
            string("one text", minLength=1, maxLength=1000),
            {"type": "array", "items": string("a text", minLength=1, maxLength=1000), "maxItems": 16},
        ],
        "default": [],
    },
    "stream": boolean("the text comes while it is written, as server-sent events", default=False),
    "stream_options": {
        **fields("for stream=true", (), include_usage=boolean("a last event tells the usage", default=False)),
        "default": None,
    },
    "token_details": boolean(
        "each choice brings `token_details`: every token with its id, bytes and log-probability, and the likeliest "
        "others (as many as `logprobs` or `top_logprobs` says), before and after penalties, temperature and filters",
        default=False,
    ),
}  # fmt: skip
COMPLETION = fields(
    "OpenAI's completions; top_k, min_p, repetition_penalty, step, ablate and token_details are ours",
    (),
    **COMMON,
    prompt={
        "description": "what the texts follow: a text, several, the ids of its tokens, or of several; the start of a "
        "document where it is left out. BOS goes before it, unless its ids begin with it",
        "anyOf": [
            string("a text"),
            {"type": "array", "items": string("a text"), "minItems": 1, "maxItems": MAX_CHOICES},
            TOKEN_IDS,
            {"type": "array", "items": TOKEN_IDS, "minItems": 1, "maxItems": MAX_CHOICES},
        ],
        "default": "",
    },
    echo=boolean("the text begins with the prompt", default=False),
    logprobs=integer("log-probabilities of the tokens, and of so many likeliest others", 0, MAX_TOP, default=None),
)
CHAT = fields(
    "OpenAI's chat completions, where the model has a chat template",
    ("messages",),
    **COMMON | {"max_tokens": integer("of a text, its end mark included; left out: what the context has room for", 0,
                                      MAX_NEW_TOKENS, default=None)},
    messages={
        "type": "array",
        "minItems": 1,
        "maxItems": 1000,
        "items": fields(
            "what someone said",
            ("role", "content"),
            role={"type": "string", "enum": ["system", "user", "assistant"]},
            content=string("a text"),
        ),
    },
    max_completion_tokens=integer("another name for max_tokens", 0, MAX_NEW_TOKENS, default=None),
    logprobs=boolean("log-probabilities of the tokens", default=False),
    top_logprobs=integer("and of so many likeliest others", 0, MAX_TOP, default=None),
)  # fmt: skip
TOKENIZE = fields(
    "text to tokens",
    ("prompt",),
    model=MODEL,
    prompt=string("a text"),
    add_special_tokens=boolean("BOS goes before them", default=False),
)
DETOKENIZE = fields("tokens to text", ("tokens",), model=MODEL, tokens={**TOKEN_IDS, "minItems": 0})
TEXT = {**WEIGHTS, "prompt": {**PROMPT, "default": ""}}
INSPECT_TOKENS = fields(
    "each token's surprise, and the likeliest others before and after penalties, temperature and filters",
    (),
    **TEXT,
    **{name: SAMPLING[name] for name in ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "logit_bias")},
    top=integer("likeliest tokens of each position", 0, MAX_TOP, default=MAX_TOP),
)
INSPECT_ATTENTION = fields(
    "attention weights of a layer, of each head or of one",
    ("layer",),
    **TEXT,
    layer=integer("counted from 0", 0, 1023),
    head=integer("counted from 0; left out: all", 0, 1023, default=None),
)
INSPECT_LENS = fields(
    "what each layer would say next: final norm and head applied after each of them",
    (),
    **TEXT,
    top=integer("likeliest tokens of each layer and position", 1, MAX_TOP, default=5),
)
INSPECT_JUDGE = fields("a text judged by the grammar of the tales", ("text",), model=MODEL, text=string("a text"))

SCHEMAS = {
    "/v1/completions": COMPLETION,
    "/v1/chat/completions": CHAT,
    "/tokenize": TOKENIZE,
    "/detokenize": DETOKENIZE,
    "/inspect/tokens": INSPECT_TOKENS,
    "/inspect/attention": INSPECT_ATTENTION,
    "/inspect/lens": INSPECT_LENS,
    "/inspect/judge": INSPECT_JUDGE,
}
PAGES = {  # answers to GET
    "/v1/models": "the models",
    "/health": "whether requests are taken",
    "/tokenizer_info": "ids of special tokens, and the chat template",
    "/inspect/model": "shape, vocabulary and special tokens of a model",
    "/inspect/checkpoints": "steps whose weights can be asked for, and their losses",
    "/inspect/losses": "the loss curve of the training",
}
TYPES = {
    "object": (dict, "an object"),
    "array": (list, "a list"),
    "string": (str, "a text"),
    "boolean": (bool, "true or false"),
    "integer": (int, "a whole number"),
    "number": ((int, float), "a number"),
}


def read(path: str, body: Any) -> dict[str, Any]:
    """The fields of a request, with defaults for what it leaves out. Raises Invalid for what its schema refuses."""
    if not isinstance(body, dict):
        raise Invalid("the body must be a JSON object")
    schema = SCHEMAS[path]
    for name in body:
        if name not in schema["properties"]:
            shown = format_value(name).strip("\"'")
            raise Invalid(f"{shown} is not supported here; leave it out", shown, code="unsupported_parameter")
    values = {}
    for name, known in schema["properties"].items():
        value = body.get(name)
        if value is None:
            if name in schema["required"]:
                raise Invalid(f"{name} is missing", name)
            values[name] = known.get("default")
        else:
            values[name] = check(name, value, known)
    return values


def check(name: str, value: Any, schema: Mapping[str, Any]) -> Any:
    """The value, whole numbers as int. Raises Invalid in one line with the name, the value and the rule."""

    def refuse(rule: str) -> Invalid:
        return Invalid(f"{name}={format_value(value)} must {rule}", name.partition(".")[0].partition("[")[0])

    if "anyOf" in schema:
        return _check_any(name, value, schema["anyOf"], refuse)
    kind = schema["type"]
    if kind == "integer" and isinstance(value, float) and value.is_integer():
        value = int(value)
    if not isinstance(value, TYPES[kind][0]) or (isinstance(value, bool) and kind != "boolean"):
        raise refuse(f"be {TYPES[kind][1]}")
    return _check_kind(name, value, kind, schema, refuse)


def _check_kind(name: str, value: Any, kind: str, schema: Mapping[str, Any], refuse: Callable[[str], Invalid]) -> Any:
    """The rules of a value that is of the right kind."""
    if kind in ("integer", "number"):
        low, high, above = schema["minimum"], schema["maximum"], schema.get("exclusiveMinimum")
        if above is not None and not value > above:
            raise refuse(f"be above {above}, and at most {high}")
        if not (math.isfinite(value) if isinstance(value, float) else True) or not low <= value <= high:
            raise refuse(f"be at least {low} and at most {high}")
        return float(value) if kind == "number" else value
    if kind == "string":
        if "enum" in schema and value not in schema["enum"]:
            raise refuse(f"be one of {', '.join(schema['enum'])}")
        if not schema.get("minLength", 0) <= len(value) <= schema.get("maxLength", math.inf):
            raise refuse(f"have at least {schema.get('minLength', 0)} and at most {schema.get('maxLength')} characters")
        try:
            value.encode()
        except UnicodeEncodeError:
            raise refuse("not hold half a surrogate pair") from None
        return value
    if kind == "array":
        low, high = schema.get("minItems", 0), schema["maxItems"]
        if not low <= len(value) <= high:
            raise Invalid(f"{name} has {len(value)} items and must have at least {low} and at most {high}", name)
        return [check(f"{name}[{index}]", item, schema["items"]) for index, item in enumerate(value)]
    if kind == "object":
        return _check_object(name, value, schema)
    return value


def _check_any(name: str, value: Any, choices: Sequence[Mapping[str, Any]], refuse: Callable[[str], Invalid]) -> Any:
    """The value by the first of the choices that it fits."""
    for choice in choices:
        with contextlib.suppress(Invalid):
            return check(name, value, choice)
    kind = "array" if isinstance(value, list) else "string" if isinstance(value, str) else ""
    for choice in choices:  # where the value is of the right kind, what is wrong is inside of it
        inner = TYPES[choice["items"]["type"]][0] if kind == "array" and "items" in choice else object
        if choice["type"] == kind and (not value or isinstance(value[0], inner)):
            return check(name, value, choice)
    raise refuse(f"be {' or '.join(_words(choice) for choice in choices)}")


def _check_object(name: str, value: dict[str, Any], schema: Mapping[str, Any]) -> dict[str, Any]:
    root = name.partition(".")[0].partition("[")[0]
    if "propertyNames" in schema:
        if len(value) > schema["maxProperties"]:
            raise Invalid(f"{name} must have at most {schema['maxProperties']} entries", root)
        for key in value:
            if not re.fullmatch(schema["propertyNames"]["pattern"][1:-1], key, flags=re.ASCII):
                raise Invalid(f"{name} must have ids of tokens as keys, and not {format_value(key)}", root)
        return {key: check(f"{name}.{key}", item, schema["additionalProperties"]) for key, item in value.items()}
    for key in value:
        if key not in schema["properties"]:
            raise Invalid(
                f"{name}.{format_value(key).strip(chr(34) + chr(39))} is not supported here; leave it out", root
            )
    result = {}
    for key, known in schema["properties"].items():
        if value.get(key) is None:
            if key in schema["required"]:
                raise Invalid(f"{name}.{key} is missing", root)
            result[key] = known.get("default")
        else:
            result[key] = check(f"{name}.{key}", value[key], known)
    return result


def _words(schema: Mapping[str, Any]) -> str:
    words = TYPES[schema["type"]][1]
    return f"{words} of {_words(schema['items']).removeprefix('a ')}s" if "items" in schema else words


# The document.

ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}
EVENT = {  # of a stream: a chunk as JSON, or [DONE]
    "type": "object",
    "required": ["data"],
    "properties": {"data": {"type": "string"}},
}
ERRORS = {
    400: "bad JSON, a bad value, or something that is not supported",
    401: "no valid key, where one is asked for",
    403: "called by a name that is not this machine's",
    404: "no such model",
    408: "the body did not come in time",
    413: "a body or a prompt that is too long",
    415: "a body that is not JSON",
    429: "the queue is full",
    503: "the server ends",
}


def openapi(version: str) -> dict[str, Any]:
    """The OpenAPI document."""
    errors = {
        str(status): {"description": doc, "content": {"application/json": {"schema": ERROR}}}
        for status, doc in ERRORS.items()
    }
    answer = {"description": "the answer", "content": {"application/json": {"schema": {"type": "object"}}}}
    paths: dict[str, Any] = {}
    for path, schema in SCHEMAS.items():
        stream = {"text/event-stream": {"schema": EVENT}} if "stream" in schema["properties"] else {}
        paths[path] = {
            "post": {
                "summary": schema["description"],
                "requestBody": {"required": True, "content": {"application/json": {"schema": _nullable(schema)}}},
                "responses": {"200": {**answer, "content": {**answer["content"], **stream}}, **errors},
            }
        }
    name = {"name": "model", "in": "query", "required": False, "schema": {"type": "string"}}
    for path, doc in PAGES.items():
        get = {"summary": doc, "responses": {"200": answer, **errors}}
        of_model = path.startswith(("/inspect", "/tokenizer_info"))
        paths[path] = {"get": {**get, "parameters": [name]} if of_model else get}
    text = {"description": "Prometheus text", "content": {"text/plain": {"schema": {"type": "string"}}}}
    paths["/metrics"] = {"get": {"summary": "counters", "responses": {"200": text, **errors}}}
    return {
        "openapi": "3.1.0",
        "info": {"title": "tale_jax", "version": version, "description": "OpenAI's API, and a look inside a model"},
        "paths": paths,
        "components": {"securitySchemes": {"key": {"type": "http", "scheme": "bearer"}}},
    }


def _nullable(schema: Schema) -> Schema:
    """The schema of a request as it is checked: what has a default may be null."""
    properties = {}
    for name, known in schema["properties"].items():
        if "default" not in known:
            properties[name] = known
        elif "anyOf" in known:
            properties[name] = {**known, "anyOf": [*known["anyOf"], {"type": "null"}]}
        else:
            properties[name] = {**known, "type": [known["type"], "null"]}
    return {**schema, "properties": properties}
