"""The tasks that can be named, with one line each; light, so that `qeval tasks` answers at once."""

MMLU = "mmlu"
HUB = "hub"
"""What stands for MMLU's folder where its questions come from the hub."""

TASKS = {
    "kl": "KL-divergence of every next-token distribution from the baseline's, with top-1 agreement, over a corpus",
    "ppl": "perplexity over the same windows (the same pass gives both)",
    "drift": "greedy continuations of the baseline: where each variant would leave them, and what that tells",
    "needle": "codes hidden in long texts: the forced answer's log-probability and rank, by depth and length",
    "mmlu": "MMLU, lm-evaluation-harness's task and prompts: from the hub, --mmlu-dir FOLDER, or a sample (--offline)",
    "any other": "a multiple-choice task of lm-evaluation-harness, such as hellaswag or arc_easy (from the hub)",
}
