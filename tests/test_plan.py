"""The plan as a command sees it: one JSON object, or tables, and nothing that does not fit goes unsaid."""
import json

import pytest
from arm.train.cost import Row, Sharding
from arm.train.plan import make_plan, plan


def test_json_holds_what_the_tables_show(capsys):
    plan("tiny", gpus=2, tokens=512, json=True)
    p = json.loads(capsys.readouterr().out)
    plan("tiny", gpus=2, tokens=512)
    shown = capsys.readouterr().out
    assert p == json.loads(json.dumps(make_plan("tiny", gpus=2, tokens=512)))
    for r in p["memory"]: assert r["strategy"] in shown and f"{r['tokens_per_second']:,}" in shown and r["peak"] <= sum(r[k] for k in ("weights", "gradients", "optimizer", "copies", "activations", "logits")) * 2
    assert "tensor parallel over 4: it must divide 2 GPUs and 3 key heads" in shown and all(s["stage"] in shown for s in p["stages"])


@pytest.mark.parametrize("gpus", (1, 2, 8, 200, 4096))
def test_any_number_of_cards_has_a_plan(gpus):
    p = make_plan(gpus=gpus, tokens=2048)
    fits = [r for r in p["memory"] if r["fits"]]
    assert p["memory"] and all(r["longest_row"] >= 2048 for r in fits) and all(r["longest_row"] < 2048 for r in p["memory"] if not r["fits"])
    assert len([line for line in p["does_not_fit"] if "checkpointing:" in line]) == len(p["memory"]) - len(fits)
    assert all((s["days"] is None) == any(line == f"stage {s['stage']}: no strategy fits on {gpus} GPU{'s' * (gpus > 1)}" for line in p["does_not_fit"]) for s in p["stages"])


@pytest.mark.parametrize("wrong, fix", [(dict(preset="big"), "choose one of paper, tiny"), (dict(gpus=0), "whole number from 1"), (dict(gpus=2.), "whole number from 1"), (dict(gpu="x"), "choose one of"),
                                        (dict(tokens=-1), "whole number from 1"), (dict(tp=0), "whole number from 1")])
def test_wrong_numbers_are_refused_with_the_fix(wrong, fix):
    with pytest.raises(ValueError, match=fix): make_plan(**wrong)


def test_more_cards_never_need_more_memory_each():
    peaks = [min(r["peak"] for r in make_plan(gpus=n, tokens=4096)["memory"]) for n in (4, 8, 64, 512)]
    assert peaks == sorted(peaks, reverse=True)


def test_what_cannot_be_is_refused():
    for wrong in (dict(kind="fsdp"), dict(kind="tp", gpus=4), dict(kind="ddp", gpus=4, tp=2), dict(kind="single", gpus=2), dict(kind="tp", gpus=6, tp=4)):
        with pytest.raises(ValueError): Sharding(**wrong)
    for wrong in (dict(tokens=0, doc=1), dict(tokens=8, doc=9), dict(tokens=8, doc=8, text=.6, visual=.6), dict(tokens=8, doc=8, text=-.1)):
        with pytest.raises(ValueError): Row(**wrong)
