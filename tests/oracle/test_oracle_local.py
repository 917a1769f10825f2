"""Greedy output of our model in one process is token-identical to transformers', for every configuration."""

from pathlib import Path

import pytest
import torch

from tests.oracle.configs import CONFIGS, OracleConfig
from tests.oracle.local_model import LocalModel
from tests.oracle.reference import Reference, build_checkpoint, compare

NUM_TOKENS = 32
PROMPT_LENGTHS = (7, 70)


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.name)
def test_greedy_tokens_equal_those_of_transformers(config: OracleConfig, tmp_path: Path) -> None:
    torch.set_num_threads(1)
    directory = build_checkpoint(tmp_path / "model", config)
    reference = Reference(directory, tmp_path / "fp32")
    ours = LocalModel(directory)
    generator = torch.Generator().manual_seed(5)
    runs = []
    for length in PROMPT_LENGTHS:
        prompt = torch.randint(0, ours.config.vocab_size, (length,), generator=generator).tolist()
        run = reference.generate(prompt, NUM_TOKENS)
        verdict = compare(run, ours.generate(prompt, NUM_TOKENS))
        assert verdict.good, f"token {verdict.first_difference} differs: {run}"
        assert len(set(run.tokens)) >= 10, f"a dull checkpoint: {run.tokens}"
        runs.append(run)
    for rows, theirs in zip(ours.expert_rows.values(), reference.expert_rows.values(), strict=True):
        assert rows == theirs.tolist()
    for run in runs:  # what it is asked in one pass is what it says step by step
        assert compare(reference.choices(run.prompt, run.tokens), run.tokens).good
        wrong = [*run.tokens[:9], (run.tokens[9] + 1) % ours.config.vocab_size, *run.tokens[10:]]
        assert compare(reference.choices(run.prompt, wrong), wrong).first_difference == 9
