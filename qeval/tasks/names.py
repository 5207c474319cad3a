"""The tasks that can be named, with one line each; light, so that `qeval tasks` answers at once."""

MMLU = "mmlu"
REASONING, GRAMMAR = "reasoning", "grammar"
TRACE_TASKS = (REASONING, GRAMMAR)
"""The tasks along text that is forced on every model."""
HUB = "hub"
"""What stands for MMLU's folder where its questions come from the hub."""

TASKS = {
    "kl": "KL-divergence of every next-token distribution from the baseline's, with top-1 agreement, over a corpus",
    "ppl": "perplexity over the same windows (the same pass gives both)",
    "drift": "greedy continuations of the baseline: where each variant would leave them, and what that tells",
    "needle": "codes hidden in long texts: the forced answer's log-probability and rank, by depth and length",
    "reasoning": "the baseline's chains of thought, forced: KL, the right answer behind them, stopping and doubt",
    "grammar": "calls of functions that the baseline samples: the probability that a model leaves the tools' schemas",
    "mmlu": "MMLU, lm-evaluation-harness's task and prompts: from the hub, --mmlu-dir FOLDER, or a sample (--offline)",
    "any other": "a task of lm-evaluation-harness, such as hellaswag, gsm8k or lambada_openai (from the hub)",
    "FILE.yaml": "a task in lm-evaluation-harness's form that runs no code",
}
