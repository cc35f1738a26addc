"""Out to a folder for Ollama: the model as a `.gguf` file, and the `Modelfile` that says how to use it.

    export_ollama(experiment, Path("tales"), "q8_0")        # then: ollama create tales -f tales/Modelfile

The Modelfile has the context, the sampling of the run's own samples, the text that ends an answer, and the template
that makes a prompt of what is asked: without a chat template the text itself, which the model then goes on from.
Ollama's templates are of another language than the Jinja of chat templates: of those only ours and ChatML are
translated. With another one the Modelfile has none, and Ollama looks for one that it knows in the .gguf file.
"""

from pathlib import Path

from tale_jax.convert.gguf import export_gguf
from tale_jax.convert.huggingface import chat_template
from tale_jax.convert.tokenizer_json import special_token
from tale_jax.data.chat_template import DEFAULT_TEMPLATE
from tale_jax.runs.experiment import Experiment

MODEL = "model.gguf"
PLAIN = "{{ .Prompt }}"
CHATML = """\
{{- range .Messages }}<|im_start|>{{ .Role }}
{{ .Content }}<|im_end|>
{{ end }}<|im_start|>assistant
"""
# Of our own template, whose first BOS Ollama puts there itself.
OURS = """\
{{- range $number, $message := .Messages }}{{ if $number }}BOS{{ end }}{{ .Role }}
{{ .Content }}EOS
{{ end }}BOSassistant
"""


def export_ollama(experiment: Experiment, out: Path, dtype: str = "float32") -> None:
    """Writes the folder. Raises ValueError, in one line, for what cannot be written."""
    out.mkdir()
    export_gguf(experiment, out / MODEL, dtype)
    (out / "Modelfile").write_text(modelfile(experiment), encoding="utf-8")


def modelfile(experiment: Experiment) -> str:
    """The content of the Modelfile."""
    config, chat = experiment.config, chat_template(experiment)
    tokenizer = experiment.tokenizer
    marks = [special_token(tokenizer, index) for index in (tokenizer.bos_id, tokenizer.eos_id)]
    if chat == DEFAULT_TEMPLATE and all(marks):
        ours = OURS if tokenizer.puts_bos else OURS.replace("{{ if $number }}BOS{{ end }}", "BOS")
        template = ours.replace("BOS", marks[0]).replace("EOS", marks[1])
    else:
        template = CHATML if "<|im_start|>" in chat else PLAIN if not chat else ""
    lines = [f"FROM ./{MODEL}", f'TEMPLATE """{template}"""'] if template else [f"FROM ./{MODEL}"]
    parameters = {
        "num_ctx": str(config.model.seq_len),
        "num_predict": str(config.model.seq_len),
        "temperature": f"{config.sample.temperature:g}",
        "top_k": "0",  # Ollama's own defaults would cut what the model may say
        "top_p": "1",
        "min_p": "0",
        "repeat_penalty": "1",
    }
    lines += [f"PARAMETER {name} {value}" for name, value in parameters.items()]
    lines += [f'PARAMETER stop "{stop}"' for stop in _stops(experiment, chat)]
    return "\n".join(lines) + "\n"


def _stops(experiment: Experiment, chat: str) -> list[str]:
    """Texts that end an answer: the end mark, should a model spell it, and those of ChatML."""
    tokenizer = experiment.tokenizer
    end = special_token(tokenizer, tokenizer.eos_id)
    stops = [end] if end else []
    if "<|im_start|>" in chat:
        stops += ["<|im_end|>", "<|im_start|>"]
    return list(dict.fromkeys(stops))
