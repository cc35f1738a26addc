"""One trained workdir served: the tiny recipe, with a chat template."""

import shutil

import pytest

pytest.importorskip("starlette")
pytest.importorskip("uvicorn")

TEMPLATE = """{{ bos_token }}{% for message in messages %}
{% if message.role == "system" and not loop.first %}{{ raise_exception("system goes first") }}{% endif %}
{{ message.role }}: {{ message.content }}{{ eos_token }}
{% endfor %}
{% if add_generation_prompt %}assistant:{% endif %}"""


@pytest.fixture(scope="session")
def chat_workdir(trained, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("serve") / "chatty"
    shutil.copytree(trained, workdir)
    (workdir / "tokenizer" / "chat_template.jinja").write_text(TEMPLATE)
    return workdir


@pytest.fixture(scope="session")
def model(chat_workdir, cpu):
    from tale_jax.serve.models import open_model

    model = open_model(chat_workdir, "chatty", cpu, rows=8, block_rows=4, max_queue=64)
    model.engine.start()
    yield model
    model.engine.stop()


@pytest.fixture(scope="session")
def app(model):
    from tale_jax.serve.server import App

    return App([model], only_local_names=True)


@pytest.fixture(scope="session")
def client(app):
    from starlette.testclient import TestClient

    with TestClient(app.asgi, base_url="http://127.0.0.1", raise_server_exceptions=False) as client:
        yield client
