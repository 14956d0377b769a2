"""The generator: a causal LM with LoRA that writes lists of starters for lines of interests.

    python train.py --stage sit generator.model=Qwen/Qwen2.5-0.5B-Instruct
"""

# The rest of the project says `import llm; llm.sample(...)`, so that a test can replace a function
# in one place. Names that only a neighbour needs (decoder_and_head, tree_mask, Tree, Draw) stay in
# their modules. Imports inside the package go one way: model, prompts < logps < sampling.
from llm.logps import TreeRows, averaged_gradients, completion_logps, row_logps, tree_rows
from llm.model import (  # loading, LoRA, adapters
    add_lora,
    check_model,
    load_adapter,
    load_generator,
    load_tokenizer,
    merge_adapter,
    model_path,
    quiet_libraries,
    save_adapter,
)
from llm.prompts import (  # interests -> tokens, starters <-> `<sug>` field
    Parsed,
    clean_starter,
    encode_completion,
    encode_prompt,
    encode_text,
    format_starters,
    parse_starters,
    plain,
    prompt_text,
    user_turn,
)
from llm.sampling import Prefix, end_tokens, read_prefix, sample, sample_ids

__all__ = [
    "Parsed", "Prefix", "TreeRows", "add_lora", "averaged_gradients", "check_model",
    "clean_starter", "completion_logps", "encode_completion", "encode_prompt", "encode_text",
    "end_tokens", "format_starters", "load_adapter", "load_generator", "load_tokenizer",
    "merge_adapter", "model_path", "parse_starters", "plain", "prompt_text", "quiet_libraries",
    "read_prefix", "row_logps", "sample", "sample_ids", "save_adapter", "tree_rows", "user_turn"
]
