"""What `transformers` makes of exported folders. Run by tests/interop with one of two versions on the path.

python transformers_side.py REQUESTS.json ANSWERS.json     one answer for each request: see `answer`
"""

import json
import sys
from typing import Any

import torch
import transformers


def make(request: dict[str, Any]) -> None:
    """Writes a model with random weights: `make` are the settings of its config.json, `shard` the size of a file."""
    settings = dict(request["make"])
    config = transformers.AutoConfig.for_model(settings.pop("model_type"), **settings)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model = model.to(getattr(torch, request["dtype"]))  # the buffers of its positions lose precision: read it again
    model.save_pretrained(request["folder"], max_shard_size=request["shard"])


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """For a folder (and an adapter): logits of `ids`, the greedy tokens after them, and the ids of texts."""
    folder = request["folder"]
    if request.get("make"):
        make(request)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    if request.get("adapter"):
        import peft

        model = peft.PeftModel.from_pretrained(model, request["adapter"]).eval()
    result: dict[str, Any] = {"class": type(model).__name__, "tied": model.config.tie_word_embeddings}
    with torch.no_grad():
        ids = torch.tensor([request["ids"]])
        result["logits"] = model(ids).logits[0].double().tolist()
        if request.get("greedy"):
            for _ in range(request["greedy"]):
                logits = model(ids).logits[0, -1]
                logits[request["never"]] = -torch.inf
                ids = torch.cat([ids, logits.argmax()[None, None]], dim=1)
            result["greedy"] = ids[0, len(request["ids"]) :].tolist()
    if request.get("texts"):
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        options = {"add_special_tokens": False, "split_special_tokens": True}
        result["texts"] = [tokenizer(text, **options).input_ids for text in request["texts"]]
        result["plain_call"] = tokenizer("Once </s>").input_ids
        result["decoded"] = tokenizer.decode(tokenizer("Once  upon").input_ids, skip_special_tokens=True)
    return result


def main() -> None:
    with open(sys.argv[1], encoding="utf-8") as file:
        requests = json.load(file)
    answers = {"version": transformers.__version__, "answers": [answer(request) for request in requests]}
    with open(sys.argv[2], "w", encoding="utf-8") as file:
        json.dump(answers, file)


if __name__ == "__main__":
    main()
