"""Question benchmarks as their users meet them: files in, official numbers out, and words instead of traces when the files are wrong."""
import importlib
import json

import pytest

from arm.app.score import score
from arm.eval import choice, mmmu, vqa, yesno
from arm.eval.ask import in_order
from arm.eval.bench import BENCH, report

FILES = {"pope": ["pope/answers.jsonl", "pope/coco_pope_random.json"], "mme": ["mme"], "mmbench": ["mmbench/predictions.tsv", "mmbench/dataset.tsv"], "mmmu": ["mmmu/model"],
         "seed": ["seed/results.jsonl", "seed/SEED-Bench.json"], "vqav2": ["vqav2/results.json", "vqav2/annotations.json"], "gqa": ["gqa/predictions.json", "gqa/questions.json", "gqa/choices.json"]}
HEADLINES = {"pope": 10 / 14, "mme": 250., "mmbench": .25, "mmmu": 4 / 7, "seed": .5, "vqav2": 72.5, "gqa": 50.}
SCORERS = {name: scorer for module in (yesno, choice, mmmu, vqa) for name, scorer in module.SCORERS.items()}
EXAMS = {name: exam for module in (yesno, choice, mmmu, vqa) for name, exam in module.EXAMS.items()}


def test_every_benchmark_has_a_scorer_a_runner_and_a_sample(): assert set(SCORERS) == set(EXAMS) == set(FILES)


@pytest.mark.parametrize("name", FILES)
def test_samples_have_their_known_scores_and_print(name):
    result = SCORERS[name]([BENCH/f for f in FILES[name]])
    assert result.headline[1] == pytest.approx(HEADLINES[name], abs=1e-12)
    assert not result.complete and "INCOMPLETE" in report(result)  # samples are no whole benchmark
    assert set(result.intervals) <= set(result.values) and set(result.corrected) <= set(result.values)
    assert all(low <= result.values[k] + 1e-9 and result.values[k] - 1e-9 <= high for k, (low, high, _) in result.intervals.items())
    json.dumps(result.as_dict(), allow_nan=False)


@pytest.mark.parametrize("name", FILES)
def test_wrong_files_are_refused_in_words(name, tmp_path):
    (tmp_path/"empty.json").write_text(""); (tmp_path/"list.json").write_text("[]"); (tmp_path/"noise.json").write_bytes(bytes(range(128)))
    (tmp_path/"foreign.tsv").write_bytes(b"\xff\xfe\x00"); (tmp_path/"Art").mkdir(); (tmp_path/"Art"/"output.json").write_bytes(b"\xff\xfe\x00")
    for paths in ([tmp_path/"foreign.tsv"]*len(FILES[name]), [tmp_path]*len(FILES[name]), [], [tmp_path/"missing.json"]*len(FILES[name]), [tmp_path/"empty.json"]*len(FILES[name]), [tmp_path/"list.json"]*len(FILES[name]), [tmp_path/"noise.json"]*len(FILES[name])):
        with pytest.raises(ValueError) as e: score(name, *paths)
        assert type(e.value) is ValueError and "\n" not in str(e.value)  # in our words, not in those of a library


def test_answers_are_never_invented():
    from arm.eval.draw import Item
    with pytest.raises(ValueError, match="1 of 2"): in_order([Item("a", "?"), Item("b", "?")], {"a": "yes"})


def test_the_harness_is_loaded_only_when_asked_for():
    harness = importlib.import_module("arm.eval.harness")
    with pytest.raises(AttributeError): harness.Nothing
    if importlib.util.find_spec("lmms_eval") is None:
        with pytest.raises(ImportError, match="lmms_eval"): harness.ArmLmms
    else: assert harness.ArmLmms.losses
