"""What the training loops share: optimiser, one step, the best weights, a process's share.

The loops themselves stand in rid.py, ranker.py, sit.py, dpo.py, reward.py and rl.py.
"""

import ctypes
import gc
import itertools
import math
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch

from files import AGAIN, UserError, processes, read_tensors, share


def load_weights(module: torch.nn.Module, path: Path) -> None:
    """Take a file's weights, for use; raises UserError where they fit no such module."""
    tensors = read_tensors(path)
    try:
        module.load_state_dict(tensors)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{path}: weights of another shape ({reason}); {AGAIN}") from None
    module.eval()


class Best:
    """The weights with the highest value so far, and for how many values they have been that.

    Frozen weights do not change and are not copied; buffers (a count of averages) are.
    """

    def __init__(self, module: torch.nn.Module):
        self.module, self.value, self.waited, self.weights = module, -math.inf, 0, None

    def offer(self, value: float) -> None:
        """Keep the weights as they are now if their value is the highest; nan is the lowest."""
        if self.weights is None or value > self.value:
            self.weights = {name: w.detach().clone() for name, w in self._changing()}
            self.value, self.waited = value if value == value else -math.inf, 0  # nan != nan
        else:
            self.waited += 1

    @torch.no_grad()
    def restore(self) -> None:
        for name, weight in self._changing():
            weight.copy_(self.weights[name])  # in place: an optimiser keeps its tensors

    def _changing(self):
        trained = ((n, w) for n, w in self.module.named_parameters() if w.requires_grad)
        return itertools.chain(trained, self.module.named_buffers())


def new_optimiser(model, learning_rate: float, steps: int):
    """AdamW on the weights that are trained; a tenth of the steps warming up, then linear to zero.

    Its eps lies above the rounding noise of gradients (1e-9), which at the usual 1e-8 moves weights
    that nothing else moves, in a direction that depends on the order of a sum.
    """
    optimiser = torch.optim.AdamW(
        [w for w in model.parameters() if w.requires_grad],
        learning_rate,
        eps=1e-6,
        weight_decay=0.0,  # LoRA starts at zero and stays small
        fused=True,  # one kernel for all weights
    )
    warm = max(1, steps // 10)  # Adam's second moments are noise at first
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimiser, lambda i: min((i + 1) / warm, max(0.0, (steps - i) / max(1, steps - warm))))
    return optimiser, schedule


def step(model, optimiser, schedule, place: str = "", examples: Iterable = ()) -> None:
    """One step along the gradients that backward() has added up, which are then dropped.

    place: stage and step, and examples: names of its rows, for the UserError of refuse_nan.
    """
    # One list far from all others must not undo what the rest of a batch has learned.
    norm = torch.nn.utils.clip_grad_norm_([w for w in model.parameters() if w.requires_grad], 1.0)
    refuse_nan(norm, place, examples)
    optimiser.step()
    schedule.step()  # after the optimiser, whose rate was that of before
    optimiser.zero_grad()  # sets them to None: frozen weights never hold any


def refuse_nan(value: torch.Tensor, place: str, examples: Iterable) -> None:
    """Raise UserError, before the step is taken, where a loss or its gradient (of any shape: their
    norm) is no finite number."""
    if not value.isfinite():  # weights that are no numbers either cannot be trained again
        named = list(examples)
        rest = f" and {len(named) - 20} more" if len(named) > 20 else ""
        raise UserError(
            f"{place}: loss or gradient is no finite number, and the step was not taken; its "
            f"examples: {', '.join(map(str, named[:20]))}{rest}. Lower the learning rate, or leave "
            "them out")


def micro_batches(batch: list, size: int) -> Iterator[tuple[list, float]]:
    """A global batch in this process's parts of at most `size` rows (0: all at once), each with the
    factor of its loss.

    Gradients of the parts add up to that of the batch, in the memory of one part. DDP averages over
    processes, so a share of a sum counts as often as there are processes; one without a row
    computes one for nothing, as DDP waits for all. Two processes, size 1, rows a, b, c: the first
    has a (factor 2) and c (2), the second b (2) and c (0); averaged and added up: a + b + c.
    """
    count = processes()[1]
    width = size * count or len(batch)  # rows of all processes together
    for start in range(0, len(batch), width):
        rows = batch[start : start + width]
        part = share(rows)
        yield (part, float(count)) if part else (rows[:1], 0.0)  # 0: nothing of it counts


def return_memory() -> None:
    """Give back what has been freed; glibc keeps it, and the next peak comes on top."""
    gc.collect()  # models hold circles
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):  # other C libraries have none
        trim(0)
