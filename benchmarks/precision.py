"""What bfloat16 costs: tree rows and single sequences in bf16 beside single sequences in fp32.

    python -m benchmarks.precision
"""

from __future__ import annotations

import torch

import llm
from benchmarks.common import prepare, report_lines, tokens
from benchmarks.dpo import policy


def one_at_a_time(model, prompts, lists) -> torch.Tensor:
    """Summed log-probabilities, each list in a sequence of its own."""
    sums = []
    for prompt, completions in zip(prompts, lists, strict=True):
        for ids in completions:
            logits = model(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1].float()
            sums.append(logits.log_softmax(-1).gather(1, torch.tensor(ids)[:, None]).sum())
    return torch.stack(sums)


def main() -> None:
    prepare()
    prompts, lists = [tokens(96), tokens(32)], [[tokens(32), tokens(24)], [tokens(16)]]
    results = {}
    for dtype in (torch.float32, torch.bfloat16):
        model = policy().to(dtype)
        for name in ("single sequences", "tree rows"):
            model.zero_grad()
            if name == "tree rows":
                logps = torch.cat(llm.completion_logps(model, prompts, lists))
            else:
                logps = one_at_a_time(model, prompts, lists)
            (logps[0] - logps[1] - logps[2]).backward()
            slopes = [p.grad.flatten().float() for p in model.parameters() if p.grad is not None]
            results[name, dtype] = logps.detach(), torch.cat(slopes)
    exact_logps, exact_slope = results["single sequences", torch.float32]
    lines = ["| | log-probability of a list, largest error | gradient, relative error |"]
    lines.append("|---|---|---|")
    for (name, dtype), (logps, slope) in list(results.items())[1:]:
        error = (logps - exact_logps).abs().max().item()
        relative = ((slope - exact_slope).norm() / exact_slope.norm()).item()
        name = f"{name}, {str(dtype).removeprefix('torch.')}"
        lines.append(f"| {name} | {error:.1e} of {exact_logps.abs().max():.0f} | {relative:.1e} |")
    text = "Beside single sequences in float32; lists of 16 to 32 tokens, the DPO rows' model."
    report_lines("Precision", text, lines)


if __name__ == "__main__":
    main()
