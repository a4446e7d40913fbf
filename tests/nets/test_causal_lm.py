"""Causal language models of many families: their logits taken apart, their rows packed, cut and saved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.nets.small_transformers import VOCABULARY, ids, llama, spread
from torch import Tensor

from limbeck.contracts import Batch, Spec
from limbeck.data.tokens import Rows, batch_of
from limbeck.errors import ConfigError, ShapeError
from limbeck.nets import causal_lm
from limbeck.nets.causal_lm import CausalLM, adapted, check_packing, keep_layers, places
from limbeck.nets.causal_lm import spread as evenly
from limbeck.nets.language_models import load_form, load_model
from limbeck.students.causal_lm import CausalLMStudent
from limbeck.teachers.causal_lm import CausalLMTeacher

SPEC = Spec(classes=VOCABULARY, channels=0, size=12)
SEGMENTS = torch.tensor([[0] * 5 + [1] + [2] * 6, [0] * 12])


def gpt(kind: str = "GPT2", **fields: Any) -> Any:
    """A causal language model that names its sizes as GPT-2 does."""
    import transformers

    config = getattr(transformers, f"{kind}Config")(
        **{"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, **fields}
    )
    return spread(getattr(transformers, f"{kind}{'LMHead' * (kind == 'GPT2')}Model")(config))


FAMILIES: dict[str, Any] = {
    "llama": llama,
    "llama tied": lambda: llama(tie_word_embeddings=True),
    "gpt2": gpt,
    "gemma2, soft cap": lambda: llama("Gemma2", sliding_window=4, final_logit_softcapping=3.0),
    "granite, logits / 8": lambda: llama("Granite", logits_scaling=8.0),
    "cohere, logits x 1/16": lambda: llama("Cohere", logit_scale=0.0625),
    "mistral, sliding window": lambda: llama("Mistral", sliding_window=3),
    "qwen2, tied": lambda: llama("Qwen2", tie_word_embeddings=True),
}
family = pytest.mark.parametrize("network", [pytest.param(make, id=name) for name, make in FAMILIES.items()])


def batch(*segments: Tensor) -> Batch:
    said = torch.where(torch.arange(12) % 3 > 0, ids(1, 2, 12), -100)
    rows = Rows("made up", ids(0, 2, 12), said, *(segments or (None,)), torch.zeros(2), ("all",))
    return batch_of(rows, torch.arange(2))


@torch.no_grad()
@family
def test_it_answers_for_the_counted_tokens_as_its_own_forward(network: Any) -> None:
    model = network()
    net = CausalLM(model).eval()
    given = batch()
    outputs = net(given, taps=("lm_head",))
    own = model(input_ids=given.inputs).logits
    assert outputs.hidden is not None and outputs.unembedding is not None
    torch.testing.assert_close(outputs.logits, given.counted(own), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(outputs.unembedding.logits(outputs.hidden), outputs.logits)
    assert len(outputs.hidden) == len(given.labels) == 16
    net.projects = False
    short = net(given)
    assert short.logits.shape == (16, 0)
    assert torch.equal(short.hidden, outputs.hidden)


@torch.no_grad()
@family
def test_documents_in_one_row_are_read_apart(network: Any) -> None:
    net = CausalLM(network()).eval()
    check_packing(net)
    whole = net.hidden(ids(0, 2, 12), SEGMENTS)
    parts = [net.hidden(ids(0, 2, 12)[:1, a:b]) for a, b in ((0, 5), (5, 6), (6, 12))]
    torch.testing.assert_close(whole[:1], torch.cat(parts, 1), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(whole[1:], net.hidden(ids(0, 2, 12)[1:]), rtol=1e-4, atol=1e-4)


def test_places_begin_anew_with_each_document() -> None:
    assert places(SEGMENTS).tolist() == [[0, 1, 2, 3, 4, 0, 0, 1, 2, 3, 4, 5], list(range(12))]


def test_models_that_cannot_be_packed_are_refused() -> None:
    import transformers

    bloom = transformers.BloomConfig(vocab_size=VOCABULARY, hidden_size=32, n_layer=2, n_head=2)
    mamba = transformers.MambaConfig(vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, state_size=4)
    for config in (bloom, mamba):
        net = CausalLM(spread(transformers.AutoModelForCausalLM.from_config(config)))
        with pytest.raises(
            ShapeError, match=r"cannot tell documents in one row apart: set data\.pack to false"
        ):
            check_packing(net)


def test_a_model_whose_head_does_more_is_refused() -> None:
    model = llama()
    head = model.forward

    def more(*given: Any, **named: Any) -> Any:
        out = head(*given, **named)
        out.logits = 1.5 * out.logits
        return out

    model.forward = more
    with pytest.raises(
        ShapeError, match="LlamaForCausalLM does more to its last hidden states than its output"
    ):
        CausalLM(model)
    assert not model.training


def test_the_check_leaves_a_model_in_the_mode_it_was() -> None:
    model = llama().train()
    check_packing(CausalLM(model))
    assert model.training


# Some of the layers


@torch.no_grad()
@pytest.mark.parametrize("kind", ["Llama", "Gemma2", "Qwen3", "SmolLM3"])
def test_some_layers_make_a_model_that_is_saved_and_loaded(kind: str, tmp_path: Path) -> None:
    extra = {"SmolLM3": {"pad_token_id": 0, "no_rope_layers": [1, 0, 1, 0]}, "Gemma2": {"sliding_window": 4}}
    model = llama(kind, **extra.get(kind, {}))
    rows = ids(0, 2, 12)
    kept = [model.model.layers[place] for place in (0, 3)]
    keep_layers(model, (0, 3))
    assert list(model.model.layers) == kept
    assert model.config.num_hidden_layers == 2
    own = CausalLM(model).eval()
    own.save(tmp_path)
    again: Any = load_model(str(tmp_path))
    assert torch.equal(again(input_ids=rows).logits, model(input_ids=rows).logits)
    longer = model.generate(rows[:, :4], max_new_tokens=6, do_sample=False)  # each layer's cache is its own
    assert torch.equal(
        longer, again.generate(rows[:, :4], max_new_tokens=6, do_sample=False, use_cache=False)
    )


def test_layers_that_cannot_be_kept() -> None:
    for kept in ((), (1, 0), (0, 0), (0, 4), (-1, 2)):
        with pytest.raises(ConfigError, match="must be rising numbers from 0 to 3"):
            keep_layers(llama(), kept)
    with pytest.raises(
        ShapeError, match=r"GPT2LMHeadModel keeps its layers elsewhere than in base_model\.layers"
    ):
        keep_layers(gpt(), (0,))
    for count in (0, 5):
        with pytest.raises(ConfigError, match=f"layers is {count} but the model has 4: allowed are 1 to 4"):
            evenly(count, 4)


def test_layers_are_evenly_spaced() -> None:
    assert [evenly(count, 10) for count in (1, 2, 4, 10)] == [(0,), (0, 9), (0, 3, 6, 9), tuple(range(10))]
    for total in range(2, 33):
        for count in range(2, total + 1):
            chosen = evenly(count, total)
            assert (len(set(chosen)), chosen[0], chosen[-1]) == (count, 0, total - 1)


# Low-rank adapters


def test_adapters_alone_learn_and_are_merged_when_saved(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    torch.manual_seed(0)
    net = adapted(llama(tie_word_embeddings=True), {"r": 4, "lora_alpha": 8})
    learning = {name for name, p in net.named_parameters() if p.requires_grad}
    assert learning and all("lora_" in name for name in learning)
    given = batch()
    before = net.eval()(given).logits.detach()
    optimizer = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        net(given).logits.square().mean().backward()
        optimizer.step()
    learnt = net(given).logits.detach()
    assert not torch.allclose(before, learnt, atol=1e-3)
    model: Any = net.network
    model.generation_config.update(eos_token_id=[2, 5], do_sample=True, temperature=0.7)
    net.save(tmp_path)
    assert torch.equal(net(given).logits, learnt), "saving changes nothing"
    again = load_model(str(tmp_path))
    assert not any("lora" in name for name, _ in again.named_parameters())
    says: Any = again.generation_config
    assert (says.eos_token_id, says.do_sample, says.temperature) == ([2, 5], True, 0.7)
    torch.testing.assert_close(CausalLM(again)(given).logits.detach(), learnt, rtol=1e-4, atol=1e-4)


def test_adapters_that_peft_refuses() -> None:
    pytest.importorskip("peft")
    biased = {"lora_bias": True, "target_modules": ["q_proj"]}  # of a layer that has none
    for settings in ({"ranks": 3}, {"r": 0}, {"target_modules": ["nowhere"]}, biased):
        with pytest.raises(ConfigError, match=r"lora is \{.*which peft refuses: ") as error:
            adapted(llama(), settings)
        assert "\n" not in str(error.value)


# By name


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    place = tmp_path_factory.mktemp("models") / "llama"
    llama().save_pretrained(place)
    return str(place)


def build(choice: Any, seed: int = 0, spec: Spec = SPEC) -> Any:
    return choice.build(spec, torch.Generator().manual_seed(seed))


def test_students_whole_cut_and_fresh(folder: str) -> None:
    given = batch()
    whole = build(CausalLMStudent(model=folder))
    torch.testing.assert_close(whole.eval()(given).logits, CausalLM(llama())(given).logits)
    assert torch.equal(
        build(CausalLMStudent(model=folder, layers=4)).eval()(given).logits, whole(given).logits
    )
    assert len(build(CausalLMStudent(model=folder, layers=2)).network.model.layers) == 2
    assert len(build(CausalLMStudent(model=folder, layers=(1,))).network.model.layers) == 1
    fresh = CausalLMStudent(model=folder, pretrained=False)
    one, same, other = (build(fresh, seed).eval()(given).logits for seed in (0, 0, 1))
    assert torch.equal(one, same) and not torch.allclose(one, other)
    assert not torch.allclose(one, whole(given).logits)


def test_half_precision(folder: str) -> None:
    teacher = build(CausalLMTeacher(model=folder, dtype="bfloat16"))
    assert {p.dtype for p in teacher.parameters()} == {torch.bfloat16}
    exact = build(CausalLMTeacher(model=folder))(batch()).logits
    gap = (teacher(batch()).logits.float() - exact).abs().max() / exact.abs().max()
    assert 0 < gap < 0.1
    for choice in (CausalLMTeacher, CausalLMStudent):
        with pytest.raises(ConfigError, match=r"unknown dtype 'float8'.*choose from"):
            choice(model=folder, dtype="float8")


@pytest.mark.parametrize("choice", [CausalLMStudent, CausalLMTeacher])
def test_what_does_not_fit_is_known_without_weights(
    choice: Any, folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    who = "student" if choice is CausalLMStudent else "teacher"
    monkeypatch.setattr(causal_lm.CausalLM, "__init__", None)
    for spec, message in (
        (
            Spec(classes=51, size=8),
            f"the {who} has 50 tokens but the tokenizer 51: name the tokenizer of the {who}",
        ),
        (
            Spec(classes=50, size=65),
            f"data.length is 65 but the {who} reads at most 64 tokens: set data.length to 64",
        ),
    ):
        with pytest.raises(ConfigError, match=message):
            choice(model=folder).check(spec)
        with pytest.raises(ConfigError, match=message):
            build(choice(model=folder), spec=spec)
    choice(model=folder).check(SPEC)
    if choice is CausalLMStudent:
        for layers, message in (
            (5, "layers is 5 but the model has 4"),
            ((4,), "must be rising numbers from 0 to 3"),
        ):
            with pytest.raises(ConfigError, match=message):
                choice(model=folder, layers=layers).check(SPEC)


def test_models_that_cannot_be_had(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    place = tmp_path / "model"
    llama().save_pretrained(place)
    weights = place / "model.safetensors"
    state = load_file(weights)

    def refused(message: str, load: Any = load_model, name: str = str(place)) -> None:
        with pytest.raises(ConfigError, match=message) as error:
            load(name)
        assert "\n" not in str(error.value)

    refused(r"cannot load language model 'no/where' from the Hugging Face hub", name="no/where")
    save_file({k: v for k, v in state.items() if k != "lm_head.weight"}, weights, {"format": "pt"})
    refused(r"from the folder \(it lacks the weights lm_head\.weight\): mend it, or name another")
    save_file({**state, "lm_head.weight": state["lm_head.weight"][:9].clone()}, weights, {"format": "pt"})
    refused("cannot load language model .* from the folder")
    weights.write_bytes(b"no weights")
    refused("cannot load language model .* from the folder")
    weights.unlink()
    refused("cannot load language model .* from the folder")
    assert load_form(str(place)).vocab_size == VOCABULARY
    (place / "config.json").write_text('{"model_type": "clip"}')
    refused("clip is no causal language model", load_form)
    (place / "config.json").write_text("{")
    refused("cannot load language model .* from the folder", load_form)


@pytest.mark.parametrize(("tied", "name"), [(True, "embed_tokens"), (True, "lm_head"), (False, "lm_head")])
def test_adapters_on_the_weight_behind_the_logits_are_refused(tied: bool, name: str) -> None:
    pytest.importorskip("peft")
    with pytest.raises(ConfigError, match=r"names an embedding.*or name it in lora\.modules_to_save"):
        adapted(llama(tie_word_embeddings=tied), {"target_modules": ["q_proj", name]})
    adapted(llama(tie_word_embeddings=tied), {"target_modules": ["q_proj"], "modules_to_save": [name]})
    adapted(llama(tie_word_embeddings=False), {"target_modules": ["q_proj", "embed_tokens"]})
