"""The Modelfile: context, sampling, stops and template of the model. That it runs: tests/interop."""

import re

import pytest
from interchange import make_experiment

from tale_jax.convert.formats import export_model
from tale_jax.convert.ollama import modelfile
from tale_jax.data.chat_template import DEFAULT_TEMPLATE

pytest.importorskip("gguf", reason="needs the convert extra")


def test_the_folder_has_a_model_and_its_modelfile(tmp_path):
    export_model(make_experiment(tmp_path, **{"sample.temperature": 0.6}), "ollama", tmp_path / "tales", "q8_0")
    assert {path.name for path in (tmp_path / "tales").iterdir()} == {"model.gguf", "Modelfile"}
    text = (tmp_path / "tales" / "Modelfile").read_text()
    assert text.startswith('FROM ./model.gguf\nTEMPLATE """{{ .Prompt }}"""\n')
    parameters = dict(re.findall(r"PARAMETER (\w+) (.+)", text))
    assert parameters["num_ctx"] == "256" and parameters["temperature"] == "0.6" and parameters["stop"] == '"</s>"'


@pytest.mark.parametrize(
    ("template", "part", "absent"),
    [
        ("<|im_start|>{{ role }}", "{{- range .Messages }}<|im_start|>{{ .Role }}", "{{ .Prompt }}"),
        (
            DEFAULT_TEMPLATE,
            "{{ if $number }}<s>{{ end }}{{ .Role }}\n{{ .Content }}</s>\n{{ end }}<s>assistant\n",
            "im_start",
        ),
        ("[INST] {{ messages }}", 'PARAMETER stop "</s>"', "TEMPLATE"),
    ],
)
def test_chat_templates(tmp_path, template, part, absent):
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer" / "chat_template.jinja").write_text(template)
    text = modelfile(make_experiment(tmp_path))
    assert part in text and absent not in text
    assert ('PARAMETER stop "<|im_end|>"' in text) == ("im_start" in template)
