"""The gate by hand: what passes, what does not, and what cannot be compared."""

import numpy as np
import pyarrow as pa
import pytest

from spin.config import ScoreConfig
from spin.errors import SpinError
from spin.gate import Decision, decide, differences, other_weights, policy
from spin.presets import preset, resolve
from spin.stats import bootstrap

SCORING = ScoreConfig(scorers=("clip_score", "aesthetic"))


def scores(split: str = "test", prompts: int = 40, samples: int = 2, **metrics: float) -> pa.Table:
    """Return a table in which every metric varies from prompt to prompt around the given mean."""
    rows = [
        {"id": f"p{prompt}", "prompt": f"colour {prompt}", "split": split, "sample": sample}
        | {name: mean + prompt % 5 - 2 + 0.1 * sample for name, mean in metrics.items()}
        for prompt in range(prompts)
        for sample in range(samples)
    ]
    return pa.Table.from_pylist(rows)


def judged(ours: pa.Table, theirs: pa.Table, **options: object) -> Decision:
    return decide(policy(options, SCORING), "clip_score", ours, theirs, "the base")


def test_a_better_player_passes() -> None:
    decision = judged(scores(clip_score=11.0), scores(clip_score=10.0))
    assert decision.outcome == "passed"
    gain, share = decision.findings
    # Every image is better by 1 exactly, so the interval has no width.
    assert (gain.name, gain.above) == ("clip_score", 0.0)
    assert [gain.value, gain.low, gain.high] == pytest.approx([1, 1, 1])
    assert (share.name, share.value, share.above) == ("win_rate", 1.0, 0.5)
    assert decision.reason == (
        "against the base: clip_score 1.000 [1.000, 1.000], above 0.000; win_rate 1.000 [1.000, 1.000], above 0.500"
    )


def test_an_equal_player_fails() -> None:
    decision = judged(scores(clip_score=10.0), scores(clip_score=10.0))
    assert decision.outcome == "failed"
    assert "clip_score 0.000 [0.000, 0.000], not surely above 0.000" in decision.reason
    assert "win_rate 0.500 [0.500, 0.500], not surely above 0.500" in decision.reason


def test_by_how_much() -> None:
    ours, theirs = scores(clip_score=11.0), scores(clip_score=10.0)
    assert judged(ours, theirs, better={"clip_score": 0.9}).outcome == "passed"
    assert judged(ours, theirs, better={"clip_score": 1.1}).outcome == "failed"


def test_nothing_may_become_worse() -> None:
    ours, theirs = scores(clip_score=11.0, aesthetic=0.85), scores(clip_score=10.0, aesthetic=0.9)
    assert judged(ours, theirs, not_worse={"aesthetic": 0.1}).outcome == "passed"
    decision = judged(ours, theirs, not_worse={"aesthetic": 0.01})
    assert decision.outcome == "failed"
    assert [finding.passed for finding in decision.findings] == [True, False, True]


def test_the_interval_is_over_prompts_and_has_the_confidence_asked_for() -> None:
    random = np.random.default_rng(0)
    gains = random.normal(0.5, 2.0, size=60)
    theirs = scores(prompts=60, samples=1, clip_score=10.0)
    ours = theirs.set_column(4, "clip_score", pa.array(theirs["clip_score"].to_numpy() + gains))
    (found,) = judged(ours, theirs, confidence=0.8, win_rate=0).findings
    # Prompts are ordered by their id, as text.
    order = sorted(range(60), key=lambda prompt: f"p{prompt}")
    wanted = bootstrap(gains[order], 2000, confidence=0.8)
    assert [found.value, found.low, found.high] == pytest.approx([wanted.value, wanted.low, wanted.high])
    (wider,) = judged(ours, theirs, confidence=0.99, win_rate=0).findings
    assert wider.low < found.low < found.high < wider.high


def test_more_images_of_a_prompt_do_not_narrow_the_interval() -> None:
    ours, theirs = scores(samples=1, clip_score=11.0), scores(samples=1, clip_score=10.0)
    noisy = ours.set_column(4, "clip_score", pa.array(ours["clip_score"].to_numpy() + np.arange(40) % 7))
    one = judged(noisy, theirs).findings[0]
    twice = [table.append_column("copy", table["sample"]) for table in (noisy, theirs)]
    doubled = [
        pa.concat_tables([table.drop("copy"), table.drop("copy").set_column(3, "sample", pa.array([1] * 40))])
        for table in twice
    ]
    assert judged(*doubled).findings[0] == one


def test_rows_are_paired_by_prompt_and_seed_in_any_order() -> None:
    ours, theirs = scores(clip_score=11.0), scores(clip_score=10.0)
    shuffled = theirs.take(pa.array(np.random.default_rng(0).permutation(len(theirs))))
    assert judged(ours, shuffled) == judged(ours, theirs)


def test_the_other_split_has_no_part_in_it() -> None:
    ours = pa.concat_tables([scores(clip_score=11.0), scores("validation", clip_score=5.0)])
    theirs = pa.concat_tables([scores(clip_score=10.0), scores("validation", clip_score=10.0)])
    assert judged(ours, theirs).outcome == "passed"
    assert judged(ours, theirs, split="validation").outcome == "failed"


def test_too_few_prompts_prove_nothing() -> None:
    decision = judged(scores(prompts=19, clip_score=50.0), scores(clip_score=10.0))
    assert decision.outcome == "incomparable"
    assert decision.reason == "19 test prompts in common with the base, the gate asks for 20 or more"


def test_a_rival_without_the_score_cannot_be_compared() -> None:
    ours = scores(clip_score=11.0, aesthetic=0.9)
    decision = judged(ours, scores(clip_score=10.0), not_worse={"aesthetic": 0.1})
    assert decision.outcome == "incomparable"
    assert decision.reason == "the base has no scores by aesthetic, which the gate asks for"
    assert judged(ours, scores(clip_score=10.0)).outcome == "passed"


def test_what_makes_two_runs_incomparable_is_named() -> None:
    ours = preset("emoji-cpu")
    assert differences(ours, ours) == []
    same = {"train": {"seed": 5}, "generate": {"seed": 3, "batch_size": 7}, "score": {"bootstrap": 7, "max_prompts": 3}}
    assert differences(ours, resolve("emoji-cpu", "", "", same)) == []
    other = {"generate": {"guidance_interval": [0, 0.5]}, "score": {"seed": 1, "template": "a {prompt}"}}
    names = ["generate.guidance_interval", "score.seed", "score.template"]
    assert differences(ours, resolve("emoji-cpu", "", "", other)) == names
    assert other_weights({"clip_score": "a", "hpsv2_0": "b"}, {"clip_score": "c", "pickscore": "d"}) == [
        "judge (clip_score)"
    ]
    assert other_weights({"clip_score": "a"}, {"clip_score": "a", "hpsv2_0": "b"}) == []


def test_nan_never_passes() -> None:
    assert judged(scores(clip_score=float("nan")), scores(clip_score=10.0)).outcome == "failed"


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"beter": {}}, "expected a known option of the gate, got 'beter'; did you mean 'better'?"),
        ({"confidence": 2}, "expected confidence to be less than 1, got 2 (in gate)"),
        ({"better": {"clip_score": -1}}, "expected better.clip_score to be greater than or equal to 0, got -1"),
        ({"promote": "always"}, "expected promote to be 'recommend' or 'automatic', got 'always' (in gate)"),
        ({"better": 3}, "expected better to be a valid dictionary, got 3 (in gate)"),
        ({"better": {"clip": 0}}, "expected a score that the run has, got 'clip' (in gate); did you mean"),
        ({"not_worse": {"hpsv2_0": 0}}, "expected a score that the run has, got 'hpsv2_0' (in gate); known: aesthetic"),
    ],
)
def test_a_wrong_policy_is_told(options: dict[str, object], line: str) -> None:
    with pytest.raises(SpinError) as refused:
        policy(options, SCORING)
    assert str(refused.value).startswith(line)


def test_the_first_scorer_is_what_the_gate_asks_for() -> None:
    ours, theirs = scores(clip_score=11.0, aesthetic=5.0), scores(clip_score=10.0, aesthetic=6.0)
    for first, second, outcome in (("clip_score", "aesthetic", "passed"), ("aesthetic", "clip_score", "failed")):
        scoring = ScoreConfig(scorers=(first, second))
        decision = decide(policy({}, scoring), scoring.primary, ours, theirs, "the base")
        assert (decision.findings[0].name, decision.outcome) == (first, outcome)
        assert decision.findings[1].value == (outcome == "passed")
