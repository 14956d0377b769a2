"""The generator: a causal LM with LoRA that writes lists of starters for lines of interests.

    python train.py --stage sit generator.model=Qwen/Qwen2.5-0.5B-Instruct
"""
# ruff: noqa: F401, I001 - the public names, packed; none is used here

# The rest of the project says `import llm; llm.sample(...)`, so that a test can replace a function
# in one place. Names that only a neighbour needs (decoder_and_head, tree_mask, Tree, Draw) stay in
# their modules. Imports go one way: weights < model, markup < starters < prompts < logps < sampling
# < check.
from llm.check import check_model, check_tree_rows
from llm.logps import (  # tree rows
    TreeRows, averaged_gradients, completion_logps, last_hidden, row_logps, token_logps, tree_rows,
)
from llm.markup import after_reasoning
from llm.model import (  # loading, LoRA, adapters
    adapter_weights, add_lora, dtype_of, load_adapter, load_generator, load_tokenizer,
    merge_adapter, model_path, other_adapter, settle_libraries, save_adapter, whole_adapter,
)
from llm.prompts import (  # interests and starters -> tokens
    around_interests, encode_completion, encode_conversation, encode_prompt, encode_text,
    prompt_text, user_turn,
)
from llm.sampling import Prefix, end_tokens, read_prefix, sample, sample_ids
from llm.starters import (  # starters <-> `<sug>` field, and lists of any model
    clean_starter, format_starters, parse_starters, plain,
)
