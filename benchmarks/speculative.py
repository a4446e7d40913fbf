"""Speculative decoding against plain decoding with the target: tokens per target call, and time.

Both give the same number of tokens for the same prompts, one prompt at a time. Greedy tokens are compared
before anything is timed. ``bound`` is what theory gives at the acceptance that was seen, the proposals per
block and the cost of a draft's step that was measured here: tau(alpha, gamma) / (gamma * c + 1).

Without --target it takes stories260k from LIMBECK_DATA and, as the draft, some of its own layers as they are.
With --target DIR --draft DIR any two folders (or GGUF files) of models that share a tokenizer, and --texts a
text (.txt or .txt.gz) whose paragraphs begin the prompts, or JSON lines (.jsonl or .jsonl.gz) whose --field
is a whole prompt; of these the test lines are taken, where lines say of which split they are.
"""

from __future__ import annotations

import copy
import gzip
import json
import os
import tempfile
from argparse import ArgumentParser, Namespace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from side_by_side import HERE, in_turn, medians, ratio, write

from limbeck.metrics.speculative import speedup
from limbeck.nets.causal_lm import keep_layers, spread
from limbeck.nets.generation import Sampling, generate
from limbeck.nets.language_models import load_model, load_tokenizer
from limbeck.nets.speculative import Speculated, speculate, summary
from limbeck.nets.tiny_stories import story_folder

STORIES = ("stories260k.config.json", "stories260k.safetensors", "stories260k.tok512.json")
Prompts = list[list[int]]


def options() -> ArgumentParser:
    """What can be asked for."""
    parser = ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--target", help="folder or GGUF file of the target (stories260k)")
    parser.add_argument("--draft", help="folder or GGUF file of the draft (some layers of the target)")
    parser.add_argument("--layers", type=int, default=2, help="layers of a draft cut from the target (2)")
    parser.add_argument("--texts", type=Path, help="text with the prompts (tinystories_sample.txt.gz)")
    parser.add_argument("--field", default="question", help="field of JSON lines with the prompt (question)")
    parser.add_argument("--prompts", type=int, default=8, help="how many (8)")
    parser.add_argument("--prompt-tokens", type=int, default=16, help="their length (16)")
    parser.add_argument("--tokens", type=int, default=64, help="tokens to give for each (64)")
    parser.add_argument("--gamma", type=int, nargs="+", default=[2, 4], help="proposals per block (2 4)")
    parser.add_argument("--temperature", type=float, nargs="+", default=[0.0, 1.0], help="(0 1)")
    parser.add_argument("--repeats", type=int, default=3, help="timed rounds (3)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (1)")
    parser.add_argument("--out", type=Path, default=HERE / "speculative.json", help="the JSON file to write")
    return parser


def models(given: Namespace) -> tuple[Any, Any, Any, dict[str, str]]:
    """Target, draft, tokenizer, and what the two are."""
    if given.target:
        target, tokenizer = load_model(given.target), load_tokenizer(given.target)
    else:
        with tempfile.TemporaryDirectory() as folder:
            config, weights, pieces = (data() / name for name in STORIES)
            made = str(story_folder(config, weights, pieces, Path(folder)))
            target, tokenizer = load_model(made), load_tokenizer(made)
    if given.draft:
        draft = load_model(given.draft)
    else:
        draft = copy.deepcopy(target)
        keep_layers(draft, spread(given.layers, target.config.num_hidden_layers))
    return target, draft, tokenizer, {"target": described(target), "draft": described(draft)}


def described(model: Any) -> str:
    """Size of a model in words."""
    return f"{model.num_parameters() / 1e6:.2f} M, {model.config.num_hidden_layers} layers"


def data() -> Path:
    """The folder that ``LIMBECK_DATA`` names."""
    return Path(os.environ["LIMBECK_DATA"])


def openings(given: Namespace, tokenizer: Any) -> Prompts:
    """The first tokens of the first paragraphs that are long enough, or the first whole prompts."""
    file = given.texts or data() / "tinystories_sample.txt.gz"
    text = (gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()).decode("utf-8")
    lines = [line for line in text.split("\n") if line.strip()]
    if ".jsonl" in file.suffixes:
        entries = [entry for entry in map(json.loads, lines) if entry.get("split", "test") == "test"]
        return [tokenizer(entry[given.field]).input_ids for entry in entries[: given.prompts]]
    begun = (tokenizer(line).input_ids[: given.prompt_tokens] for line in lines)
    long_enough = (ids for ids in begun if len(ids) == given.prompt_tokens)
    return [next(long_enough) for _ in range(given.prompts)]


def measure(
    target: Any, draft: Any, prompts: Prompts, gamma: int, heat: float, given: Namespace
) -> dict[str, Any]:
    """One row: the same texts by the target alone, with the draft, and by the draft alone."""
    ways: dict[str, Any] = {"max_new_tokens": given.tokens, "sampling": Sampling(temperature=heat)}
    seen: list[list[Speculated]] = []

    def alone(model: Any) -> list[list[int]]:
        return generate(model, prompts, **ways, generator=torch.Generator().manual_seed(0), batch_size=1)

    def together() -> None:
        generator = torch.Generator().manual_seed(len(seen))
        seen.append(speculate(draft, target, prompts, gamma=gamma, **ways, generator=generator))

    sides: dict[str, Any] = {
        "plain": lambda: alone(target), "speculative": together, "draft": lambda: alone(draft)
    }  # fmt: skip
    if not heat:
        together()
        assert [one.tokens for one in seen.pop()] == alone(target), "the greedy tokens differ"
        sides["transformers"] = lambda: theirs(target, prompts, given.tokens)
    times = in_turn(sides, given.repeats, warmup=1)
    figures = summary([one for results in seen for one in results])
    cost = median(times["draft"]) / median(times["plain"])
    return {
        "gamma": gamma, "temperature": heat,
        "faster": ratio(times, "plain", "speculative"),
        "bound": round(speedup(figures["acceptance"], gamma, cost), 3),
        "acceptance": round(figures["acceptance"], 4),
        "tokens_per_target_call": round(figures["tokens_per_target_call"], 3),
        "cost_of_a_draft_step": round(cost, 3),
        "tokens": len(prompts) * given.tokens, "ms": medians(times),
    }  # fmt: skip


def theirs(model: Any, prompts: Prompts, count: int) -> None:
    """The plain greedy texts by transformers' own loop."""
    for prompt in prompts:
        ids = torch.tensor([prompt])
        model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, pad_token_id=0,
            min_new_tokens=count, max_new_tokens=count,
        )  # fmt: skip


def main() -> None:
    """Measure every pair of a block length and a temperature."""
    given = options().parse_args()
    torch.set_num_threads(given.threads)
    target, draft, tokenizer, said = models(given)
    prompts = openings(given, tokenizer)
    figures = [
        said | measure(target, draft, prompts, gamma, heat, given)
        for heat in given.temperature
        for gamma in given.gamma
    ]
    write(given.out, given.repeats, figures)


if __name__ == "__main__":
    main()
