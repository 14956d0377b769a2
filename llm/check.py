"""Whether a model can be used here: what its files say is tried before any work, and whether it can
be trained on tree rows and sampled as a tree once, when it is loaded.

What adds distances in the row to its scores (ALiBi), carries a state from list to list, scales its
logits or attends in a way of its own would learn and draw from other numbers than its own, and
nothing would say so.
"""

import torch
from torch import Tensor

from files import UserError
from llm.logps import row_logps, tree_rows
from llm.model import check_length, load_config, load_tokenizer
from llm.prompts import Ids, encode_completion, user_turn
from llm.sampling import Tree

_checked: set[tuple[str, bool]] = set()  # (path, in 4 bit?) of what has passed
# How far rounding may part two ways to compute a token's log-probability, on average. SmolLM2, at
# 42 places of its vocabulary: 2e-5 in float32, also in 4 bit computed so; 0.09 in bfloat16.
ROUNDING = {torch.float32: 1e-3, torch.bfloat16: 0.3}


def check_model(path: str, revision: str = "", length: int = 0) -> None:
    """Raise UserError now, before hours of other work, if no such model reads `length` tokens."""
    config = load_config(path, revision)
    check_length(config, length)
    tokenizer = load_tokenizer(path, revision)
    before, after = user_turn(tokenizer)
    last = max(before + after + encode_completion(tokenizer, ["a"]))
    if last >= (size := config.get_text_config().vocab_size):  # was added; the weights never grew
        raise UserError(f"generator.model={path}: token {tokenizer.convert_ids_to_tokens(last)!r} "
                        f"lies beyond its embedding of {size} tokens; name another model")


@torch.no_grad()
def check_tree_rows(model, length: int) -> None:
    """Raise UserError unless trees give the log-probabilities of one sequence at a time.

    Two lists of four tokens are scored and sampled, once for each path; length: of the longest
    prompt with a list, in tokens.
    """
    check_length(model.config, length)
    path = model.config.name_or_path
    key = path, getattr(model, "is_loaded_in_4bit", False)
    if key in _checked:
        return
    first = model.config.get_text_config().vocab_size // 2  # ordinary words, with any tokenizer
    ids = [*range(first, first + 12)]
    prompt, lists = ids[:4], [ids[4:8], ids[8:]]
    try:
        scored = row_logps(model, tree_rows([prompt], [lists]))  # (S,)
        rows = torch.tensor([prompt + tokens for tokens in lists], device=scored.device)
        alone = torch.cat([_logps(model(r[None], use_cache=False).logits[0, 3:-1], r[4:])
                           for r in rows])  # (S,)
        sampled = _sampled_logps(model, prompt, lists)
    except torch.OutOfMemoryError:  # explained where the stage is known (train.explained)
        raise
    except Exception as error:  # takes no such mask or no positions, in as many ways as there are
        reason = f"its decoder fails: {type(error).__name__}: {' '.join(str(error).split())[:150]}"
    else:
        error = (torch.stack([scored, sampled]) - alone).abs().mean(1).max().item()
        reason = f"log-probabilities differ by {error:.2g}, as with ALiBi, a state or scaled logits"
        if error < ROUNDING[model.dtype]:  # false if it is NaN
            _checked.add(key)
            return
    raise UserError(
        f"generator.model={path}: lists that share a prompt (a tree) cannot be scored or sampled "
        f"as one sequence at a time ({reason}); name another model")


def _sampled_logps(model, prompt: Ids, lists: list[Ids]) -> Tensor:
    """Log-probability of each token of the lists, (S,), as sampling sees it before it draws."""
    tree = Tree(model, [prompt], len(lists), len(lists[0]), pad=0)
    logps, tokens = [], torch.tensor(lists, device=tree.prompt.device)  # (C, T)
    for token in tokens.T:  # (C,)
        logps.append(_logps(tree.logits[0], token))
        tree.write(token[None])
        tree.step(torch.zeros_like(tree.token, dtype=torch.bool))
    return torch.stack(logps, 1).flatten()


def _logps(logits: Tensor, tokens: Tensor) -> Tensor:  # (T, V), (T,) -> (T,)
    return logits.float().log_softmax(-1).gather(1, tokens[:, None]).squeeze(1)
