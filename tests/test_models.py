"""Models that others bring: their tokenizers, templates and architectures work or are refused."""

import re

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    ByT5Tokenizer,
    LlamaConfig,
    PreTrainedTokenizerFast,
)

import llm
from files import UserError
from tests.test_llm import GROUPED, TEXTS, other_tokenizer

INSTRUCTION = "Suggest {n}."
INTERESTS = ["the chess openings", "围棋 & tea"]
LISTED = "".join(f"\n- {interest}" for interest in INTERESTS)


def byte_level(template=None, special=("<|end|>",), post="", space=False, **named):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=space)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(TEXTS * 3, trainers.BpeTrainer(
        vocab_size=320, special_tokens=[*special], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    if post:
        tokenizer.post_processor = processors.TemplateProcessing(
            post, special_tokens=[(s, tokenizer.token_to_id(s)) for s in special if s in post])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, chat_template=template, **{"eos_token": "<|end|>", **named})


def unigram():
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    texts = [*TEXTS, LISTED, "[INST] [/INST] Suggest 5."]
    tokenizer.train_from_iterator(texts, trainers.UnigramTrainer(
        vocab_size=120, special_tokens=["</s>", "<unk>"], unk_token="<unk>", show_progress=False))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=TURN,
                                   eos_token="</s>", unk_token="<unk>")


TURN = "[INST] {{ messages[0]['content'] }} [/INST]"
LOOP = "{% for m in messages %}<{{ m.role }}>{{ m.content }}</>{% endfor %}"
TWO = ("<s>", "<|end|>")
TOKENIZERS = {
    "one special token for all": lambda: byte_level(
        bos_token="<|end|>", pad_token="<|end|>", unk_token="<|end|>"),
    "the end token in front": lambda: byte_level(post="<|end|> $A", bos_token="<|end|>"),
    "an end token behind": lambda: byte_level(None, TWO, "<s> $A <|end|>", bos_token="<s>"),
    "only behind": lambda: byte_level(post="$A <|end|>"),
    "a first token that is not called BOS": lambda: byte_level(None, TWO, "<s> $A"),
    "a space in front": lambda: byte_level(space=True),
    "a space in front, in a template": lambda: byte_level(TURN, space=True),
    "no generation prompt": lambda: byte_level(LOOP),
    "a system prompt by default": lambda: byte_level("<sys>Be kind.</>" + LOOP),
    "no system role": lambda: byte_level(
        "{% if messages[0].role == 'system' %}{{ raise_exception('no') }}{% endif %}" + LOOP),
    "content is stripped": lambda: byte_level(LOOP.replace("m.content", "m.content.strip()")),
    "pieces": lambda: other_tokenizer(pieces=True),
    "pieces of a base model": lambda: other_tokenizer(pieces=True, template=None),
    "unigram": unigram,
    "bytes, in Python": ByT5Tokenizer,
}


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_a_prompt_is_what_the_tokenizer_makes_of_the_whole_text(kind, tmp_path):
    TOKENIZERS[kind]().save_pretrained(tmp_path)
    tokenizer = llm.load_tokenizer(str(tmp_path))
    for instruction, text in ((INSTRUCTION, f"Suggest 5.{LISTED}"),
                              ("I asked:{interests}\n\nNow {n}.", f"I asked:{LISTED}\n\nNow 5.")):
        if tokenizer.chat_template:
            turn = [{"role": "user", "content": text}]
            whole = tokenizer.encode(
                tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True),
                add_special_tokens=False)
        else:  # an end token behind would end the prompt before it is answered
            whole = tokenizer.encode(text + "\n")
            whole = whole[:-1] if whole[-1] == tokenizer.eos_token_id else whole
        assert llm.encode_prompt(tokenizer, INTERESTS, 5, instruction, 400) == whole
    *ids, end = llm.encode_completion(tokenizer, INTERESTS)
    assert end == tokenizer.eos_token_id and end not in ids
    assert llm.parse_starters(tokenizer.decode(ids)).starters == tuple(INTERESTS)


PARTS = "{% for c in messages[0].content if c.type == 'text' %}{{ c.text }}{% endfor %}"


def test_a_template_of_parts_and_one_that_names_its_format(tmp_path):
    for template, text in ((f"[INST] {PARTS} [/INST]", f"[INST] Suggest 5.{LISTED} [/INST]"),
                           ("{{ strftime_now(format='%A, week %U, %-d') }}. " + TURN,
                            f"Friday, week 29, 26. [INST] Suggest 5.{LISTED} [/INST]")):
        ids = llm.encode_prompt(byte_level(template), INTERESTS, 5, INSTRUCTION, 400)
        assert byte_level().decode(ids) == text


@pytest.mark.parametrize("tokenizer, why", [
    (lambda: byte_level(eos_token=None), "has no end token"),
    (lambda: byte_level(eos_token="</new>"), "token '</new>' lies beyond its embedding of 100"),
    (lambda: byte_level("{{ messages[0].content }}" * 2), "does not hold the user's text once"),
    (lambda: byte_level("<assistant>"), "does not hold the user's text once"),
    (lambda: byte_level("{{ messages[0].content "), "TemplateSyntaxError"),
    (lambda: byte_level("{{ raise_exception('A system message') }}"), "A system message"),
])  # fmt: skip
def test_what_cannot_be_trained_is_refused_in_one_line_before_any_work(tokenizer, why, tmp_path):
    tokenizer().save_pretrained(tmp_path)
    LlamaConfig(vocab_size=100, max_position_embeddings=64).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=re.escape(why)) as refused:
        llm.check_model(str(tmp_path), length=64)
    assert str(refused.value).startswith(f"generator.model={tmp_path}: ")
    assert "name another model" in str(refused.value) and "\n" not in str(refused.value)


# ----------------------------------------------------------------------------------- architectures


def saved(folder, name, settings, kind=AutoModelForCausalLM) -> str:
    torch.manual_seed(0)
    kind.from_config(AutoConfig.for_model(name, **settings)).save_pretrained(folder)
    return str(folder)


ROUTED = GROUPED | {"pad_token_id": 0, "num_local_experts": 2}


@pytest.mark.parametrize("name, settings", [("mixtral", ROUTED), ("phimoe", ROUTED)])
def test_experts_train_also_where_their_router_is_a_linear_layer(name, settings, tmp_path):
    model = llm.add_lora(llm.load_generator(saved(tmp_path, name, settings)), 2, 4, seed=0)
    llm.completion_logps(model, [[1, 2, 3]], [[[4, 5], [6]]])[0].sum().backward()
    slopes = {n: p.grad for n, p in model.named_parameters() if "lora_B" in n}
    assert slopes and all(slope is not None and slope.any() for slope in slopes.values())
    assert not any("router" in name for name in slopes)


def test_positions_that_hang_on_the_longest_text_are_refused_beyond_it(tmp_path):
    """LongRoPE: a row of tree rows would give its short texts the positions of the longest."""
    factors = {"short_factor": [1.0] * 4, "long_factor": [4.0] * 4}
    path = saved(tmp_path, "phi3", GROUPED | {
        "pad_token_id": 0, "max_position_embeddings": 64, "original_max_position_embeddings": 16,
        "rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4, **factors}})
    model = llm.load_generator(path)
    llm.check_tree_rows(model, 16)
    with pytest.raises(UserError, match="17 tokens outgrow its original_max_position_embeddings"):
        llm.completion_logps(model, [[1] * 16], [[[2]]])


def test_an_encoder_with_a_decoder_is_said_to_be_one(tmp_path):
    sizes = {"vocab_size": 320, "d_model": 32, "d_kv": 8, "num_layers": 1, "num_heads": 4}
    path = saved(tmp_path, "t5", sizes, AutoModelForSeq2SeqLM)
    with pytest.raises(UserError, match="no causal language model of text: name another model"):
        llm.load_generator(path)
